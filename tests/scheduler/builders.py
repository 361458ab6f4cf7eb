"""Short ways to make limits, requests and results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from headrace.scheduler import Scheduler, SchedulerLimits
from headrace.types.plan import StepPlan, StepResult
from headrace.types.request import Delta, Request, pack_ids, unpack_ids

ROOMY = SchedulerLimits(
    max_running_requests=8,
    max_waiting_requests=100,
    max_num_batched_tokens=64,
    context_length=100,
    page_size=4,
    num_pages=101,
    prefix_cache=True,
    overlap_depth=0,
    vocab_size=1000,
)


def make(**changes: Any) -> Scheduler:
    """A scheduler with room for everything but what `changes` says."""
    return Scheduler(msgspec.structs.replace(ROOMY, **changes))


def make_timed(clock: Callable[[], float], **changes: Any) -> Scheduler:
    """The same with a clock of the test's."""
    return Scheduler(msgspec.structs.replace(ROOMY, **changes), clock=clock)


def request(handle: int, prompt: int | Sequence[int] = 5, max_new: int = 3, **fields: Any) -> Request:
    """A request with seed = handle; an integer prompt is that many tokens of its own."""
    token_ids = [(100 * handle + index) % 1000 for index in range(prompt)] if isinstance(prompt, int) else prompt
    return Request(handle, str(handle), pack_ids(token_ids), max_new, seed=handle, **fields)


def answer(plan: StepPlan, token: int | Callable[[int], int] = 7) -> StepResult:
    """The same token for every sampling row, or one by slot."""
    slots = plan.row_slots[plan.row_samples].tolist()
    token_ids = [token(slot) if callable(token) else token for slot in slots]
    count = len(slots)
    return StepResult(
        plan.step_id,
        np.array(token_ids, dtype=np.int32).reshape(count, 1),
        np.full((count, 1), -0.5, dtype=np.float32),
        np.ones(count, dtype=np.int32),
    )


def planned(scheduler: Scheduler) -> StepPlan:
    """The next plan, which there must be."""
    plan = scheduler.plan()
    assert plan is not None
    return plan


def step(scheduler: Scheduler, token: int | Callable[[int], int] = 7) -> tuple[StepPlan, list[Delta]]:
    """Plan and apply one step."""
    plan = planned(scheduler)
    return plan, scheduler.apply(answer(plan, token))


def finish_all(scheduler: Scheduler) -> list[Delta]:
    """Step until nothing is left."""
    deltas: list[Delta] = []
    plan = scheduler.plan()
    while plan is not None:
        deltas += scheduler.apply(answer(plan))
        plan = scheduler.plan()
    return deltas


def rows(plan: StepPlan) -> list[tuple[int, int, int]]:
    """(slot, start, length) of each row."""
    return list(zip(plan.row_slots.tolist(), plan.row_starts.tolist(), plan.row_lengths.tolist(), strict=True))


def tokens(delta: Delta) -> list[int]:
    """The new tokens of a delta."""
    found: list[int] = unpack_ids(delta.token_ids).tolist()
    return found
