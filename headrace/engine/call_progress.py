"""How far the calls of `generate` are that run on one engine. Owns their counts, and when there is a bar: while calls
run that ask for one and have more than one sequence between them. Lives on the engine's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from headrace.telemetry import Progress, ProgressBar, can_draw


class _Count:
    """Of one call."""

    def __init__(self, num_all: int) -> None:
        self.num_all = num_all
        self.num_done = 0

    def add(self) -> None:
        self.num_done += 1


class CallProgress:
    """The bar of one engine; none, ever, unless it `is_wanted` and there is a terminal."""

    def __init__(self, *, is_wanted: bool) -> None:
        self._is_wanted = is_wanted
        self._calls: list[_Count] = []
        self._bar: ProgressBar | None = None

    @contextlib.asynccontextmanager
    async def counting(self, num_sequences: int, *, is_wanted: bool) -> AsyncIterator[Callable[[], None] | None]:
        """Inside, one call runs: what this gives is to be called once for each sequence that has ended; None: nobody
        wants to know. The bar is gone before the last call's caller hears of its end: he may write to the terminal."""
        if not (self._is_wanted and is_wanted and can_draw()):
            yield None
            return
        call = _Count(num_sequences)
        self._calls.append(call)
        if self._bar is None and self._read().total > 1:
            self._bar = ProgressBar(self._read)
        try:
            yield call.add
        finally:
            self._calls.remove(call)
            if not self._calls and self._bar is not None:
                bar, self._bar = self._bar, None
                await asyncio.get_running_loop().run_in_executor(None, bar.close)

    def _read(self) -> Progress:
        """Of any thread."""
        calls = tuple(self._calls)
        return Progress("generating", sum(call.num_done for call in calls), sum(call.num_all for call in calls))
