"""Finds adjacent rows of a plan that share leading pages, so that a backend may read those pages once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from headrace.types.request import Int32Array

NO_GROUPS: Int32Array = np.zeros((0, 3), dtype=np.int32)
NO_GROUPS.flags.writeable = False


def find_groups(
    pages: Int32Array, slots: npt.NDArray[np.int64], num_full: npt.NDArray[np.int64], max_shared: int
) -> Int32Array:
    """Groups of adjacent rows with equal leading pages, int32 [g, 3] of (first_row, num_rows, num_pages).

    `pages` [slots, columns] is the page table, `slots` [r] names the rows, `num_full` [r] is how many leading pages of
    each row are wholly behind its first position, and no two rows share more than `max_shared` pages.
    """
    if max_shared == 0:
        return NO_GROUPS
    first = pages[slots, 0]
    if not (first[1:] == first[:-1]).any():
        return NO_GROUPS
    leading = pages[slots, :max_shared]
    differs = leading[1:] != leading[:-1]
    shared = np.where(differs.any(axis=1), differs.argmax(axis=1), max_shared)
    shared = np.minimum(shared, np.minimum(num_full[1:], num_full[:-1]))
    return _group(shared)


def _group(shared: npt.NDArray[np.int64]) -> Int32Array:
    """Cut the rows where neighbours share nothing, or less than half of what a neighbour next to them shares.

    `shared` [r - 1] is the number of pages that row i shares with row i + 1.
    """
    beside = np.zeros(len(shared) + 2, dtype=np.int64)
    beside[1:-1] = shared
    cut = (shared == 0) | (2 * shared < np.maximum(beside[:-2], beside[2:]))
    ends = np.append(np.flatnonzero(cut), len(shared))
    begins = np.append(0, ends[:-1] + 1)
    groups = [
        (begin, end - begin + 1, shared[begin:end].min())
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)
        if end > begin
    ]
    return np.array(groups, dtype=np.int32) if groups else NO_GROUPS
