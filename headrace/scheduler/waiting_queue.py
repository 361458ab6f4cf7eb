"""The queue of requests that never held a slot: higher priority first, then first come. Owns their order only."""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict

from headrace.scheduler.sequence import Sequence


class WaitingQueue:
    """One first-come line per priority; every operation costs O(1) in the number of waiting requests."""

    def __init__(self) -> None:
        self._lines: dict[int, OrderedDict[int, Sequence]] = {}
        self._order: list[int] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, sequence: Sequence) -> None:
        """Enter at the end of the line of its priority."""
        key = -sequence.request.priority
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = OrderedDict()
            insort(self._order, key)
        line[sequence.handle] = sequence
        self._count += 1

    def first(self) -> Sequence | None:
        """The next to be admitted, left in place."""
        return next(iter(self._lines[self._order[0]].values())) if self._order else None

    def remove(self, sequence: Sequence) -> None:
        """Take a queued sequence out, wherever it stands."""
        key = -sequence.request.priority
        line = self._lines[key]
        del line[sequence.handle]
        self._count -= 1
        if not line:
            del self._lines[key]
            self._order.remove(key)

    def arrived_before(self, moment: float) -> list[Sequence]:
        """Those that arrived before `moment`; looks no further into a line than its first younger one."""
        found = []
        for key in self._order:
            for sequence in self._lines[key].values():
                if sequence.arrived >= moment:
                    break
                found.append(sequence)
        return found
