"""Tensors on their way to a server. Owns the memory that they are copied to: shared with the server where it is on this
host and may take it, sent as bytes otherwise.

A tensor has been copied before the next one is asked for; one that is larger than the memory goes in pieces.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from headrace.client.asks import message_body
from headrace.engine.tensors import NamedTensors, TensorBytes, describe, named_pairs
from headrace.engine.update_session import UpdateSession
from headrace.engine.upload_buffers import aligned
from headrace.ipc import SharedBuffer
from headrace.types.errors import RequestError, UnavailableError, UpdateConflictError, WeightUpdateError
from headrace.types.http import (
    BYTES_TYPE,
    MESSAGE_TYPE,
    TOKEN_BYTES,
    ExtendAsk,
    LendAsk,
    SessionBegun,
    StageHead,
    StageLentAsk,
    TensorPiece,
    framed,
)
from headrace.types.weights import BufferEntry

BUFFER_BYTES = 64 << 20
MAX_PIECES = 1 << 14
_HEAD_BYTES_PER_PIECE = 32
"""At most; the head's other fields take less than two pieces."""

Ask = Callable[[str, bytes, str], Awaitable[bytearray]]
"""Calls a route by name, with a body and its media type."""


class UploadMemory:
    """Anonymous shared memory with pieces of tensors in it. The end of it is for the token of a session."""

    def __init__(self, num_bytes: int, max_pieces: int = MAX_PIECES) -> None:
        self.shared = SharedBuffer.create(num_bytes + TOKEN_BYTES)
        self.capacity = num_bytes
        self.max_pieces = max_pieces
        self.entries: list[BufferEntry] = []
        self.lent_to: tuple[bytes, int] | None = None
        """The token of the session that it is lent to, and its number there. Numbers of sessions begin again with a
        server."""
        self.pid = os.getpid()
        """The process that may write here: a fork shares the memory with its parent."""
        self._num_used = 0

    def write(self, index: int, start: int, data: TensorBytes, *, replaces: bool) -> bool:
        """Copy a piece in, if there is room for it."""
        offset = aligned(self._num_used)
        if offset + len(data) > self.capacity or len(self.entries) >= self.max_pieces:
            return False
        data.copy_into(self.shared.part(offset, len(data)))
        self.entries.append(BufferEntry(index, offset, start, len(data), replaces))
        self._num_used = offset + len(data)
        return True

    def sign(self, token: bytes) -> None:
        """Write the token of a session."""
        self.shared.view[self.capacity :] = token

    def clear(self) -> None:
        """It may be filled again."""
        self.entries, self._num_used = [], 0


