"""Weight updates over HTTP as `Engine` has them: sessions, from disk, and reading back.

Owns the session that a client has begun here, and the memory that it lends. Tensors come as the bytes of a body, which
go from the socket into upload buffers, or in shared memory of a client on this host. Such memory is used only if it is
an anonymous memory file of the server's own user, which nobody can shorten, and ends with the session's token: who does
not share this host's memory cannot have written it there, and nobody else's file has it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from headrace.engine import DEFAULT_UPDATE_TIMEOUT, UpdateSession
from headrace.engine.control import terms_of, terms_of_part
from headrace.engine.sender import Sender
from headrace.engine.update_session import manifest_of
from headrace.ipc.buffers import BorrowedBuffer
from headrace.server.coerce import MediaTypeError
from headrace.server.folders import Folders
from headrace.server.routes import Endpoint
from headrace.server.state import ServerState
from headrace.server.surface import MAX_CALL_BYTES, packed_reply, read_ask, unpack
from headrace.server.wire import PartsReply
from headrace.types.errors import (
    HeadraceError,
    RequestError,
    RequestTooLargeError,
    UpdateConflictError,
    WeightUpdateError,
)
from headrace.types.http import (
    BYTES_TYPE,
    LENGTH_BYTES,
    MAX_HEAD_BYTES,
    PREFIX,
    TENSOR_HEADER,
    TOKEN_BYTES,
    AbortAsk,
    BeginAsk,
    CommitAsk,
    ExtendAsk,
    JoinAsk,
    LendAsk,
    PartJoined,
    SessionBegun,
    SettleAsk,
    StageGroupAsk,
    StageHead,
    StageLentAsk,
)
from headrace.types.weights import BufferRef, InFlight, UpdateMode

MAX_LENT_BYTES = 1 << 30
MAX_LENT_BUFFERS = 8
_CHUNK_BYTES = 1 << 20
_NUM_UNDONE = 64


class DiskAsk(msgspec.Struct, frozen=True, kw_only=True):
    """`Engine.update_weights_from_disk`; the folder is one of the server's."""

    path: str
    verify: bool = False
    version: str | int
    mode: UpdateMode = "auto"
    in_flight: InFlight = "drain"
    timeout: float = DEFAULT_UPDATE_TIMEOUT


class NameAsk(msgspec.Struct, frozen=True):
    """`Engine.get_weights_by_name`."""

    name: str


class OpenSession:
    """A session begun over HTTP. Without a call for as long as its core waits, it is over there, and forgotten here."""

    def __init__(self, session: UpdateSession, asked_by: bytes) -> None:
        self.session = session
        self.asked_by = asked_by
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self._used_at = asyncio.get_running_loop().time()
        self._lent: dict[int, BorrowedBuffer] = {}

    def seconds_left(self) -> float:
        """Until its core has waited long enough for another call."""
        now = asyncio.get_running_loop().time()
        return self.session.timeout_s - (now - self._used_at if self.session.num_calls == 0 else 0.0)

    @contextlib.contextmanager
    def call(self) -> Iterator[UpdateSession]:
        """A call of the session runs inside."""
        self.session.num_calls += 1
        try:
            yield self.session
        finally:
            self.session.num_calls -= 1
            self._used_at = asyncio.get_running_loop().time()

    def lend(self, path: str, size: int) -> int:
        """Take a client's buffer. Raises `RequestError` (field "buffer") for what is none, or not on this host."""
        if len(self._lent) >= MAX_LENT_BUFFERS or not TOKEN_BYTES < size <= MAX_LENT_BYTES:
            message = f"a session has at most {MAX_LENT_BUFFERS} lent buffers of at most {MAX_LENT_BYTES} bytes"
            raise RequestError(message, field="buffer")
        number = len(self._lent)
        self._lent[number] = BorrowedBuffer(BufferRef(path, size), self.token)
        return number

    def lent(self, number: int) -> BufferRef:
        """The part of a lent buffer that holds tensors."""
        if number not in self._lent:
            raise RequestError(f"buffer {number} was not lent to this session", field="buffer")
        ref = self._lent[number].ref
        return BufferRef(ref.path, ref.size - TOKEN_BYTES)

    def close(self) -> None:
        """Let go of what was lent."""
        for buffer in self._lent.values():
            buffer.close()


