"""Rewards that a trainer gives to samples, for those who look: a method of `AsyncEngine`. Owns their checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from headrace.engine.fields import name_of
from headrace.telemetry import Rewards
from headrace.types.errors import RequestError
from headrace.types.plain_values import as_list, as_number

if TYPE_CHECKING:
    from headrace.engine.async_engine import AsyncEngine

MAX_REWARDS = 1 << 16
"""Of one call."""


async def give_rewards(self: AsyncEngine, rewards: Rewards) -> int:
    """Tell what samples were worth, for `/dashboard`: by request id a number, or a list of one for each sample by its
    index (None: it has none). Over HTTP each sample has an id of its own, which its reply names. The engine does
    nothing with them; it remembers the last samples only, and returns how many of these rewards are of such."""
    return self.runtime.lookback.note_rewards(checked_rewards(rewards))


def checked_rewards(rewards: Any) -> dict[str, float | list[float | None]]:
    """Rewards as finite numbers. Raises `RequestError` naming the field."""
    if not isinstance(rewards, Mapping):
        raise RequestError("rewards must be numbers, or lists of them, by request id", field="rewards")
    if len(rewards) > MAX_REWARDS:
        raise RequestError(f"rewards has {len(rewards)} request ids, over {MAX_REWARDS}", field="rewards")
    found: dict[str, float | list[float | None]] = {}
    num_left = MAX_REWARDS
    for request_id, given in rewards.items():
        name = name_of(request_id, "rewards")
        field = f"rewards[{ascii(name[:64])}]"
        if not _is_listed(given):
            found[name] = as_number(given, field)
            continue
        each = as_list(given, field, "a list of numbers", num_left)
        found[name] = [None if reward is None else as_number(reward, field) for reward in each]
        num_left -= len(each)
    return found


def _is_listed(given: Any) -> bool:
    return isinstance(given, (list, tuple)) or getattr(given, "ndim", 0) == 1
