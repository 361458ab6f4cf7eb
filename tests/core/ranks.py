"""Executors of two ranks for tests: this process is the first, the second is a child."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.config import EngineConfig, resolve
from headrace.core.rank_executor import RankExecutor
from headrace.core.rank_start import start_ranks
from headrace.runner import build_runner


def start_two(folder: Path, settings: Mapping[str, Any]) -> RankExecutor:
    """Both ranks of a model."""
    resolved = resolve(EngineConfig(model=str(folder), tp_size=2, **settings), folder)
    return start_ranks(resolved, lambda mesh: build_runner(resolved, mesh=mesh), shares_process=True)