class OpenSessions:
    """The session begun on one server, if one is open: the engine has one at a time. Lives on the engine's loop."""

    def __init__(self) -> None:
        self.opening = asyncio.Lock()
        """Held while one is opened: whoever undoes that waits for it."""
        self._opened: OpenSession | None = None
        self._undone: deque[bytes] = deque(maxlen=_NUM_UNDONE)  # asks that may still come
        self._timer: asyncio.TimerHandle | None = None

    def add(self, session: UpdateSession, asked_by: bytes) -> OpenSession:
        """A session that has just been opened: the one before is over. `asked_by` is the token of the ask."""
        self.drop()
        self._opened = opened = OpenSession(session, asked_by)
        self._look()
        return opened

    def reach(self, session: UpdateSession, asked_by: bytes) -> OpenSession:
        """One that may be open here."""
        opened = self._opened
        return opened if opened is not None and opened.session is session else self.add(session, asked_by)

    def check_wanted(self, asked_by: bytes) -> None:
        """`UpdateConflictError` if this ask was undone before it came."""
        if asked_by and asked_by in self._undone:
            raise UpdateConflictError("the ask to begin was undone by its client", field="session_id")

    def undo(self, asked_by: bytes) -> UpdateSession | None:
        """The session that this ask has opened, if it has; if it comes only now it will not."""
        self._undone.append(asked_by)
        return self._opened.session if self._opened is not None and self._opened.asked_by == asked_by else None

    def find(self, session_id: int) -> OpenSession:
        """`UpdateConflictError` for one that is not open here."""
        if self._opened is None or self._opened.session.session_id != session_id:
            raise UpdateConflictError(f"session {session_id} is not open on this server", field="session_id")
        return self._opened

    def drop(self) -> None:
        """It is over."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        """Drop the session when its core has dropped it: each call moves its deadline."""
        if self._opened is not None:
            left = self._opened.seconds_left()
            if left > 0:
                self._timer = asyncio.get_running_loop().call_later(max(left, 0.1), self._look)
            else:
                self.drop()


class WeightsFace:
    """The routes of weight updates."""

    def __init__(self, state: ServerState, folders: Folders) -> None:
        self._state = state
        self._engine = state.engine
        self._folders = folders
        self._sessions = OpenSessions()
        state.add_closer(self._sessions.drop)

    def endpoints(self) -> list[Endpoint]:
        table = {
            "begin_update": self.begin_update,
            "extend_update": self.extend_update,
            "join_update": self.join_update,
            "settle_part": self.settle_part,
            "stage": self.stage,
            "lend": self.lend,
            "stage_lent": self.stage_lent,
            "stage_from_group": self.stage_from_group,
            "commit": self.commit,
            "abort_update": self.abort_update,
            "update_weights_from_disk": self.update_weights_from_disk,
            "get_weights_by_name": self.get_weights_by_name,
        }
        return [Endpoint(f"{PREFIX}/{name}", handler, ("POST",), access="admin") for name, handler in table.items()]

    async def begin_update(self, request: Request) -> Response:
        ask = await read_ask(request, BeginAsk)
        terms = terms_of(ask.version, ask.mode, ask.in_flight, ask.timeout, ask.partial)
        async with self._sessions.opening:
            self._sessions.check_wanted(ask.token)
            session = await self._state.run(request, *self._engine.undoable_begin(ask.manifest, terms))
            return packed_reply(self._begun(request, self._sessions.add(session, ask.token)))

    async def extend_update(self, request: Request) -> Response:
        ask = await read_ask(request, ExtendAsk)
        with self._sessions.find(ask.session_id).call() as session:
            added = await self._state.run(
                request, self._engine.runtime.updater.extend(session, manifest_of(ask.manifest))
            )
        return packed_reply(added.start)

    async def join_update(self, request: Request) -> Response:
        ask = await read_ask(request, JoinAsk)
        terms = terms_of_part(ask.version, ask.mode, ask.in_flight, ask.timeout)
        self._engine.runtime.check_open()
        async with self._sessions.opening:
            self._sessions.check_wanted(ask.token)
            sender = Sender("client", ask.sender)
            joining = self._engine.runtime.joined.join(manifest_of(ask.manifest), terms, sender)
            joined = await self._state.run(request, joining)
            if joined is None:
                return packed_reply(None)
            session, indices = joined
            opened = self._sessions.reach(session, ask.token)
        return packed_reply(PartJoined(self._begun(request, opened), tuple(indices)))

    async def settle_part(self, request: Request) -> Response:
        ask = await read_ask(request, SettleAsk)
        with self._sessions.find(ask.session_id).call() as session:
            report = await self._state.run(request, self._engine.runtime.joined.settle(session, ask.indices))
        if report is not None:
            self._sessions.drop()
        return packed_reply(report)

    def _begun(self, request: Request, opened: OpenSession) -> SessionBegun:
        session, limit, peer = opened.session, self._state.options.max_body_bytes, request.client
        of_engine = session.dtype, session.num_ranks
        client = ("", 0) if peer is None else (peer.host, peer.port)
        return SessionBegun(session.session_id, session.mode, opened.token, limit, *of_engine, client)

    async def stage(self, request: Request) -> Response:
        """The body is the length of a `StageHead`, that head, and the bytes of its pieces."""
        if request.headers.get("content-type") != BYTES_TYPE:
            raise MediaTypeError(f"content-type must be {BYTES_TYPE}", field="content-type")
        announced = request.headers.get("content-length", "")
        if not announced.isdigit():
            raise RequestError("a stage call needs a content-length", field="content-length")
        await self._state.run(request, self._stage(_Body(request.stream()), int(announced)))
        return packed_reply(None)

    async def _stage(self, body: _Body, num_bytes: int) -> None:
        num_head_bytes = int.from_bytes(await body.read(LENGTH_BYTES), "little")
        if num_head_bytes > MAX_HEAD_BYTES:
            raise RequestTooLargeError(f"the head of a stage call has at most {MAX_HEAD_BYTES} bytes", field="body")
        head = unpack(await body.read(num_head_bytes), StageHead)
        opened = self._sessions.find(head.session_id)
        sizes = [piece.num_bytes for piece in head.pieces]
        expected = LENGTH_BYTES + num_head_bytes + sum(sizes)
        if min(sizes, default=0) < 0 or expected != num_bytes:
            message = f"body has {num_bytes} bytes, the pieces that its head lists make {expected}"
            raise WeightUpdateError(message, field="body")
        with opened.call() as session:
            await self._engine.runtime.updater.stage_pieces(session, head.pieces, body.fill)

    async def lend(self, request: Request) -> Response:
        ask = await read_ask(request, LendAsk, MAX_CALL_BYTES)
        return packed_reply(self._sessions.find(ask.session_id).lend(ask.path, ask.size))

    async def stage_lent(self, request: Request) -> Response:
        ask = await read_ask(request, StageLentAsk)
        opened = self._sessions.find(ask.session_id)
        ref = opened.lent(ask.buffer)
        with opened.call() as session:
            await self._state.run(request, self._engine.runtime.updater.stage_buffer(session, ref, ask.entries))
        return packed_reply(None)

    async def stage_from_group(self, request: Request) -> Response:
        ask = await read_ask(request, StageGroupAsk)
        try:
            opened = self._sessions.find(ask.session_id)
        except UpdateConflictError:
            none: Any = None
            with contextlib.suppress(HeadraceError):  # nobody knows what is sent: the group is given up
                await self._engine.stage_from_group(none, ask.names, ask.group_name)
            raise
        with opened.call() as session:
            staging = self._engine.stage_from_group(session, ask.names, ask.group_name, ask.load_format)
            await self._state.run(request, staging)
        return packed_reply(None)

    async def commit(self, request: Request) -> Response:
        ask = await read_ask(request, CommitAsk, MAX_CALL_BYTES)
        with self._sessions.find(ask.session_id).call() as session:
            report = await self._state.run(request, self._engine.commit(session))
        self._sessions.drop()
        return packed_reply(report)

    async def abort_update(self, request: Request) -> Response:
        """Without a session: whichever is open, whoever began it."""
        ask = await read_ask(request, AbortAsk, MAX_CALL_BYTES)
        session = None if ask.session_id is None else self._sessions.find(ask.session_id).session
        if ask.token:
            async with self._sessions.opening:
                session = self._sessions.undo(ask.token)
            if session is None:
                return packed_reply(None)
        await self._state.run(request, self._engine.abort_update(session))
        self._sessions.drop()
        return packed_reply(None)

    async def update_weights_from_disk(self, request: Request) -> Response:
        ask = await read_ask(request, DiskAsk, MAX_CALL_BYTES)
        folder, root = self._folders.allowed(ask.path, "path")
        update = self._engine.update_weights_from_disk(
            folder,
            ask.version,
            mode=ask.mode,
            in_flight=ask.in_flight,
            timeout=ask.timeout,
            verify=ask.verify,
            root=root,
        )
        return packed_reply(await self._state.run(request, update))

    async def get_weights_by_name(self, request: Request) -> Response:
        """The bytes of a tensor; the header says of what shape and dtype."""
        ask = await read_ask(request, NameAsk, MAX_CALL_BYTES)
        weight = await self._state.run(request, self._engine.read_weight(ask.name))
        parts = [weight.data[start : start + _CHUNK_BYTES] for start in range(0, len(weight.data), _CHUNK_BYTES)]
        header = json.dumps(msgspec.to_builtins(weight.info))
        return PartsReply(parts, BYTES_TYPE, {TENSOR_HEADER: header})


class _Body:
    """A body read piece by piece, each to where it is to go; no more of it is held than came at once."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    async def read(self, num_bytes: int) -> bytes:
        """The next bytes, of which there are few."""
        found = bytearray(num_bytes)
        await self.fill(memoryview(found))
        return bytes(found)

    async def fill(self, view: memoryview) -> None:
        """Write the next bytes to `view`. Raises `WeightUpdateError` if the body ends before."""
        done = 0
        while done < len(view):
            if not self._rest:
                self._rest = memoryview(await anext(self._chunks, b""))
                if not self._rest:
                    message = f"the body ended {len(view) - done} bytes before the end of a piece"
                    raise WeightUpdateError(message, field="body")
            part = self._rest[: len(view) - done]
            view[done : done + len(part)] = part
            self._rest, done = self._rest[len(part) :], done + len(part)
