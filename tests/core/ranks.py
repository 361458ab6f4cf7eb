"""Executors of two ranks for tests: this process is the first, the second is a child."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.config import EngineConfig, resolve
from headrace.core.rank_executor import RankExecutor
from headrace.core.rank_start import start_ranks
from headrace.ipc.rank_spawn import start_children
from headrace.runner import build_runner

STAGES = {"tp_size": 1, "pp_size": 2}
"""Settings of two ranks that are a stage each."""


def start_two(folder: Path, settings: Mapping[str, Any]) -> RankExecutor:
    """Both ranks of a model: of one stage, unless settings say otherwise."""
    resolved = resolve(EngineConfig(model=str(folder), **({"tp_size": 2} | dict(settings))), folder)
    return start_ranks(
        resolved,
        lambda mesh: build_runner(resolved, mesh=mesh),
        start_children(2, shares_process=True),
        shares_process=True,
    )
