"""The experts of one sequence's tokens as they come in, step by step. Owns which positions are known and delivered."""

from __future__ import annotations

import numpy as np

from headrace.types.plan import RoutedRow
from headrace.types.request import Int16Array, RoutedPart


class RoutedPositions:
    """Positions `start`.. in a row, up to `end`.

    A sequence that enters a slot again is told of all again. While nothing is sampled the last word counts, so that a
    prompt has those of the weights that its first token comes of; then the first does, by which the next token came.
    """

    def __init__(self, start: int) -> None:
        self.start = self.end = self._delivered = start
        self._experts: Int16Array | None = None

    def add(self, row: RoutedRow, *, replaces: bool) -> None:
        """Take a step's; `replaces`: the last word counts."""
        assert row.first <= self.end, "positions were skipped"
        end, first = row.first + len(row.experts), row.first if replaces else self.end
        experts = self._with_room(end - self.start, row.experts)
        if end > first:
            experts[first - self.start : end - self.start] = row.experts[first - row.first :]
            self.end = end

    def take(self, until: int) -> RoutedPart:
        """What is known and was not delivered of the positions before `until`; of none it has the shape at least, once
        anything was told."""
        if self._experts is None:
            return RoutedPart()
        first, last = self._delivered, max(self._delivered, min(until, self.end))
        self._delivered = last
        _, num_layers, num_per_token = self._experts.shape
        part = self._experts[first - self.start : last - self.start]
        return RoutedPart(num_layers, num_per_token, part.astype("<i2", copy=False).tobytes())

    def _with_room(self, num_positions: int, like: Int16Array) -> Int16Array:
        known = np.zeros((0, *like.shape[1:]), np.int16) if self._experts is None else self._experts
        if num_positions > len(known):
            num_more = max(num_positions, 2 * len(known), 64) - len(known)
            known = np.concatenate((known, np.zeros((num_more, *like.shape[1:]), np.int16)))
        self._experts = known
        return known
