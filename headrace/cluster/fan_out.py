"""Control calls that concern all replicas: each is asked, at once, and the answer says what became of each. It succeeds
if all do. Calls that bring weights are `updates`'.
"""

from __future__ import annotations

from typing import Any

import msgspec

from headrace.cluster.asking import ReplicaAnswer, ask_each, failure_of, said_alike
from headrace.cluster.front import Exchange
from headrace.cluster.http_parts import Head
from headrace.cluster.options import RouterOptions
from headrace.cluster.replicas import Replicas
from headrace.server.errors import body_of
from headrace.types.errors import UnreachableError, UpdateConflictError
from headrace.types.http import MESSAGE_TYPE, PREFIX

_OK = 200
_EMPTIES_CACHES = frozenset(
    (
        *("/flush_cache", "/reset_prefix_cache", "/release_memory_occupation", "/sleep"),
        *(f"{PREFIX}/flush_cache", f"{PREFIX}/release_memory_occupation"),
    )
)
_SUMS = frozenset(f"{PREFIX}/{name}" for name in ("abort", "flush_cache", "give_rewards"))
"""Calls of our own client that answer with a number, of all replicas the sum."""


class FanOut:
    """Asks all replicas the same."""

    def __init__(self, replicas: Replicas, options: RouterOptions) -> None:
        self._replicas = replicas
        self._options = options

    async def command(self, head: Head, body: bytes, exchange: Exchange) -> None:
        """A call that does something. The answer has what all said alike, and all of it under `results`; one of our own
        client's is what the first replica said, or a sum."""
        answers = await self._ask_all(head, body, self._options.admin_key)
        if head.path in _EMPTIES_CACHES:
            self._replicas.forget_caches()
        if head.path in _SUMS:
            answers = [each.checked(int) for each in answers]
        if self._refuse(answers, exchange):
            return
        if head.path.startswith(f"{PREFIX}/"):
            numbers = (msgspec.msgpack.decode(each.raw, type=int) for each in answers)
            reply_packed(exchange, msgspec.msgpack.encode(sum(numbers)) if head.path in _SUMS else answers[0].raw)
        else:
            alike = said_alike([each.value for each in answers])
            reply_json(exchange, {"success": True, **alike, "results": [each.shown() for each in answers]})

    async def question(self, head: Head, body: bytes, exchange: Exchange) -> None:
        """A call that only asks. The answer is the one that all give; if they differ it is 409, which may pass."""
        answers = await self._ask_all(head, body, self._options.data_key)
        if self._refuse(answers, exchange):
            return
        is_packed = head.path.startswith(f"{PREFIX}/")
        said = [each.raw if is_packed else each.value for each in answers]
        results = {} if is_packed else {"results": [each.shown() for each in answers]}
        if any(each != said[0] for each in said):
            told = UpdateConflictError("the replicas differ in this: see results" if results else "the replicas differ")
            exchange.error({**body_of(told), **results})
        elif is_packed:
            reply_packed(exchange, answers[0].raw)
        else:
            reply_json(exchange, {**said_alike(said), **results})

    async def _ask_all(self, head: Head, body: bytes, key: str | None) -> list[ReplicaAnswer]:
        if not len(self._replicas):
            raise UnreachableError("there is no replica: POST /workers adds one")
        return await ask_each(head, dict.fromkeys(self._replicas, body), key, self._options.control_timeout)

    def _refuse(self, answers: list[ReplicaAnswer], exchange: Exchange) -> bool:
        """Whether one failed, and so all did."""
        failed = [each for each in answers if not each.is_ok]
        if failed:
            results = [each.shown() for each in answers]
            exchange.error({**failure_of(failed, len(answers)), "success": False, "results": results})
        return bool(failed)


def reply_json(exchange: Exchange, value: Any) -> None:
    exchange.reply(_OK, [(b"content-type", b"application/json")], msgspec.json.encode(value))


def reply_packed(exchange: Exchange, raw: bytes) -> None:
    """MessagePack, for a client of ours."""
    exchange.reply(_OK, [(b"content-type", MESSAGE_TYPE.encode())], raw)
