"""Processes of these tests."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def warm(warm_processes: None) -> None:
    """For those who ask, processes that they start are warm."""
