"""Prompt log-probabilities of a step's rows, with bounded workspace. Must not know sampling modes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from headrace.runner.batch import ForwardBatch
from headrace.runner.pending import join_extras
from headrace.sampling import Sampler
from headrace.types.plan import PositionLogprobs, PromptLogprobs, SlotInit

_MAX_LOGITS_BYTES = 64 << 20


class PromptScorer:
    """Runs the rows' hidden states through the head a bounded number at a time and scores the tokens that follow."""

    def __init__(self, logits: Callable[[Tensor], Tensor], sampler: Sampler, vocab_size: int) -> None:
        self._logits = logits
        self._sampler = sampler
        self._chunk_rows = max(1, _MAX_LOGITS_BYTES // (4 * vocab_size))

    def score(self, batch: ForwardBatch, hidden_TX: Tensor) -> dict[int, PromptLogprobs]:
        """By row index, the prompt positions that this step's logits predict, for rows that asked."""
        found: dict[int, PromptLogprobs] = {}
        for row, init in batch.scored_rows:
            start, length = int(batch.attention.row_starts[row]), int(batch.attention.row_lengths[row])
            first, last = scored_positions(init, start, length)
            if first < last:
                offset = int(batch.row_firsts[row]) - start - 1  # position p is predicted by packed token p + offset
                found[row] = self._score_row(init, hidden_TX[first + offset : last + offset], first)
        return found

    def _score_row(self, init: SlotInit, hidden_MX: Tensor, first: int) -> PromptLogprobs:
        values: list[Tensor] = []
        extras: list[PositionLogprobs] = []
        for at in range(0, hidden_MX.shape[0], self._chunk_rows):
            chunk = hidden_MX[at : at + self._chunk_rows]
            targets = torch.from_numpy(init.token_ids[first + at : first + at + chunk.shape[0]].astype(np.int64))
            logprobs, extra = self._sampler.score(self._logits(chunk), targets, init.slot)
            values.append(logprobs)
            if extra is not None:
                extras.append(extra)
        return PromptLogprobs(first, torch.cat(values).numpy(), join_extras(extras))


def scored_positions(init: SlotInit, start: int, length: int) -> tuple[int, int]:
    """Prompt positions [first, last) that its request wants scored and a row of `length` tokens at `start` predicts."""
    assert init.logprobs.prompt_start is not None
    return max(start + 1, init.logprobs.prompt_start), min(start + length + 1, init.num_prompt_tokens)
