"""How long things took, counted by size. Owns a histogram's counts; knows nothing of Prometheus, which renders them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class DurationHistogram:
    """Observed values by the smallest bound that they do not exceed. For use on one loop."""

    def __init__(self, name: str, help: str, bounds: Sequence[float]) -> None:
        self.name = name
        self.help = help
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)  # the last one: over all bounds
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """`value` was seen so many times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times
