"""A step on its way: what an executor holds between issuing a plan and reading its result."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from headrace.types.plan import PositionLogprobs, PromptLogprobs, RoutedRow, SamplePatch, StepResult
from headrace.types.request import Float32Array, Int32Array


class PendingStep(Protocol):
    """A plan that was issued."""

    @property
    def step_id(self) -> int:
        """The plan's."""

    def sample(self, patch: SamplePatch | None) -> None:
        """Issue the sampling of a plan that waits for it; before the next plan is issued."""

    def wait(self) -> StepResult:
        """Its result, as soon as the device has it."""


class LocalStep(PendingStep, Protocol):
    """A plan that was issued to this process."""

    @property
    def is_done(self) -> bool:
        """Whether its result is there, and need not be waited for."""


def step_result(
    step_id: int,
    token_ids: Int32Array,
    logprobs: Float32Array,
    extras: dict[int, PositionLogprobs],
    prompts: dict[int, PromptLogprobs],
    routed: dict[int, RoutedRow] | None = None,
) -> StepResult:
    """One token per sampling row: token_ids and logprobs [s]."""
    num_rows = len(token_ids)
    counts = np.ones(num_rows, np.int32)
    columns = token_ids.reshape(num_rows, 1), logprobs.reshape(num_rows, 1)
    return StepResult(step_id, *columns, counts, extras, prompts, routed or {})


def join_extras(parts: list[PositionLogprobs]) -> PositionLogprobs | None:
    """Positions one after the other; None of none."""
    if len(parts) < 2:
        return parts[0] if parts else None
    return PositionLogprobs(
        np.concatenate([part.top_ids for part in parts]),
        np.concatenate([part.top_logprobs for part in parts]),
        np.concatenate([part.asked_logprobs for part in parts]),
    )
