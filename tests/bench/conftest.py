"""Processes of these tests."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def warm(warm_processes: None) -> None:
    """Processes that these tests start are warm."""


@pytest.fixture(scope="module", autouse=True)
def frozen_imports() -> Iterator[None]:
    """A benchmark in this process thaws what the collector is not to walk."""
    yield
    gc.collect()
    gc.freeze()
