"""How often what has died is started again, and after how long. Owns the arithmetic; the caller has the clock."""

from __future__ import annotations

from collections import deque

MAX_DELAY_SECONDS = 30.0


class RestartBudget:
    """So many restarts within a window of time. The first follows at once, each further one waits twice as long."""

    def __init__(self, max_restarts: int, window: float) -> None:
        self.max_restarts = max_restarts
        self.window = window
        self._taken: deque[float] = deque()

    def take(self, now: float) -> float | None:
        """Seconds to wait before the next restart; None when there is none left."""
        while self._taken and now - self._taken[0] >= self.window:
            self._taken.popleft()
        if len(self._taken) >= self.max_restarts:
            return None
        self._taken.append(now)
        num_before = len(self._taken) - 1
        return min(MAX_DELAY_SECONDS, 2.0 ** (num_before - 1)) if num_before else 0.0
