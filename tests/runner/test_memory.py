"""The arithmetic of a device's memory."""

from __future__ import annotations

import pytest

from headrace.runner.memory import MemoryPlan
from headrace.types.errors import ConfigError

PLAN = MemoryPlan(free_at_start=1000, taken=300, graphs=100, spare=50, fraction=0.9)
PAGE = 10


def test_a_pool_of_given_size_must_fit_in_all_that_is_free() -> None:
    assert PLAN.pages == 450
    PLAN.check(550, least=2 * PAGE)
    with pytest.raises(ConfigError) as caught:
        PLAN.check(551, least=2 * PAGE)
    assert caught.value.field == "kv_pool_tokens"


def test_a_measured_pool_holds_a_page_beside_page_0_or_there_is_none() -> None:
    PLAN.check(0, least=450)
    with pytest.raises(ConfigError, match="leaves no room") as caught:
        PLAN.check(0, least=451)
    assert caught.value.field == "memory_fraction"
