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
    """Waiting requests of one prompt that came in one second."""

    first: _SortKey
    count: int = 0


class WaitingQueue:
    """Every operation costs at most the logarithm of the number of waiting requests, on average."""

    def __init__(self) -> None:
        self._sequences: dict[int, Sequence] = {}  # by handle, as they came
        self._keys: dict[int, _SortKey] = {}
        self._groups: dict[tuple[int, int, str, bytes], _Group] = {}
        self._heap: list[tuple[_SortKey, int]] = []  # with some that have left
        self._num_arrived = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def push(self, sequence: Sequence) -> None:
        request, window = sequence.request, int(sequence.arrived // WINDOW_S)
        own = _SortKey(-request.priority, window, -request.max_new_tokens, self._num_arrived, self._num_arrived)
        group = self._groups.setdefault(_group_key(sequence), _Group(own))
        group.count += 1
        key = group.first._replace(number=self._num_arrived)
        self._num_arrived += 1
        self._sequences[sequence.handle] = sequence
        self._keys[sequence.handle] = key
        heappush(self._heap, (key, sequence.handle))

    def first(self) -> Sequence | None:
        """The next to be admitted, left in place."""
        while self._heap:
            key, handle = self._heap[0]
            if self._keys.get(handle) == key:
                return self._sequences[handle]
            heappop(self._heap)
        return None

    def remove(self, sequence: Sequence) -> None:
        """Take a queued sequence out, wherever it stands."""
        del self._sequences[sequence.handle], self._keys[sequence.handle]
        group = self._groups[_group_key(sequence)]
        group.count -= 1
        if not group.count:
            del self._groups[_group_key(sequence)]
        if len(self._heap) > 2 * len(self._sequences) + _MIN_STALE:
            self._heap = [(key, handle) for handle, key in self._keys.items()]
            heapify(self._heap)

    def arrived_before(self, moment: float) -> list[Sequence]:
        """Those that arrived before `moment`, as they came; looks no further than the first younger one."""
        return list(takewhile(lambda sequence: sequence.arrived < moment, self._sequences.values()))


def _group_key(sequence: Sequence) -> tuple[int, int, str, bytes]:
    request = sequence.request
    return request.priority, int(sequence.arrived // WINDOW_S), request.extra_key, sequence.units
