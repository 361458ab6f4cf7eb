"""The pool of KV pages. Owns which page ids are free and how many holders each other page has.

A page is held by leases (one reference each) and by the radix tree (one). It is freed in one place, `release`, when
the last reference goes. The pool knows neither tokens nor sequences.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

PageIds = npt.NDArray[np.int32]


class PagePool:
    """Page ids 1..num_pages-1; page 0 is reserved for padding and never handed out."""

    def __init__(self, num_pages: int) -> None:
        assert num_pages >= 2, "a pool needs page 0 and at least one page to lease"
        self.num_pages = num_pages
        self.num_free = num_pages - 1
        self._references = np.zeros(num_pages, dtype=np.int32)
        self._free = np.arange(num_pages - 1, 0, -1, dtype=np.int32)

    def allocate(self, num_pages: int) -> PageIds:
        """Take free pages, int32 [num_pages], with one reference each. The caller has checked `num_free`."""
        assert num_pages <= self.num_free, f"{num_pages} pages wanted, {self.num_free} free"
        self.num_free -= num_pages
        pages = self._free[self.num_free : self.num_free + num_pages][::-1].copy()
        self._references[pages] = 1
        return pages

    def retain(self, pages: PageIds) -> None:
        """Add one reference to each of these held pages (no id twice)."""
        self._references[pages] += 1

    def release(self, pages: PageIds) -> int:
        """Drop one reference from each of these pages (no id twice); pages without any are free. Returns how many."""
        left = self._references[pages] - 1
        assert not len(left) or left.min() >= 0, "a page was released more often than held"
        self._references[pages] = left
        freed = pages[left == 0]
        self._free[self.num_free : self.num_free + len(freed)] = freed
        self.num_free += len(freed)
        return len(freed)
