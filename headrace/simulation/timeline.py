"""Simulated time: what happens when, in order. Owns the clock; knows nothing of what happens."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

from headrace.types.errors import InternalError


class Timeline:
    """Events by time; of one moment in the order in which they were planned."""

    def __init__(self) -> None:
        self.now = 0.0
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def after(self, seconds: float, happen: Callable[[], None]) -> None:
        """Call `happen` so much later."""
        self.at(self.now + seconds, happen)

    def at(self, time: float, happen: Callable[[], None]) -> None:
        """Call `happen` at that time, which is not over."""
        assert time >= self.now, "what is over does not come again"
        heapq.heappush(self._events, (time, next(self._order), happen))

    def run_until(self, is_over: Callable[[], bool]) -> None:
        """Let everything happen until it is over."""
        while not is_over():
            if not self._events:
                raise InternalError("the simulation stands still: nothing is going to happen")
            self.now, _, happen = heapq.heappop(self._events)
            happen()
