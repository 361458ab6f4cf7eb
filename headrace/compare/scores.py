"""Log-probabilities of a trajectory's tokens as a target has them. Owns what an answer is, whoever gives it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from headrace.compare.trajectories import Trajectory


class ScoredTrajectory(msgspec.Struct, frozen=True):
    """One log-probability for each of a trajectory's `ids`; or [] and why there are none."""

    trajectory: Trajectory
    logprobs: list[float]
    refusal: str = ""


def scored(trajectory: Trajectory, logprobs: Sequence[float | None]) -> ScoredTrajectory:
    """Of what came for the last tokens of a sequence, at least as many as it has `ids`."""
    number = len(trajectory.ids)
    if len(logprobs) < number:
        return ScoredTrajectory(trajectory, [], f"{len(logprobs)} log-probabilities came for {number} tokens")
    last = [value for value in logprobs[len(logprobs) - number :] if value is not None and not math.isnan(value)]
    if len(last) < number:
        return ScoredTrajectory(trajectory, [], f"{number - len(last)} of {number} tokens have no log-probability")
    return ScoredTrajectory(trajectory, last)
