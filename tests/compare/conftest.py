"""Processes of these tests."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def warm(warm_processes: None) -> None:
    """Processes that these tests start are warm."""
