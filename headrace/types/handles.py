"""Handles: the integers by which a front and a core speak of a request. Each names its front, so that several fronts
may share a core: no front makes a handle of another, and the core lets none touch another's requests.

A front is given its number when it is linked; it counts its requests in the low bits.
"""

from __future__ import annotations

from collections.abc import Iterable

_COUNT_BITS = 48


def handle_of(front: int, count: int) -> int:
    """The handle of a front's request number `count`; of a handle, the one with the same count."""
    return front << _COUNT_BITS | count & (1 << _COUNT_BITS) - 1


def front_of(handle: int) -> int:
    return handle >> _COUNT_BITS


def own_handles(handles: Iterable[int], front: int) -> list[int]:
    """Those of `handles` that are of this front."""
    return [handle for handle in handles if front_of(handle) == front]
