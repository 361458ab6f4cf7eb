"""A block of a CPU's memory that can be given back to the system while its address stays. Owns the mapping; knows no
tags."""

from __future__ import annotations

import contextlib
import mmap

import torch


class HostBlock:
    """Zeros that the system provides on first touch, page-aligned, in huge pages where it has them.

    A pool is sized for the worst case and mostly never touched; huge pages spare most of the address translations of
    reading it. The mapping is private: given back, its pages are the system's, and the next touch finds zeros. It ends
    with the last tensor over it. Raises `OSError` or `OverflowError` where the system has not as much.
    """

    def __init__(self, num_bytes: int) -> None:
        self._mapping = mmap.mmap(-1, max(1, num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel built without them
                self._mapping.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = torch.frombuffer(self._mapping, dtype=torch.uint8)

    def release(self) -> None:
        """Give the memory back. Idempotent."""
        self._mapping.madvise(mmap.MADV_DONTNEED)

    def resume(self) -> None:
        """Nothing is to be done: the next touch brings it."""
