"""Prompt log-probabilities of a step's rows, with bounded workspace. Must not know sampling modes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headrace.runner.batch import ForwardBatch
from headrace.runner.pending import join_extras
from headrace.sampling import Sampler
from headrace.types.plan import PositionLogprobs, PromptLogprobs, SlotInit
from headrace.types.request import Int32Array

_MAX_LOGITS_BYTES = 64 << 20


class PromptScorer:
    """Runs the rows' hidden states through the head a bounded number at a time and scores the tokens that follow."""

    def __init__(self, logits: Callable[[Tensor], Tensor], sampler: Sampler, vocab_size: int) -> None:
        self._logits = logits
        self._sampler = sampler
        self._chunk_rows = max(1, _MAX_LOGITS_BYTES // (4 * vocab_size))

    def score(self, batch: ForwardBatch, hidden_TX: Tensor) -> dict[int, PromptLogprobs]:
        """By row index, the prompt positions that this step's logits predict, for rows that asked."""
        rows = batch.attention
        spans = scored_spans(batch.scored_rows, rows.row_starts, rows.row_lengths, batch.row_firsts)
        return {span.row: self._score_row(span, hidden_TX) for span in spans}

    def _score_row(self, span: ScoredSpan, hidden_TX: Tensor) -> PromptLogprobs:
        values: list[Tensor] = []
        extras: list[PositionLogprobs] = []
        for tokens, target_ids in span.chunks(self._chunk_rows):
            targets = torch.from_numpy(target_ids.astype(np.int64))
            logprobs, extra = self._sampler.score(self._logits(hidden_TX[tokens]), targets, span.init.slot)
            values.append(logprobs)
            if extra is not None:
                extras.append(extra)
        return PromptLogprobs(span.first, torch.cat(values).numpy(), join_extras(extras))


class ScoredSpan(NamedTuple):
    """Prompt positions first..last-1 of a row to be scored; position p is predicted by packed token p + offset."""

    row: int
    init: SlotInit
    first: int
    last: int
    offset: int

    def chunks(self, size: int) -> Iterator[tuple[slice, Int32Array]]:
        """At most `size` positions at a time: the packed tokens that predict them, and their token ids."""
        for at in range(self.first, self.last, size):
            end = min(at + size, self.last)
            yield slice(at + self.offset, end + self.offset), self.init.token_ids[at:end]


def scored_spans(
    scored_rows: list[tuple[int, SlotInit]],
    row_starts: npt.NDArray[np.integer],
    row_lengths: npt.NDArray[np.integer],
    row_firsts: npt.NDArray[np.integer],
) -> Iterator[ScoredSpan]:
    """What a step scores of the rows that asked; rows [R] by absolute start, length and first packed token."""
    for row, init in scored_rows:
        start = int(row_starts[row])
        scored = init.scored_positions(start, int(row_lengths[row]))
        if scored:
            yield ScoredSpan(row, init, scored.start, scored.stop, int(row_firsts[row]) - start - 1)