class Uploads:
    """The staging of one client: a call fills one memory, which is kept for the next."""

    def __init__(self, ask: Ask, *, shares_memory: bool) -> None:
        self._ask = ask
        self._shares = shares_memory
        self._refused_by: bytes | None = None  # the token of the session whose server has not taken our memory
        self._begun: SessionBegun | None = None
        self._own_end = "", 0
        self._free: list[UploadMemory] = []

    def open(self, begun: SessionBegun, own_end: tuple[str, int] = ("", 0)) -> None:
        """A session has begun; every other one is over. `own_end` is that of the connection on which it has."""
        self._begun, self._own_end = begun, own_end

    async def group_address(self, session: UpdateSession) -> str:
        """See `AsyncClient.group_address`."""
        begun = self._last(session)
        memory = self._take(session, begun)
        if await self._is_lent(begun, memory):
            self._free.append(memory)
            return ""
        memory.shared.close()
        host, port = self._own_end
        is_direct = (host, port) == (begun.client[0].removeprefix("::ffff:"), begun.client[1])
        return host if is_direct else ""

    async def stage(self, session: UpdateSession, named_tensors: NamedTensors) -> None:
        """See `AsyncEngine.stage`."""
        begun = self._last(session)
        sent, num_bytes, is_settled = set[int](), 0, False
        memory = self._take(session, begun)
        try:
            for name, tensor in named_pairs(named_tensors):
                index = session.index_of(describe(name, tensor))
                if index in sent:
                    raise WeightUpdateError(f"{name} was staged twice", field=name)
                sent.add(index)
                data = TensorBytes(name, tensor)
                for start in range(0, max(1, len(data)), memory.capacity):
                    piece = data[start : start + memory.capacity]
                    while not memory.write(index, start, piece, replaces=session.replaces(index)):
                        await self._send(session, begun, memory)
                num_bytes += len(data)
            await self._send(session, begun, memory)
            is_settled = True
            session.num_bytes_staged += num_bytes
        finally:
            session.note_sent(sent, is_settled=is_settled)
            if is_settled:
                self._free.append(memory)
            else:
                memory.shared.close()  # the server may still read it: nothing else may be written there

    def close(self) -> None:
        """Give the memory back."""
        while (memory := self._kept()) is not None:
            memory.shared.close()

    def _last(self, session: UpdateSession) -> SessionBegun:
        if self._begun is None or self._begun.session_id != session.session_id:
            message = f"session {session.session_id} is not the one that this client has begun last"
            raise UpdateConflictError(message, field="session")
        return self._begun

    def _take(self, session: UpdateSession, begun: SessionBegun) -> UploadMemory:
        head_bytes = min(begun.max_body_bytes // 2, _HEAD_BYTES_PER_PIECE * MAX_PIECES)
        room = _whole(begun.max_body_bytes - head_bytes)
        wanted = min(BUFFER_BYTES, room, max(1, session.max_part_bytes))
        while (memory := self._kept()) is not None:
            if memory.pid == os.getpid() and wanted <= memory.capacity <= room:
                return memory
            memory.shared.close()
        try:
            return UploadMemory(aligned(wanted), head_bytes // _HEAD_BYTES_PER_PIECE - 2)
        except OSError as error:
            raise UnavailableError(f"no shared memory to send tensors in: {error}", field="named_tensors") from None

    def _kept(self) -> UploadMemory | None:
        """One that is free, for whichever thread comes first."""
        with contextlib.suppress(IndexError):
            return self._free.pop()
        return None

    async def _send(self, session: UpdateSession, begun: SessionBegun, memory: UploadMemory) -> None:
        """Have the server stage what the memory holds; it reads it no more when this returns."""
        if not memory.entries:
            return
        await self.announce(session)
        if await self._is_lent(begun, memory):
            _, number = memory.lent_to or (0, 0)
            ask: Any = StageLentAsk(begun.session_id, number, tuple(memory.entries))
            await self._ask("stage_lent", message_body(ask), MESSAGE_TYPE)
        else:
            await self._ask("stage", _stage_body(begun, memory), BYTES_TYPE)
        memory.clear()

    async def announce(self, session: UpdateSession) -> None:
        """Have checked what is staged and was not listed."""
        if not session.unannounced():
            return
        ask, first = ExtendAsk(session.session_id, session.unannounced()), None
        try:
            answer = await self._ask("extend_update", message_body(ask), MESSAGE_TYPE)
            first = msgspec.msgpack.decode(answer, type=int)
        finally:
            session.settle_announced(first)

    async def _is_lent(self, begun: SessionBegun, memory: UploadMemory) -> bool:
        """Whether the server reads this memory itself. One that cannot is not asked again in a session."""
        if not self._shares or self._refused_by == begun.token:
            return False
        if memory.lent_to is None or memory.lent_to[0] != begun.token:
            memory.sign(begun.token)
            ref = memory.shared.ref
            try:
                answer = await self._ask(
                    "lend", message_body(LendAsk(begun.session_id, ref.path, ref.size)), MESSAGE_TYPE
                )
            except RequestError as error:
                if error.field != "buffer":
                    raise
                self._refused_by = begun.token
                return False
            memory.lent_to = begun.token, msgspec.msgpack.decode(answer, type=int)
        return True


def _whole(num_bytes: int) -> int:
    """Rounded down, so that every piece ends with an element."""
    return num_bytes - num_bytes % aligned(1)


def _stage_body(begun: SessionBegun, memory: UploadMemory) -> bytes:
    pieces = [TensorPiece(each.index, each.start, each.num_bytes or 0, each.replaces) for each in memory.entries]
    head = message_body(StageHead(begun.session_id, tuple(pieces)))
    views = [memory.shared.part(each.offset, each.num_bytes or 0) for each in memory.entries]
    return b"".join([framed(head), *views])
