"""Trainer ranks that run functions of `rank_scenarios` one after the other, in processes of their own over gloo."""

from __future__ import annotations

import contextlib
from typing import Any

from tests.rl.trainer_ranks import StartedRanks, start_ranks

SECONDS = 200.0
Scenarios = dict[str, tuple[str, dict[str, Any]]]


def run_ranks(num_ranks: int, scenarios: Scenarios) -> dict[str, list[Any]]:
    """What every rank answered, by scenario: each is a function and its arguments; None from one that a scenario has
    ended. Raises with the traceback of a rank that fails."""
    started = start_ranks(num_ranks, play, scenarios)
    try:
        answers = [_answers(started, rank) for rank in range(num_ranks)]
    finally:
        started.end()
    return {name: [each.get(name) for each in answers] for name in scenarios}


def _answers(started: StartedRanks, rank: int) -> dict[str, Any]:
    try:
        answers: dict[str, Any] = started.result(rank, SECONDS)
    except EOFError:
        process = started.processes[rank]
        process.join()
        assert process.exitcode == 0, f"rank {rank} ended with {process.exitcode}"
        return {}
    return answers


def play(_: int, scenarios: Scenarios) -> dict[str, Any]:
    """One rank."""
    from torch import distributed

    from tests.rl import rank_scenarios

    answers = {name: getattr(rank_scenarios, function)(**given) for name, (function, given) in scenarios.items()}
    with contextlib.suppress(RuntimeError):  # a scenario may have ended a rank
        distributed.barrier()
    return answers
