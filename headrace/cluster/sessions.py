"""Updates by our own client through a router: one session here is one at each replica. What is sent of tensors goes to
all of them, as bytes, or as memory of the client's that replicas on this host read themselves.

Owns which session of a replica belongs to which of a client's, and the fence at its end (`WeightUpdates.commit`). A
replica that fails in a session has no more part in it, and leaves the rotation when the others commit.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import secrets
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar, cast

import msgspec

from headrace.cluster.asking import ReplicaAnswer, failure_of
from headrace.cluster.exchange import Exchange
from headrace.cluster.fan_out import reply_packed
from headrace.cluster.http_parts import Head
from headrace.cluster.options import RouterOptions
from headrace.cluster.replicas import RemoteReplica
from headrace.cluster.updates import WeightUpdates
from headrace.ipc.buffers import BorrowedBuffer, SharedBuffer
from headrace.ipc.codec import DECODE_ERRORS
from headrace.types.errors import RequestError, UpdateConflictError
from headrace.types.http import (
    LENGTH_BYTES,
    MAX_HEAD_BYTES,
    PREFIX,
    TOKEN_BYTES,
    AbortAsk,
    BeginAsk,
    CommitAsk,
    ExtendAsk,
    LendAsk,
    PartJoined,
    SessionBegun,
    SettleAsk,
    StageHead,
    StageLentAsk,
    framed,
)
from headrace.types.weights import BufferRef, UpdateReport

MAX_SESSIONS = 64
"""Begun and never ended: the oldest is forgotten."""
Ask = TypeVar("Ask")
_MAY_COMMIT = frozenset(("settle_part", "commit", "update_weights_from_disk", "set_weight_version"))
_pack = msgspec.msgpack.encode
_REPORT = cast("type[UpdateReport | None]", UpdateReport | None)
_JOINED = cast("type[PartJoined | None]", PartJoined | None)


class _Versioned(msgspec.Struct):
    version: str | int | None = None


class SharedSession:
    """A session, as each replica that takes part has begun it. `lent` are the client's buffers: the number that each
    replica has given them."""

    def __init__(self, number: int, begun: dict[RemoteReplica, SessionBegun]) -> None:
        self.number = number
        self.begun = begun
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self.lent: list[dict[RemoteReplica, int]] = []

    def told(self, max_body_bytes: int) -> SessionBegun:
        """What the client is told of it."""
        limits = [max_body_bytes, *(each.max_body_bytes for each in self.begun.values())]
        first = next(iter(self.begun.values()))
        changes = {"session_id": self.number, "token": self.token, "max_body_bytes": min(limits), "client": ("", 0)}
        return msgspec.structs.replace(first, **changes)


class SharedSessions:
    """The sessions of all clients, and the calls of our own client that bring weights without one."""

    def __init__(self, updates: WeightUpdates, options: RouterOptions) -> None:
        self._updates = updates
        self._options = options
        self._sessions: dict[int, SharedSession] = {}
        self._numbers = itertools.count(1)
        self._calls: dict[str, Callable[[Head, bytes], Coroutine[Any, Any, bytes]]] = {
            "begin_update": self._begin,
            "join_update": self._join,
            "extend_update": self._extend,
            "stage": self._stage,
            "lend": self._lend,
            "stage_lent": self._stage_lent,
            "settle_part": self._settle,
            "commit": self._commit,
            "abort_update": self._abort,
            "update_weights_from_disk": self._from_disk,
            "set_weight_version": self._set_version,
        }

    async def command(self, head: Head, body: bytes, exchange: Exchange) -> None:
        """One of these calls."""
        try:
            name = head.path.removeprefix(f"{PREFIX}/")
            work = functools.partial(self._calls[name], head, body)
            answer = await (self._updates.carry_out(work) if name in _MAY_COMMIT else work())
        except _AllFailedError as failed:
            exchange.error(failure_of(failed.answers, len(failed.answers)))
        else:
            reply_packed(exchange, answer)

    async def _begin(self, head: Head, body: bytes) -> bytes:
        is_partial = _unpack(body, BeginAsk).partial
        taking = self._updates.current if is_partial else self._updates.replicas
        answers = await self._ask(head, dict.fromkeys(taking, body), SessionBegun)
        session = self._add({each.replica: _unpack(each.raw, SessionBegun) for each in answers})
        return _pack(session.told(self._options.max_body_bytes))

    async def _join(self, head: Head, body: bytes) -> bytes:
        """Which session a bucket belongs to each replica says; if it is the one of the last bucket, so it is here."""
        answers = await self._ask(head, dict.fromkeys(self._updates.replicas, body), _JOINED)
        parts = {each.replica: _unpack(each.raw, _JOINED) for each in answers}
        joined = {replica: part for replica, part in parts.items() if part is not None}
        if not joined:
            return _pack(None)
        indices = next(iter(joined.values())).indices
        begun = {replica: part.begun for replica, part in joined.items() if part.indices == indices}
        last = next(reversed(self._sessions.values()), None)
        if last is not None and _goes_on(last, begun):
            session = last
            session.begun = {replica: begun[replica] for replica in begun if replica in last.begun}
        else:
            session = self._add(begun)
        await self._updates.give_up(joined.keys() - session.begun.keys())
        return _pack(PartJoined(session.told(self._options.max_body_bytes), indices))

    async def _extend(self, head: Head, body: bytes) -> bytes:
        return await self._alike(head, _unpack(body, ExtendAsk), kind=int)

    async def _stage(self, head: Head, body: bytes) -> bytes:
        size = int.from_bytes(body[:LENGTH_BYTES], "little")
        if size > MAX_HEAD_BYTES:
            raise RequestError("the head of a stage call is too long", field="body")
        ask = _unpack(memoryview(body)[LENGTH_BYTES : LENGTH_BYTES + size], StageHead)
        data = memoryview(body)[LENGTH_BYTES + size :]
        return await self._alike(head, ask, lambda own: b"".join((framed(_pack(own)), data)))

    async def _lend(self, head: Head, body: bytes) -> bytes:
        """A buffer ends with the token of one session. Here it is ours; each replica's is written there in turn, and is
        looked at by that one alone. `RequestError` (field "buffer") where this process, or a replica, is elsewhere."""
        ask = _unpack(body, LendAsk)
        session = self._find(ask.session_id)
        ref = BufferRef(ask.path, ask.size)
        BorrowedBuffer(ref, session.token).close()
        numbers: dict[RemoteReplica, int] = {}
        with SharedBuffer.open(ref, writable=True) as buffer:
            for replica, begun in session.begun.items():
                buffer.view[ask.size - TOKEN_BYTES :] = begun.token
                own = msgspec.structs.replace(ask, session_id=begun.session_id)
                (answer,) = await self._updates.ask(head, {replica: _pack(own)})
                if answer.status == RequestError.status:
                    raise RequestError(f"{replica.id} cannot read this buffer", field="buffer")
                if answer.checked(int).is_ok:
                    numbers[replica] = _unpack(answer.raw, int)
        if not numbers:
            raise RequestError("no replica can read this buffer", field="buffer")
        self._keep(session, set(numbers))
        session.lent.append(numbers)
        return _pack(len(session.lent) - 1)

    async def _stage_lent(self, head: Head, body: bytes) -> bytes:
        ask = _unpack(body, StageLentAsk)
        session = self._find(ask.session_id)
        if not 0 <= ask.buffer < len(session.lent):
            raise RequestError(f"buffer {ask.buffer} was not lent to this session", field="buffer")
        numbers = session.lent[ask.buffer]
        bodies = {}
        for replica, begun in session.begun.items():
            own = msgspec.structs.replace(ask, session_id=begun.session_id, buffer=numbers[replica])
            bodies[replica] = _pack(own)
        return (await self._in_session(head, session, bodies))[0].raw

    async def _settle(self, head: Head, body: bytes) -> bytes:
        ask = _unpack(body, SettleAsk)
        session = self._find(ask.session_id)
        answers = await self._in_session(head, session, self._bodies(session, ask), _REPORT)
        done = [each for each in answers if _unpack(each.raw, _REPORT) is not None]
        return await self._end(session, done) if done else _pack(None)

    async def _commit(self, head: Head, body: bytes) -> bytes:
        ask = _unpack(body, CommitAsk)
        session = self._find(ask.session_id)
        done = await self._in_session(head, session, self._bodies(session, ask), UpdateReport)
        return await self._end(session, done)

    async def _end(self, session: SharedSession, done: Sequence[ReplicaAnswer]) -> bytes:
        """The fence: these have committed."""
        live = {each.replica for each in done}
        self._updates.commit(_unpack(done[0].raw, UpdateReport).version, live)
        self._sessions.pop(session.number, None)
        await self._updates.give_up(set(self._updates.taking_part) - live)
        return done[0].raw

    async def _abort(self, head: Head, body: bytes) -> bytes:
        """Of one session, or of whichever is open at each replica."""
        ask = _unpack(body, AbortAsk)
        if ask.session_id is None:
            await self._ask(head, dict.fromkeys(self._updates.replicas, body), None)
        else:
            session = self._find(ask.session_id)
            self._sessions.pop(session.number)
            await self._ask(head, self._bodies(session, ask), None)
        return _pack(None)

    async def _from_disk(self, head: Head, body: bytes) -> bytes:
        answers = await self._ask(head, dict.fromkeys(self._updates.replicas, body), UpdateReport)
        self._updates.commit(_unpack(answers[0].raw, UpdateReport).version, {each.replica for each in answers})
        return answers[0].raw

    async def _set_version(self, head: Head, body: bytes) -> bytes:
        answers = await self._ask(head, dict.fromkeys(self._updates.current, body), None)
        version = _unpack(body, _Versioned).version
        self._updates.commit(None if version is None else str(version), {each.replica for each in answers})
        return answers[0].raw

    async def _alike(self, head: Head, ask: Any, write: Callable[[Any], bytes] = _pack, kind: Any = None) -> bytes:
        """A call within a session to which all answer the same; who answers otherwise has no more part in it."""
        session = self._find(ask.session_id)
        answers = await self._in_session(head, session, self._bodies(session, ask, write), kind)
        first = answers[0].raw
        self._keep(session, {each.replica for each in answers if each.raw == first})
        return first

    async def _in_session(
        self, head: Head, session: SharedSession, bodies: dict[RemoteReplica, bytes], kind: Any = None
    ) -> list[ReplicaAnswer]:
        answers = await self._ask(head, bodies, kind)
        self._keep(session, {each.replica for each in answers})
        return answers

    def _keep(self, session: SharedSession, replicas: set[RemoteReplica]) -> None:
        session.begun = {replica: begun for replica, begun in session.begun.items() if replica in replicas}

    def _bodies(
        self, session: SharedSession, ask: Any, write: Callable[[Any], bytes] = _pack
    ) -> dict[RemoteReplica, bytes]:
        own = {r: msgspec.structs.replace(ask, session_id=begun.session_id) for r, begun in session.begun.items()}
        return {replica: write(each) for replica, each in own.items()}

    async def _ask(self, head: Head, bodies: dict[RemoteReplica, bytes], kind: Any) -> list[ReplicaAnswer]:
        """The answers that are of this `kind`; what failed is told its update is over. Raises if all failed."""
        answers = [each.checked(kind) for each in await self._updates.ask(head, bodies)]
        good = [each for each in answers if each.is_ok]
        if not good:
            raise _AllFailedError(answers)
        await self._updates.give_up({each.replica for each in answers if not (each.is_ok or each.is_conflict)})
        return good

    def _add(self, begun: dict[RemoteReplica, SessionBegun]) -> SharedSession:
        session = SharedSession(next(self._numbers), begun)
        self._sessions[session.number] = session
        while len(self._sessions) > MAX_SESSIONS:
            self._sessions.pop(next(iter(self._sessions)))
        return session

    def _find(self, number: int) -> SharedSession:
        with contextlib.suppress(KeyError):
            return self._sessions[number]
        raise UpdateConflictError(f"session {number} is not open on this router", field="session_id")


class _AllFailedError(Exception):
    """What every replica said, on its way to the client."""

    def __init__(self, answers: Sequence[ReplicaAnswer]) -> None:
        super().__init__("no replica did it")
        self.answers = answers


def _goes_on(last: SharedSession, begun: dict[RemoteReplica, SessionBegun]) -> bool:
    """Whether these parts belong to the session of `last`, at every replica that has both."""
    both = last.begun.keys() & begun.keys()
    return bool(both) and all(last.begun[each].session_id == begun[each].session_id for each in both)


def _unpack(raw: bytes | memoryview, kind: type[Ask]) -> Ask:
    try:
        return msgspec.msgpack.decode(raw, type=kind)
    except DECODE_ERRORS as error:
        raise RequestError(f"body: {error}", field="body") from None
