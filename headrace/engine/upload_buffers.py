"""The buffers that carry tensors to a core, while they are filled. Owns what is in one, and who may write to it.

One is shared memory of the host, or memory of the core's own device, for tensors that are there already: they never
leave it. Knows nothing of the core, nor how many buffers there are: that is `Updater`'s.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any, Protocol

from headrace.engine.memory_copy import Copy, CopyingThreads, CopyPart
from headrace.engine.tensors import TensorBytes
from headrace.ipc import SharedBuffer
from headrace.types.errors import UnavailableError, UpdateConflictError
from headrace.types.http import TensorPiece
from headrace.types.weights import BufferEntry, BufferRef, DeviceRef

NUM_BUFFERS = 2
_ALIGNMENT = 64

Fill = Callable[[memoryview], Awaitable[None]]
"""Writes the next bytes of somewhere to all of a view."""


class BufferMemory(Protocol):
    """Bytes that a core can read. `view` is of some of them, to be written at once; on a device that may go on until
    `flush`."""

    @property
    def ref(self) -> BufferRef | DeviceRef: ...

    def view(self, offset: int, size: int) -> Any: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class HostMemory:
    """Shared memory of the host."""

    def __init__(self, size: int) -> None:
        """Raises `OSError` when memory is short."""
        self._shared = SharedBuffer.create(size)
        self.ref: BufferRef = self._shared.ref

    def view(self, offset: int, size: int) -> memoryview:
        """These bytes, to be written."""
        return self._shared.part(offset, size)

    def flush(self) -> None:
        """They are there."""

    def close(self) -> None:
        """Give the memory back."""
        self._shared.close()


class BufferPool:
    """Buffers of one kind: at most NUM_BUFFERS, each as large as the largest update so far needs, up to a limit."""

    def __init__(self, make: Callable[[int], BufferMemory], max_bytes: int) -> None:
        """`make` gives memory of so many bytes."""
        self.max_bytes = max_bytes
        self._make = make
        self._free: list[UploadBuffer] = []
        self._num_buffers = 0
        self._max_buffers = NUM_BUFFERS
        self._buffer_bytes = 1

    @property
    def is_exhausted(self) -> bool:
        """Every buffer that may be is in use."""
        return not self._free and self._num_buffers >= self._max_buffers

    def fit(self, num_bytes: int) -> None:
        """Buffers hold so much from now on, if they did not before."""
        self._buffer_bytes = max(self._buffer_bytes, num_bytes)
        for buffer in [each for each in self._free if each.memory.ref.size < self._buffer_bytes]:
            self._free.remove(buffer)
            self._close(buffer)

    def take(self) -> UploadBuffer | None:
        """One that is free, or a new one; None: one of those in use has to be waited for, as there is no room for more.
        Raises what `make` does, if there is none in use."""
        if self._free:
            return self._free.pop()
        try:
            buffer = UploadBuffer(self._make(self._buffer_bytes), self)
        except (OSError, UnavailableError):
            if not self._num_buffers:
                raise
            self._max_buffers = self._num_buffers
            return None
        self._num_buffers += 1
        return buffer

    def give_back(self, buffer: UploadBuffer) -> None:
        """Nobody reads it any more."""
        buffer.memory.flush()  # where a call was cut off while it filled it
        buffer.clear()
        if buffer.memory.ref.size >= self._buffer_bytes:
            self._free.append(buffer)
        else:
            self._close(buffer)

    def close(self) -> None:
        """Give up those that are free."""
        while self._free:
            self._close(self._free.pop())

    def _close(self, buffer: UploadBuffer) -> None:
        self._num_buffers -= 1
        buffer.memory.close()


class UploadBuffer:
    """A shared buffer being filled with tensors and pieces of tensors."""

    def __init__(self, memory: BufferMemory, pool: BufferPool) -> None:
        self.memory = memory
        self.pool = pool
        self.entries: list[BufferEntry] = []
        self._size = memory.ref.size
        self._num_used = 0

    @property
    def ref(self) -> BufferRef | DeviceRef:
        """Its memory, for the core."""
        return self.memory.ref

    def write(self, index: int, start: int, data: TensorBytes, copy: Copy, *, replaces: bool) -> bool:
        """Copy in what a tensor holds from its byte `start` on, if there is room for it. `WeightUpdateError` if it was
        freed or written to meanwhile."""
        size, offset = len(data), aligned(self._num_used)
        if offset + size > self._size:
            return False
        data.copy_into(self.memory.view(offset, size), copy)
        self.entries.append(BufferEntry(index, offset, start, size, replaces))
        self._num_used = offset + size
        return True

    def place(self, num_bytes: int) -> Any:
        """Where the next entry's bytes go, or None if there is no room for them."""
        offset = aligned(self._num_used)
        return self.memory.view(offset, num_bytes) if offset + num_bytes <= self.memory.ref.size else None

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
    and a call whose session is over does: both then find that it is over. `threads` copy what the host holds."""

    def __init__(self, session_id: int, threads: CopyingThreads) -> None:
        self.session_id = session_id
        self.is_over = False
        self.uploads: list[asyncio.Task[None]] = []
        self._buffers: deque[UploadBuffer] = deque()  # one at most; whoever pops it owns it, in whatever thread
        self._borrowed: list[UploadBuffer] = []  # by the thread that makes the call
        self._threads = threads
        self._begun: list[CopyPart] = []
        self._read: list[TensorBytes] = []  # by what has begun

    def take(self) -> UploadBuffer | None:
        """Whoever gets the buffer owns it."""
        try:
            return self._buffers.pop()
        except IndexError:
            return None

    def put(self, buffer: UploadBuffer) -> None:
        """The buffer to be filled on."""
        self._buffers.append(buffer)

    def write(self, pool: BufferPool, index: int, start: int, data: TensorBytes, *, replaces: bool) -> bool:
        """Copy what a tensor holds from its byte `start` on, if there is a buffer of `pool` that has room for it: until
        `flush`, the tensor stays as it is."""
        buffer = self._borrow()
        if buffer is None:
            return False
        try:
            self._read.append(data)
            has_room = buffer.pool is pool and buffer.write(index, start, data, self._begin, replaces=replaces)
        finally:
            self._put_back()
        self.check()  # after that: it may have been ended while the buffer was not here
        return has_room

    def flush(self) -> None:
        """What was written is there when this returns; to be called where it was written, before an upload of it."""
        self.settle()
        buffer = self._borrow()
        if buffer is not None:
            try:
                buffer.memory.flush()
            finally:
                self._put_back()

    def settle(self) -> None:
        """Nothing of the host is read any more when this returns, or raises what it was interrupted by."""
        try:
            self._threads.settle(self._begun)
        finally:
            self._threads.settle(self._begun)
        self._read.clear()

    def leave(self) -> None:
        """The call is over, wherever it was interrupted: it reads nothing, and has no buffer."""
        try:
            self.settle()
        finally:
            self._put_back()

    def _borrow(self) -> UploadBuffer | None:
        """The buffer, for the thread that makes the call. It may be interrupted between any two calls, but not inside
        of one that runs no Python: so the buffer is always in one of the two lists."""
        try:
            self._borrowed.extend(map(deque.pop, (self._buffers,)))
        except IndexError:
            return None
        return self._borrowed[-1]

    def _put_back(self) -> None:
        while self._borrowed:
            self._buffers.extend(map(list.pop, (self._borrowed,)))

    def _begin(self, into: int, source: int, size: int) -> None:
        self._threads.begin(self._begun, into, source, size)

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

    async def call_off(self) -> None:
        """Give up the uploads of a call that is over."""
        pending = [upload for upload in self.uploads if upload.cancel()]
        if pending:
            await asyncio.wait(pending)

    async def drain(self) -> None:
        """Wait for the uploads. Raises as `raise_failures`."""
        if self.uploads:
            await asyncio.wait(self.uploads)
        self.raise_failures()

    def raise_failures(self) -> None:
        """Raise the first error among the uploads, and as `check`."""
        for upload in self.uploads:
            error = upload.exception() if upload.done() and not upload.cancelled() else None
            if error is not None:
                raise error
        self.check()

    def check(self) -> None:
        """`UpdateConflictError`, as the core has it, once it is over."""
        if self.is_over:
            raise UpdateConflictError(f"session {self.session_id} is not open any more", field="session_id")


def aligned(offset: int) -> int:
    """The next offset at which a tensor may begin."""
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def in_parts(pieces: Iterable[TensorPiece], max_bytes: int) -> Iterator[TensorPiece]:
    """The same bytes in pieces of at most `max_bytes`."""
    for piece in pieces:
        for start in range(0, max(1, piece.num_bytes), max_bytes):
            num_bytes = min(max_bytes, piece.num_bytes - start)
            yield TensorPiece(piece.index, piece.start + start, num_bytes, piece.replaces)
