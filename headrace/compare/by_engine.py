"""Scores of a checkpoint's folder, by an engine of this process's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from headrace.compare.scores import ScoredTrajectory, scored
from headrace.compare.trajectories import Trajectory

BATCH = 256
"""Trajectories that are scored by one call."""


def score_by_engine(
    folder: str,
    trajectories: Sequence[Trajectory],
    temperature: float,
    settings: Mapping[str, Any],
    on_progress: Callable[[int], None],
) -> list[ScoredTrajectory]:
    """`settings` are further ones of the engine; what it refuses of a trajectory, such as one over its context, is said
    there. Raises what the engine's start does."""
    from headrace import Engine

    found: list[ScoredTrajectory] = []
    with Engine(folder, skip_tokenizer_init=True, progress=False, **settings) as engine:
        for start in range(0, len(trajectories), BATCH):
            batch = trajectories[start : start + BATCH]
            generations = engine.score(
                input_ids=[each.prompt_ids + each.ids for each in batch],
                sampling_params={"temperature": temperature},
                prompt_logprob_mode="raw" if temperature == 1.0 else "temperature",
                logprob_start=min(engine.resolved.context_length, *(len(each.prompt_ids) for each in batch)),
                return_errors=True,
            )
            for trajectory, generation in zip(batch, generations, strict=True):
                if generation.error is not None:
                    found.append(ScoredTrajectory(trajectory, [], generation.error.message))
                else:
                    found.append(scored(trajectory, generation.prompt_logprobs))
            on_progress(len(found))
    return found
