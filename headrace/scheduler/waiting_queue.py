"""The queue of requests that never held a slot. Owns their order only.

Higher priority first, then by the second in which they came. Of one second, those that may generate most come first, so
that a batch does not end with its longest one started last (longest processing time first; Graham,
SIAM Journal on Applied Mathematics, 1969); requests of one prompt stay together at the place of the longest of them, so
that rows sharing pages are neighbours; and what may generate equally much is first come, first served.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import takewhile
from operator import attrgetter
from typing import NamedTuple

from headrace.scheduler.sequence import Sequence

WINDOW_S = 1.0
"""Nobody is overtaken by one who came later than this."""

Band = tuple[int, int]
"""Those of a priority, negated, that came in one second."""


def band_of(sequence: Sequence) -> Band:
    """Lower ones come first."""
    return -sequence.request.priority, int(sequence.arrived // WINDOW_S)


class _Place(NamedTuple):
    """Of one that may generate so much, negated; `number` counts arrivals."""

    minus_longest: int
    number: int


class _Group:
    """Waiting requests of one prompt and one band; `name` says what is the same of them. Its place is that of the
    longest that it has had."""

    def __init__(self, name: tuple[Band, str, bytes], place: _Place) -> None:
        self.name, self.place = name, place
        self.members: list[tuple[_Place, int]] = []  # in order, with their handles


class _Entry(NamedTuple):
    """A waiting request, where it is among its group, and that."""

    sequence: Sequence
    place: _Place
    group: _Group


_PLACE = attrgetter("place")


class WaitingQueue:
    """Every operation looks at about the logarithm of the number of waiting requests."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}  # by handle, as they came
        self._groups: dict[tuple[Band, str, bytes], _Group] = {}
        self._bands: dict[Band, list[_Group]] = {}  # each in order
        self._heap: list[Band] = []  # with some that are empty by now
        self.num_arrived = 0

    def __len__(self) -> int:
        return len(self._entries)

    def push(self, sequence: Sequence) -> None:
        request = sequence.request
        place = _Place(-request.max_new_tokens, self.num_arrived)
        self.num_arrived += 1
        band = band_of(sequence)
        if band not in self._bands:
            self._bands[band] = []
            heappush(self._heap, band)
        groups, name = self._bands[band], (band, request.extra_key, sequence.units)
        group = self._groups.get(name)
        if group is None:
            group = self._groups[name] = _Group(name, place)
            insort(groups, group, key=_PLACE)
        elif place < group.place:
            del groups[bisect_left(groups, group.place, key=_PLACE)]
            group.place = place
            insort(groups, group, key=_PLACE)
        insort(group.members, (place, sequence.handle))
        self._entries[sequence.handle] = _Entry(sequence, place, group)

    def first(self) -> Sequence | None:
        """The next to be admitted, left in place."""
        return next(self.first_band(), None)

    def first_band(self) -> Iterator[Sequence]:
        """The next to be admitted, and those that came in the same second with its priority, in order. The queue must
        not change meanwhile."""
        while self._heap and self._heap[0] not in self._bands:
            heappop(self._heap)
        for group in self._bands[self._heap[0]] if self._heap else ():
            for _, handle in group.members:
                yield self._entries[handle].sequence

    def remove(self, sequence: Sequence) -> None:
        """Take a queued sequence out, wherever it stands."""
        entry = self._entries.pop(sequence.handle)
        group = entry.group
        del group.members[bisect_left(group.members, (entry.place, sequence.handle))]
        if group.members:
            return
        band = group.name[0]
        groups = self._bands[band]
        del groups[bisect_left(groups, group.place, key=_PLACE)], self._groups[group.name]
        if not groups:
            del self._bands[band]

    def arrived_before(self, moment: float) -> list[Sequence]:
        """Those that arrived before `moment`, as they came; looks no further than the first younger one."""
        sequences = (entry.sequence for entry in self._entries.values())
        return list(takewhile(lambda sequence: sequence.arrived < moment, sequences))
