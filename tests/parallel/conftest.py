"""Processes of ranks, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parallel.pool import RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    found = RankPool(max_ranks=4)
    yield found
    found.close()
