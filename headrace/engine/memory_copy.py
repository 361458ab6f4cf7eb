"""Copies between addresses of this process. Owns the threads that share the large ones: one moves some 5 GB a second,
and a device takes in ten times that. Whoever names an address holds its memory until the copy is done.

Who copies may be interrupted anywhere, by a signal whose handler raises, and the handler may end the engine. So a part
is in its owner's list before a thread can see it, nothing here holds a lock of Python's, and a wait may begin anew.
"""

from __future__ import annotations

import ctypes
import queue
import time
from collections.abc import Callable

from headrace.config.machine import available_cores
from headrace.ipc.own_threads import OwnThreads

PART_BYTES = 2 << 20
"""What is worth a thread."""

MAX_THREADS = 12
_LOOK_S = 0.0001
_END_S = 5.0

Copy = Callable[[int, int, int], None]
"""To an address, from an address, so many bytes. Other threads of Python run meanwhile."""


def address_of(view: memoryview) -> int:
    """Where the first byte of writable memory is."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def copy_memory(into: int, source: int, size: int) -> None:
    """A `Copy` in this thread, done when it returns."""
    ctypes.memmove(into, source, size)


class CopyPart:
    """A part of a copy, which one thread does once, however often it is handed out."""

    def __init__(self, into: int, source: int, size: int) -> None:
        self.is_done = False
        self._place = into, source, size
        self._claims = [True]

    def run(self) -> None:
        """Copy it, if nobody has begun to."""
        try:
            self._claims.pop()
        except IndexError:
            return
        self.run_again()

    def run_again(self) -> None:
        """Copy it, whoever has begun to: nobody is at it any more."""
        copy_memory(*self._place)
        self.is_done = True


class CopyingThreads:
    """Threads that copy, from `start` to `close`. Only what begins between them is copied by several."""

    def __init__(self) -> None:
        self._num_threads = min(MAX_THREADS, available_cores() * 3 // 4)
        self._parts: queue.SimpleQueue[CopyPart | None] = queue.SimpleQueue()
        self._threads = OwnThreads()
        self._has_started = self._has_ended = False

    def start(self) -> None:
        """Idempotent. Not for a thread that may be interrupted."""
        if self._num_threads > 1 and not self._has_started and not self._has_ended:
            self._has_started = True
            for _ in range(self._num_threads):
                self._threads.start("headrace-copy", self._run)

    def begin(self, begun: list[CopyPart], into: int, source: int, size: int) -> None:
        """Begin a copy. What is not done when this returns is in `begun`, also where it is interrupted: `settle` waits
        for it."""
        count = min(self._num_threads, size // PART_BYTES) if self._has_started else 0
        if count < 2:
            copy_memory(into, source, size)
            return
        step = -(-size // count)
        for start in range(0, size, step):
            part = CopyPart(into + start, source + start, min(step, size - start))
            begun.append(part)
            self._parts.put(part)

    def settle(self, begun: list[CopyPart]) -> None:
        """Wait for all of these, of which none is in the list then."""
        for part in tuple(begun):
            if not part.is_done:
                self._parts.put(part)  # once more: who began it may have been interrupted before
        while not all(part.is_done for part in tuple(begun)):
            for part in tuple(begun) if self._has_ended else ():
                part.run_again()
            time.sleep(_LOOK_S)
        begun.clear()

    def close(self) -> None:
        """End the threads, which do what was begun first. Idempotent."""
        if self._has_started:
            self._has_started = False
            for _ in range(self._num_threads):
                self._parts.put(None)
            self._threads.join(_END_S)
            self._has_ended = True

    def _run(self) -> None:
        while (part := self._parts.get()) is not None:
            part.run()
