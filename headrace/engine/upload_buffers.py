"""The buffers that carry tensors to a core, while they are filled. Owns what is in one, and who may write to it.

Knows nothing of the core, nor how many there are: that is `Updater`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable

from headrace.engine.tensors import TensorBytes
from headrace.ipc import SharedBuffer
from headrace.types.errors import UpdateConflictError
from headrace.types.http import TensorPiece
from headrace.types.weights import BufferEntry

_ALIGNMENT = 64

Fill = Callable[[memoryview], Awaitable[None]]
"""Writes the next bytes of somewhere to all of a view."""


class UploadBuffer:
    """A shared buffer being filled with tensors and pieces of tensors."""

    def __init__(self, memory: SharedBuffer) -> None:
        self.memory = memory
        self.entries: list[BufferEntry] = []
        self._num_used = 0

    def write(self, index: int, start: int, data: TensorBytes, *, replaces: bool) -> bool:
        """Copy in what a tensor holds from its byte `start` on, if there is room for it. `WeightUpdateError` if it was
        freed or written to meanwhile."""
        view = self.place(len(data))
        if view is None:
            return False
        data.copy_into(view)
        self.add(BufferEntry(index, aligned(self._num_used), start, len(data), replaces))
        return True

    def place(self, num_bytes: int) -> memoryview | None:
        """Where the next entry's bytes go, if there is room for them."""
        offset = aligned(self._num_used)
        return self.memory.view[offset : offset + num_bytes] if offset + num_bytes <= self.memory.ref.size else None

    def add(self, entry: BufferEntry) -> None:
        """The bytes are in place."""
        self.entries.append(entry)
        self._num_used = entry.offset + (entry.num_bytes or 0)

    async def fill(self, piece: TensorPiece, fill: Fill) -> bool:
        """As `write`, of bytes that `fill` brings."""
        view = self.place(piece.num_bytes)
        if view is None:
            return False
        await fill(view)
        self.add(BufferEntry(piece.index, aligned(self._num_used), piece.start, piece.num_bytes, piece.replaces))
        return True

    def clear(self) -> None:
        """Forget the contents: the buffer may be filled again."""
        self.entries = []
        self._num_used = 0


class Filling:
    """The buffer that one `stage` call fills, until it is an upload. A part of a call that was cancelled may still run,
    and a call whose session is over does: both then find that it is over."""

    def __init__(self, session_id: int) -> None:
        self.session_id = session_id
        self.is_over = False
        self.uploads: list[asyncio.Task[None]] = []
        self._buffers: deque[UploadBuffer] = deque()  # one at most; whoever pops it owns it, in whatever thread

    def take(self) -> UploadBuffer | None:
        """Whoever gets the buffer owns it."""
        with contextlib.suppress(IndexError):
            return self._buffers.pop()
        return None

    def put(self, buffer: UploadBuffer) -> None:
        """The buffer to be filled on."""
        self._buffers.append(buffer)

    def write(self, index: int, start: int, data: TensorBytes, *, replaces: bool) -> bool:
        """Copy what a tensor holds from its byte `start` on, if there is a buffer that has room for it."""
        buffer = self.take()
        if buffer is None:
            return False
        try:
            has_room = buffer.write(index, start, data, replaces=replaces)
        finally:
            self.put(buffer)
        self.check()  # after that: it may have been ended while the buffer was not here
        return has_room

    async def fill(self, piece: TensorPiece, fill: Fill) -> bool:
        """As `write`, of bytes that `fill` brings."""
        buffer = self.take()
        if buffer is None:
            return False
        try:
            has_room = await buffer.fill(piece, fill)
        finally:
            self.put(buffer)
        self.check()
        return has_room

    def check(self) -> None:
        """`UpdateConflictError`, as the core has it, once it is over."""
        if self.is_over:
            raise UpdateConflictError(f"session {self.session_id} is not open any more", field="session_id")


def aligned(offset: int) -> int:
    """The next offset at which a tensor may begin."""
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
