"""Long loops on the event loop. Owns how long one goes on before others have their turn; knows not what it does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from typing import TypeVar

TURN_SECONDS = 0.003
_ITEMS_PER_LOOK = 16

Item = TypeVar("Item")


async def in_turns(items: Iterable[Item]) -> AsyncIterator[Item]:
    """`items`, with a turn for others whenever these have had theirs. What one item costs is the caller's affair."""
    end = time.perf_counter() + TURN_SECONDS
    for number, item in enumerate(items, 1):
        yield item
        if number % _ITEMS_PER_LOOK == 0 and time.perf_counter() > end:
            await asyncio.sleep(0)
            end = time.perf_counter() + TURN_SECONDS
