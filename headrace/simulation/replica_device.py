"""A device that computes nothing but how long each step would take. Knows where each sequence ends, as nobody else.

A simulated token may stand for `grain` real ones: a step then stands for as many steps in a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from headrace.scheduler import SchedulerLimits
from headrace.simulation.step_times import DeviceProfile, StepWork
from headrace.types.plan import StepPlan, StepResult

END_TOKEN = 0
"""The token that ends a sequence; no other is ever 0."""


class ReplicaDevice:
    """Executes plans at once, and says how long they took."""

    def __init__(self, profile: DeviceProfile, limits: SchedulerLimits, grain: int, ends: Sequence[int]) -> None:
        """`ends` has the length, prompt included, of the sequence that is sampled with each seed."""
        self.num_prefilled = 0
        self.num_decoded = 0
        self._profile = profile
        self._limits = limits
        self._grain = grain
        self._ends = ends
        self._end_of_slot = np.zeros(limits.num_slots, dtype=np.int64)
        self._num_entered = np.zeros(limits.num_slots, dtype=np.int64)

    def execute(self, plan: StepPlan) -> tuple[StepResult, float]:
        """What comes of a plan, and its seconds."""
        for entry in plan.new_slots:
            self._end_of_slot[entry.slot] = self._ends[entry.seed]
            self._num_entered[entry.slot] = len(entry.token_ids)
        slots = plan.row_slots[plan.row_samples]
        positions = (plan.row_starts + plan.row_lengths)[plan.row_samples]
        tokens = 1 + positions % (self._limits.vocab_size - 1)
        tokens[positions + 1 >= self._end_of_slot[slots]] = END_TOKEN
        count = len(slots)
        result = StepResult(
            step_id=plan.step_id,
            token_ids=tokens.astype(np.int32).reshape(count, 1),
            logprobs=np.zeros((count, 1), dtype=np.float32),
            num_tokens=np.ones(count, dtype=np.int32),
        )
        return result, self._profile.seconds(self._work(plan))

    def _work(self, plan: StepPlan) -> StepWork:
        starts, lengths, grain = plan.row_starts, plan.row_lengths, self._grain
        decodes = starts >= self._num_entered[plan.row_slots]
        num_decoding = int(np.count_nonzero(decodes))
        chunks = lengths[~decodes].astype(np.float64) * grain
        num_prefilled = int(chunks.sum())
        self.num_prefilled += num_prefilled
        self.num_decoded += num_decoding * grain
        num_read_together = self._shared_positions(plan, decodes)
        num_read = float((starts[decodes] + 0.5).sum()) * grain - num_read_together
        whole = -(-num_prefilled // self._limits.step_tokens(len(starts)))
        return StepWork(
            num_steps=grain if num_decoding else max(1, whole),
            num_decoded=num_decoding * grain,
            num_prefilled=num_prefilled,
            num_read=num_read * grain,
            num_read_together=num_read_together * grain,
            num_attended=float((chunks * (starts[~decodes] * grain + chunks / 2)).sum()),
        )

    def _shared_positions(self, plan: StepPlan, decodes: npt.NDArray[np.bool_]) -> float:
        """Real positions that rows of one step read with their neighbours."""
        found = 0
        for first, num_rows, num_pages in plan.prefix_groups.tolist():
            found += int(np.count_nonzero(decodes[first : first + num_rows])) * num_pages
        return float(found * self._limits.page_size * self._grain)
