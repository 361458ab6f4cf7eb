"""Control calls that concern all replicas: each is asked, at once, and the answer says what became of each.

It succeeds if all do. Owns how several answers become one; nothing is tried again, since a call that broke off may have
been carried out.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from headrace.cluster.front import Exchange
from headrace.cluster.http_parts import Head
from headrace.cluster.messages import RequestParts, exchange_whole
from headrace.cluster.options import RouterOptions
from headrace.cluster.replicas import RemoteReplica, Replicas
from headrace.server.errors import body_of, error_body
from headrace.types.errors import DeadlineError, HeadraceError, UnreachableError, UpdateConflictError

_OK = 200
_EMPTIES_CACHES = frozenset(
    (
        *("/flush_cache", "/reset_prefix_cache", "/release_memory_occupation", "/sleep"),
        *("/update_weights_from_disk", "/update_weight_version"),
    )
)


class Outcome(msgspec.Struct, frozen=True):
    """What became of a call at one replica; `body` is what it answered, JSON as such and anything else as text."""

    id: str
    url: str
    status: int
    body: Any


class FanOut:
    """Asks all replicas the same."""

    def __init__(self, replicas: Replicas, options: RouterOptions) -> None:
        self._replicas = replicas
        self._options = options

    async def command(self, head: Head, body: bytes, exchange: Exchange) -> None:
        """A call that does something. The answer has what all said alike, and all of it under `results`."""
        outcomes = await self._ask_all(head, body, self._options.admin_key)
        if head.path in _EMPTIES_CACHES:
            self._replicas.forget_caches()
        failed = [each for each in outcomes if each.status != _OK]
        if failed:
            exchange.error({**_failure(failed, len(outcomes)), "success": False, "results": _builtins(outcomes)})
        else:
            _reply(exchange, {"success": True, **_common(outcomes), "results": _builtins(outcomes)})

    async def question(self, head: Head, body: bytes, exchange: Exchange) -> None:
        """A call that only asks. The answer is the one that all give; if they differ it is 409, which may pass."""
        outcomes = await self._ask_all(head, body, self._options.data_key)
        failed = [each for each in outcomes if each.status != _OK]
        if failed:
            exchange.error({**_failure(failed, len(outcomes)), "results": _builtins(outcomes)})
        elif any(each.body != outcomes[0].body for each in outcomes):
            told = UpdateConflictError("the replicas differ in this: see results")
            exchange.error({**body_of(told), "results": _builtins(outcomes)})
        else:
            _reply(exchange, {**_common(outcomes), "results": _builtins(outcomes)})

    async def _ask_all(self, head: Head, body: bytes, key: str | None) -> list[Outcome]:
        if not len(self._replicas):
            raise UnreachableError("there is no replica: POST /workers adds one")
        parts = RequestParts(head, body, key)
        return await asyncio.gather(*(self._ask(each, parts) for each in self._replicas))

    async def _ask(self, replica: RemoteReplica, parts: RequestParts) -> Outcome:
        limit = self._options.control_timeout
        try:
            async with asyncio.timeout(limit):
                answer, body = await exchange_whole(replica.upstream, parts.head_for(replica), parts.body)
        except TimeoutError:
            return _failed(replica, DeadlineError(f"no answer within {limit:g} s"))
        except HeadraceError as error:
            return _failed(replica, error)
        return Outcome(replica.id, replica.url, answer.status, _decoded(body))


def _failed(replica: RemoteReplica, error: HeadraceError) -> Outcome:
    return Outcome(replica.id, replica.url, error.status, body_of(error))


def _decoded(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return body.decode("utf-8", "replace")


def _common(outcomes: list[Outcome]) -> dict[str, Any]:
    """What all answers say alike, of those that are objects."""
    first = outcomes[0].body
    if not all(isinstance(each.body, dict) for each in outcomes):
        return {}
    return {key: value for key, value in first.items() if all(each.body.get(key) == value for each in outcomes)}


def _failure(failed: list[Outcome], num_asked: int) -> dict[str, Any]:
    """The error body: the gravest status, and whether it is worth while to try again."""
    bodies = [each.body if isinstance(each.body, dict) else {"message": str(each.body)} for each in failed]
    first, status = bodies[0], max(each.status for each in failed)
    reason = first.get("message") or f"it answered {failed[0].status}"
    message = f"{len(failed)} of {num_asked} replicas failed; {failed[0].id}: {reason}"
    retryable = all(body.get("retryable") is True for body in bodies)
    kinds = {body.get("err_type", "") for body in bodies}
    kind = kinds.pop() if len(kinds) == 1 else ""
    param = first.get("param") if len(failed) == num_asked else None
    return error_body(max(status, 400), message, param=param or "", retryable=retryable, err_type=kind)


def _builtins(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    return [msgspec.structs.asdict(each) for each in outcomes]


def _reply(exchange: Exchange, value: Any) -> None:
    exchange.reply(_OK, [(b"content-type", b"application/json")], msgspec.json.encode(value))
