"""The device's mirror of the scheduler's slots. Owns last tokens, page rows and prompts to score; decides nothing."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from headrace.attention.base import Int64Array
from headrace.types.plan import SlotInit, StepPlan


class InputTable:
    """Changed only by the plans it is shown, in the order they were issued, and by the tokens they sample.

    page_table    int32 tensor [num_slots, num_columns]; cells a plan never wrote read page 0
    last_tokens   int64 [num_slots]; what each slot sampled last
    """

    def __init__(self, num_slots: int, num_columns: int) -> None:
        self._pages = np.zeros((num_slots, num_columns), dtype=np.int32)
        self.page_table = torch.from_numpy(self._pages)
        self.last_tokens = np.zeros(num_slots, dtype=np.int64)
        self._scored: dict[int, SlotInit] = {}
        self._scored_ends = np.zeros(num_slots, dtype=np.int64)  # prompt length where its scores are wanted, else 0

    def apply(self, plan: StepPlan) -> None:
        """Enter the plan's new slots, then write its page-table cells."""
        for init in plan.new_slots:
            self._scored.pop(init.slot, None)
            self._scored_ends[init.slot] = 0
            if init.logprobs.prompt_start is not None:
                self._scored[init.slot] = init
                self._scored_ends[init.slot] = init.num_prompt_tokens
        self._pages[plan.page_slots, plan.page_columns] = plan.page_ids

    def scored_rows(
        self, row_slots: npt.NDArray[np.integer], row_starts: npt.NDArray[np.integer]
    ) -> list[tuple[int, SlotInit]]:
        """Rows that compute part of a prompt whose log-probabilities are wanted, each with its sequence."""
        if not self._scored:  # nearly always
            return []
        rows = np.flatnonzero(row_starts + 1 < self._scored_ends[row_slots])
        return [(int(row), self._scored[int(row_slots[row])]) for row in rows]

    def record(self, slots: Int64Array, token_ids: Int64Array) -> None:
        """What each slot has just sampled."""
        self.last_tokens[slots] = token_ids
