"""The buffers that carry tensors to a core, while they are filled. Owns what is in one, and who may write to it.

Knows nothing of the core, nor how many there are: that is `Updater`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque

from headrace.engine.tensors import TensorBytes
from headrace.ipc import SharedBuffer
from headrace.types.errors import UpdateConflictError
from headrace.types.weights import BufferEntry

_ALIGNMENT = 64


class UploadBuffer:
    """A shared buffer being filled with tensors and pieces of tensors."""

    def __init__(self, memory: SharedBuffer) -> None:
        self.memory = memory
        self.entries: list[BufferEntry] = []
        self._num_used = 0

    def write(self, index: int, start: int, data: TensorBytes, *, replaces: bool) -> bool:
        """Copy in what a tensor holds from its byte `start` on, if there is room for it. `WeightUpdateError` if it was
        freed or written to meanwhile."""
        offset = aligned(self._num_used)
        if offset + len(data) > self.memory.ref.size:
            return False
        data.copy_into(self.memory.view[offset : offset + len(data)])
        self.entries.append(BufferEntry(index, offset, start, len(data), replaces))
        self._num_used = offset + len(data)
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

    def check(self) -> None:
        """`UpdateConflictError`, as the core has it, once it is over."""
        if self.is_over:
            raise UpdateConflictError(f"session {self.session_id} is not open any more", field="session_id")


def aligned(offset: int) -> int:
    """The next offset at which a tensor may begin."""
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
