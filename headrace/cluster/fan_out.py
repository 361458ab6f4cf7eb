"""Control calls that concern all replicas: each is asked, at once, and the answer says what became of each. It succeeds
if all do. Calls that bring weights are `updates`'.

A call is carried out to its end though its client goes away, or replicas would differ unsaid. Not so a pause: as at a
server, one that is given up or fails leaves what was in force before it, at every replica.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Coroutine
from typing import Any, TypeVar

import msgspec

from headrace.cluster.asking import ReplicaAnswer, ask_each, failure_of, said_alike
from headrace.cluster.exchange import Exchange
from headrace.cluster.http_parts import Head, own_request
from headrace.cluster.options import RouterOptions
from headrace.cluster.replicas import RemoteReplica, Replicas
from headrace.server.errors import body_of
from headrace.types.errors import UnreachableError, UpdateConflictError
from headrace.types.http import MESSAGE_TYPE, PREFIX

_OK = 200
_LOOK_SECONDS = 2.0
_UNDO_SECONDS = 5.0
_PAUSES = frozenset(("/pause_generation", "/pause", f"{PREFIX}/pause"))
_IS_PAUSED = own_request("GET", "/is_paused")
_RESUME = own_request("POST", "/continue_generation", (b"content-type", b"application/json"))
Result = TypeVar("Result")
logger = logging.getLogger(__name__)
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
        self._num_pauses = 0
        self._going_on: set[asyncio.Future[Any]] = set()

    async def close(self) -> None:
        """Let what is undone or carried out come to its end, for a while."""
        if self._going_on:
            await asyncio.wait(self._going_on, timeout=_UNDO_SECONDS)
        for each in self._going_on:
            each.cancel()

    async def command(self, head: Head, body: bytes, exchange: Exchange) -> None:
        """A call that does something. The answer has what all said alike, and all of it under `results`; one of our own
        client's is what the first replica said, or a sum."""
        if head.path in _PAUSES:
            answers = await self._pause(head, body)
        else:
            answers = await self._to_its_end(self._carry_out(head, body))
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

    async def _carry_out(self, head: Head, body: bytes) -> list[ReplicaAnswer]:
        answers = await self._ask_all(head, body, self._options.admin_key)
        if head.path in _EMPTIES_CACHES:
            self._replicas.forget_caches()
        return answers

    async def _pause(self, head: Head, body: bytes) -> list[ReplicaAnswer]:
        """As `_carry_out`; those that ran before run again if the client goes away meanwhile, or one cannot pause."""
        running = await self._running()
        self._num_pauses += 1
        number = self._num_pauses
        try:
            answers = await self._carry_out(head, body)
        except asyncio.CancelledError:
            self._keep(self._undo_pause(number, running))
            raise
        if not all(each.is_ok for each in answers):
            paused = [each.replica for each in answers if each.is_ok and each.replica in running]
            await self._to_its_end(self._undo_pause(number, paused))
        return answers

    async def _running(self) -> set[RemoteReplica]:
        """Those that say that they are not paused."""
        bodies = dict.fromkeys(self._asked(), b"")
        answers = await ask_each(_IS_PAUSED, bodies, self._options.data_key, _LOOK_SECONDS)
        values = {each.replica: each.value for each in answers if each.is_ok}
        return {each for each, value in values.items() if isinstance(value, dict) and value.get("is_paused") is False}

    async def _undo_pause(self, number: int, running: Collection[RemoteReplica]) -> None:
        """A later pause is somebody's who counts on it."""
        if number != self._num_pauses:
            return
        answers = await ask_each(_RESUME, dict.fromkeys(running, b"{}"), self._options.admin_key, _UNDO_SECONDS)
        for each in answers:
            told = "runs again" if each.is_ok else f"did not resume: {each.value}"
            logger.info("a pause was given up or failed: %s %s", each.replica.id, told)

    async def _to_its_end(self, work: Coroutine[Any, Any, Result]) -> Result:
        return await asyncio.shield(self._keep(work))

    def _keep(self, work: Coroutine[Any, Any, Result]) -> asyncio.Future[Result]:
        """It goes on, whoever waits for it."""
        going_on = asyncio.ensure_future(work)
        self._going_on.add(going_on)
        going_on.add_done_callback(self._going_on.discard)
        return going_on

    def _asked(self) -> list[RemoteReplica]:
        """All, each server once."""
        return [each for each in self._replicas if not each.is_another_name]

    async def _ask_all(self, head: Head, body: bytes, key: str | None) -> list[ReplicaAnswer]:
        if not len(self._replicas):
            raise UnreachableError("there is no replica: POST /workers adds one")
        return await ask_each(head, dict.fromkeys(self._asked(), body), key, self._options.control_timeout)

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
