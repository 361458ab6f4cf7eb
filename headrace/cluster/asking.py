"""One call to several replicas at once, and what each answered. Nothing is tried again: a call that broke off may have
been carried out. Owns how several answers become one."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from headrace.cluster.http_parts import Head
from headrace.cluster.messages import RequestParts, exchange_whole
from headrace.cluster.replicas import RemoteReplica
from headrace.ipc.codec import DECODE_ERRORS
from headrace.server.errors import body_of, error_body
from headrace.types.errors import DeadlineError, HeadraceError, UnreachableError, UpdateConflictError

_OK = 200


class ReplicaAnswer(msgspec.Struct, frozen=True):
    """What became of a call at one replica; an error of the way there is written as the replica would write it."""

    replica: RemoteReplica
    status: int
    raw: bytes

    @property
    def is_ok(self) -> bool:
        return self.status == _OK

    @property
    def value(self) -> Any:
        """JSON as such, and anything else as text."""
        try:
            return msgspec.json.decode(self.raw)
        except DECODE_ERRORS:
            return self.raw.decode("utf-8", "replace")

    @property
    def is_conflict(self) -> bool:
        """An update of somebody else's is in progress there."""
        value = self.value
        return not self.is_ok and isinstance(value, dict) and value.get("err_type") == UpdateConflictError.__name__

    def checked(self, kind: Any) -> ReplicaAnswer:
        """Itself; a failure where it is none and not MessagePack of that `kind`."""
        try:
            if self.is_ok:
                msgspec.msgpack.decode(self.raw, type=kind)
        except DECODE_ERRORS as error:
            return _failed(self.replica, UnreachableError(f"its answer cannot be read: {error}"))
        return self

    def shown(self) -> dict[str, Any]:
        """It as an entry of `results`."""
        return {"id": self.replica.id, "url": self.replica.url, "status": self.status, "body": self.value}


async def ask_each(
    head: Head, bodies: Mapping[RemoteReplica, bytes], key: str | None, limit: float
) -> list[ReplicaAnswer]:
    """The answers, in the order of `bodies`; each replica has `limit` seconds."""
    return await asyncio.gather(*(_ask(head, replica, body, key, limit) for replica, body in bodies.items()))


async def _ask(head: Head, replica: RemoteReplica, body: bytes, key: str | None, limit: float) -> ReplicaAnswer:
    parts = RequestParts(head, body, key)
    try:
        async with asyncio.timeout(limit):
            answer, raw = await exchange_whole(replica.upstream, parts.head_for(replica), parts.body)
    except TimeoutError:
        return _failed(replica, DeadlineError(f"no answer within {limit:g} s"))
    except HeadraceError as error:
        return _failed(replica, error)
    return ReplicaAnswer(replica, answer.status, raw)


def _failed(replica: RemoteReplica, error: HeadraceError) -> ReplicaAnswer:
    return ReplicaAnswer(replica, error.status, msgspec.json.encode(body_of(error)))


def said_alike(values: Sequence[Any]) -> dict[str, Any]:
    """What all answers say alike, of those that are objects."""
    if not all(isinstance(each, dict) for each in values):
        return {}
    return {key: value for key, value in values[0].items() if all(each.get(key) == value for each in values)}


def failure_of(failed: Sequence[ReplicaAnswer], num_asked: int) -> dict[str, Any]:
    """The error body: the gravest status, and whether it is worth while to try again."""
    values = [each.value for each in failed]
    bodies = [value if isinstance(value, dict) else {"message": str(value)} for value in values]
    first, status = bodies[0], max(each.status for each in failed)
    reason = first.get("message") or f"it answered {failed[0].status}"
    message = f"{len(failed)} of {num_asked} replicas failed; {failed[0].replica.id}: {reason}"
    retryable = all(body.get("retryable") is True for body in bodies)
    kinds = {body.get("err_type", "") for body in bodies}
    kind = kinds.pop() if len(kinds) == 1 else ""
    param = first.get("param") if len(failed) == num_asked else None
    return error_body(max(status, 400), message, param=param or "", retryable=retryable, err_type=kind)
