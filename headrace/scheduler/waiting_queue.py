"""The queue of requests that never held a slot. Owns their order only.

Higher priority first, then by the second in which they came. Of one second, those that may generate most come first, so
that a batch does not end with its longest one started last (longest processing time first; Graham,
SIAM Journal on Applied Mathematics, 1969); requests of one prompt stay together at the place of the first of them, so
that rows sharing pages are neighbours; and what may generate equally much is first come, first served.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import takewhile
from typing import NamedTuple

from headrace.scheduler.sequence import Sequence

WINDOW_S = 1.0
"""Nobody is overtaken by one who came later than this."""

_MIN_STALE = 64


class _SortKey(NamedTuple):
    """Sorts requests; `number` counts arrivals, `group_number` is that of the first request of the same prompt."""

    minus_priority: int
    window: int
    minus_longest: int
    group_number: int
    number: int


@dataclass
class _Group:
    """Waiting requests of one prompt that came in one second; `name` says what is the same of them."""

    name: tuple[int, int, str, bytes]
    first: _SortKey
    count: int = 0


class _Entry(NamedTuple):
    """A waiting request and its place."""

    sequence: Sequence
    key: _SortKey
    group: _Group


class WaitingQueue:
    """Every operation costs at most the logarithm of the number of waiting requests, on average."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}  # by handle, as they came
        self._groups: dict[tuple[int, int, str, bytes], _Group] = {}
        self._heap: list[tuple[_SortKey, int]] = []  # with some that have left
        self._num_arrived = 0

    def __len__(self) -> int:
        return len(self._entries)

    def push(self, sequence: Sequence) -> None:
        request, window = sequence.request, int(sequence.arrived // WINDOW_S)
        own = _SortKey(-request.priority, window, -request.max_new_tokens, self._num_arrived, self._num_arrived)
        name = (request.priority, window, request.extra_key, sequence.units)
        group = self._groups.setdefault(name, _Group(name, own))
        group.count += 1
        key = group.first._replace(number=self._num_arrived)
        self._num_arrived += 1
        self._entries[sequence.handle] = _Entry(sequence, key, group)
        heappush(self._heap, (key, sequence.handle))

    def first(self) -> Sequence | None:
        """The next to be admitted, left in place."""
        while self._heap:
            key, handle = self._heap[0]
            entry = self._entries.get(handle)
            if entry is not None and entry.key == key:
                return entry.sequence
            heappop(self._heap)
        return None

    def remove(self, sequence: Sequence) -> None:
        """Take a queued sequence out, wherever it stands."""
        group = self._entries.pop(sequence.handle).group
        group.count -= 1
        if not group.count:
            del self._groups[group.name]
        if len(self._heap) > 2 * len(self._entries) + _MIN_STALE:
            self._heap = [(entry.key, handle) for handle, entry in self._entries.items()]
            heapify(self._heap)

    def arrived_before(self, moment: float) -> list[Sequence]:
        """Those that arrived before `moment`, as they came; looks no further than the first younger one."""
        sequences = (entry.sequence for entry in self._entries.values())
        return list(takewhile(lambda sequence: sequence.arrived < moment, sequences))
