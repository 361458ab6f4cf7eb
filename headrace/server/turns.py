"""Long loops on the event loop. Owns how long one goes on before others have their turn; knows not what it does."""

from __future__ import annotations

import asyncio
import time

TURN_SECONDS = 0.003


class Turn:
    """The time that a loop has, from now. What one round of it costs is the caller's affair."""

    def __init__(self) -> None:
        self._end = time.perf_counter() + TURN_SECONDS

    async def give_way(self) -> None:
        """To be awaited before each round: let others have their turn when this loop has had its own."""
        if time.perf_counter() > self._end:
            await asyncio.sleep(0)
            self._end = time.perf_counter() + TURN_SECONDS
