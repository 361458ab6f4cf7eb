"""Turns on the engine's loop. Owns how long one goes on before others have theirs, and in what order many consumers are
woken; knows not what they do."""

from __future__ import annotations

import asyncio
import time
from collections import deque

TURN_SECONDS = 0.003
MAX_WAKES_PER_TURN = 32


class Turn:
    """The time that a loop over very many has, from now. What one round of it costs is the caller's affair."""

    def __init__(self) -> None:
        self._end = time.perf_counter() + TURN_SECONDS

    @property
    def is_over(self) -> bool:
        """Others are to have their turn."""
        return time.perf_counter() > self._end

    async def give_way(self) -> None:
        """To be awaited before each round: let others have their turn when this loop has had its own."""
        if time.perf_counter() > self._end:
            await asyncio.sleep(0)
            self._end = time.perf_counter() + TURN_SECONDS


class Pacer:
    """Wakes waiting consumers in order, a few per turn of the loop.

    One step of the core is news for thousands of streams. Were all of them woken at once, everything else that the loop
    has to do (health, a pause) would wait until each has encoded and sent its piece. For use on one loop.
    """

    def __init__(self) -> None:
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._is_scheduled = False

    def wake(self, waiter: asyncio.Future[None]) -> None:
        """End the wait soon."""
        self._waiters.append(waiter)
        self._schedule(waiter)

    def _schedule(self, waiter: asyncio.Future[None]) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            waiter.get_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._is_scheduled = False
        for _ in range(min(MAX_WAKES_PER_TURN, len(self._waiters))):
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
        if self._waiters:
            self._schedule(self._waiters[0])
