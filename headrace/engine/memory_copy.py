"""Copies between addresses of this process. Owns the threads that share the large ones: one moves some 5 GB a second,
and a device takes in ten times that. Whoever names an address holds its memory until the copy is done.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait

PART_BYTES = 2 << 20
"""What is worth a thread."""

MAX_THREADS = 12

Copy = Callable[[int, int, int], None]
"""To an address, from an address, so many bytes; done when it returns. Other threads of Python run meanwhile."""


def address_of(view: memoryview) -> int:
    """Where the first byte of writable memory is."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def copy_memory(into: int, source: int, size: int) -> None:
    """A `Copy` in this thread."""
    ctypes.memmove(into, source, size)


class CopyingThreads:
    """Threads that are kept from the first large copy on."""

    def __init__(self) -> None:
        self._num_threads = min(MAX_THREADS, _num_cores() * 3 // 4)
        self._threads: ThreadPoolExecutor | None = None

    def copy(self, into: int, source: int, size: int) -> None:
        """A `Copy`."""
        settle(self.begin(into, source, size))

    def begin(self, into: int, source: int, size: int) -> list[Future[None]]:
        """As `copy`, done once `settle` has waited for these: other copies may begin meanwhile."""
        count = min(self._num_threads, size // PART_BYTES)
        if count < 2:
            copy_memory(into, source, size)
            return []
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="headrace-copy")
        part = -(-size // count)
        return [
            self._threads.submit(copy_memory, into + start, source + start, min(part, size - start))
            for start in range(0, size, part)
        ]

    def close(self) -> None:
        """End the threads."""
        if self._threads is not None:
            self._threads.shutdown(wait=False)
        self._threads = None


def settle(copies: Collection[Future[None]]) -> None:
    """Wait for copies that have begun."""
    try:
        wait(copies)
    finally:  # also where the caller is interrupted: what is being copied must stay
        wait(copies)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
