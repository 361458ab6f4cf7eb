"""A step that any device can execute if it executes anything: tells a request that fails from a device that does.

Owns that one plan and how often it is tried. It runs with no plan in flight and no page in use, when the scheduler has
given up all of them: it may have slot 0 and page 1, which whoever comes next overwrites.
"""

from __future__ import annotations

import numpy as np

from headrace.core.executor import Executor
from headrace.core.faults import DeviceLost, StepError
from headrace.types.plan import SlotInit, StepPlan
from headrace.types.request import TokenSampling
from headrace.types.sampling_params import LogprobOptions

NUM_TRIES = 3
"""A fault may pass: of so many steps one has to succeed."""

_STEP_ID = -1


def check_device(executor: Executor, fault: StepError, epoch: int) -> None:
    """`fault` was laid at one request's door, under the weights of `epoch`. Raises `DeviceLost` if the device executes
    no other step either."""
    for _ in range(NUM_TRIES):
        executor.submit(_canary(epoch))
        try:
            executor.collect()
        except StepError as error:
            if error.is_blameless:
                return  # it was executed
            fault = error
        else:
            return
    raise DeviceLost(f"the device executes no step any more, whatever is in it: {fault}") from fault


def _canary(epoch: int) -> StepPlan:
    """One token of nobody: its KV is stored, and the next one is sampled."""
    token = np.zeros(1, np.int32)
    init = SlotInit(
        slot=0,
        seed=0,
        num_prompt_tokens=1,
        token_ids=token,
        sampling=TokenSampling(temperature=0.0),
        logprobs=LogprobOptions(),
        stop_token_ids=(),
        min_length=0,
    )
    zero, one = np.zeros(1, np.int32), np.ones(1, np.int32)
    return StepPlan(
        step_id=_STEP_ID,
        epoch=epoch,
        new_slots=(init,),
        page_slots=zero,
        page_columns=zero,
        page_ids=one,
        row_slots=zero,
        row_starts=zero,
        row_lengths=one,
        token_ids=token,
        row_samples=np.ones(1, np.bool_),
        prefix_groups=np.zeros((0, 3), np.int32),
    )
