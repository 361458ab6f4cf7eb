"""Executors of two ranks for tests: this process is the first, the second is a child."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.config import EngineConfig, ResolvedConfig, resolve
from headrace.core.begun_ranks import BegunRanks
from headrace.core.rank_executor import RankExecutor
from headrace.core.rank_start import start_ranks
from headrace.ipc.rank_spawn import RankProcess
from headrace.runner import build_runner

STAGES = {"tp_size": 1, "pp_size": 2}
"""Settings of two ranks that are a stage each."""


def start_two(folder: Path, settings: Mapping[str, Any]) -> RankExecutor:
    """Both ranks of a model: of one stage, unless settings say otherwise."""
    resolved = resolve(EngineConfig(model=str(folder), **({"tp_size": 2} | dict(settings))), folder)
    return start_ranks(
        resolved,
        lambda mesh: build_runner(resolved, mesh=mesh),
        begun_ranks(resolved),
        shares_process=True,
    )


def begun_ranks(resolved: ResolvedConfig) -> list[RankProcess]:
    """All but the first, which know their settings."""
    ranks = BegunRanks(shares_process=True)
    ranks.begin(resolved.num_ranks)
    ranks.settle(resolved)
    return ranks.take()
