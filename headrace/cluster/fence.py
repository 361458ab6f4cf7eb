"""Which weights are current, and which replicas have them. Decided on plain values, without clock or I/O.

A fence is passed when an update that went to all replicas has returned: from then on only those replicas may be chosen
that hold its weights. Labels may repeat, so a label alone proves nothing unless no weights before had it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

NO_WEIGHTS = -1
_NUM_PAST_LABELS = 4096


class Fence:
    """The last update that has returned. Before the first one, number 0, whatever a replica holds is current."""

    def __init__(self) -> None:
        self.number = 0
        self.version: str | None = None
        """Its label; None before the first, and where nobody said it."""
        self._is_telling = False
        self._past: deque[str] = deque(maxlen=_NUM_PAST_LABELS)

    def advance(self, version: str | None, labels_before: Collection[str | None]) -> None:
        """The next update has returned. `labels_before` are those that replicas had before it."""
        before = {*self._past, *labels_before, self.version} - {None}
        self._is_telling = version is not None and version not in before
        self._past.extend(label for label in before if label is not None and label not in self._past)
        self.number += 1
        self.version = version

    def admits(self, held: int) -> bool:
        """Whether a replica that holds the weights of update `held` is current."""
        return held == self.number or self.number == 0

    def held_by_label(self, version: str | None) -> int:
        """The update whose weights a replica holds, by their label alone."""
        return self.number if self._is_telling and version == self.version else NO_WEIGHTS
