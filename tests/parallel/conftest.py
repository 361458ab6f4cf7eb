"""Processes of ranks, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.parallel.pool import RankPool
from tests.warm import warm_starts


@pytest.fixture(scope="session")
def pool(template: Any) -> Iterator[RankPool]:
    with warm_starts(template):
        found = RankPool(max_ranks=4)
    yield found
    found.close()
