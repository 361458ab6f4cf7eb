"""Collects the rows, page cells and new slots of one step and packs them into a `StepPlan`. Decides nothing."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
import numpy as np

from headrace.cache.offload import StepMoves
from headrace.scheduler.prefix_groups import NO_GROUPS
from headrace.scheduler.running_table import BoolArray, IndexArray
from headrace.scheduler.sequence import Sequence
from headrace.types.plan import NO_MOVES, SlotInit, StepPlan
from headrace.types.request import Int32Array


class Rows(NamedTuple):
    """The rows of a step as the scheduler keeps them until its result comes, int64; `samples` is bool."""

    slots: IndexArray
    starts: IndexArray
    lengths: IndexArray
    samples: BoolArray


_NONE: IndexArray = np.empty(0, dtype=np.int64)
_NO_ROWS = Rows(_NONE, _NONE, _NONE, np.empty(0, dtype=np.bool_))


class PlanBuilder:
    """Rows come out in the order in which they were added: all single-token rows at once, then chunks one by one."""

    def __init__(self) -> None:
        self.new_slots: list[SlotInit] = []
        self._cells: list[tuple[IndexArray, IndexArray, Int32Array]] = []
        self._singles: Rows | None = None
        self._tokens: list[Int32Array] = []
        self._chunks: list[tuple[int, int, int, bool]] = []
        self.moves: StepMoves | None = None

    def add_new_slot(self, sequence: Sequence, slot: int) -> None:
        """A sequence enters a slot with the tokens it has; prompt positions scored already are not asked again."""
        request, scores, logprobs = sequence.request, sequence.prompt_scores, sequence.request.logprobs
        start = None
        if scores is not None and not scores.is_complete:
            start = scores.next_position if scores.has_any else scores.start
        if start != logprobs.prompt_start:
            logprobs = msgspec.structs.replace(logprobs, prompt_start=start)
        self.new_slots.append(
            SlotInit(
                slot=slot,
                seed=request.seed,
                num_prompt_tokens=sequence.num_prompt,
                token_ids=sequence.token_ids,
                sampling=request.sampling,
                logprobs=logprobs,
                stop_token_ids=sequence.stop_token_ids,
                min_length=sequence.num_prompt + request.min_new_tokens,
                num_output_ids_in_prompt=request.num_output_ids_in_prompt,
            )
        )

    def add_page_run(self, slot: int, first_column: int, page_ids: Int32Array) -> None:
        """Consecutive page-table cells of one slot."""
        count = len(page_ids)
        columns = np.arange(first_column, first_column + count, dtype=np.int64)
        self._cells.append((np.full(count, slot, dtype=np.int64), columns, page_ids))

    def add_page_each(self, slots: IndexArray, columns: IndexArray, page_ids: Int32Array) -> None:
        """One page-table cell of each of many slots."""
        self._cells.append((slots, columns, page_ids))

    def add_singles(self, slots: IndexArray, positions: IndexArray, token_ids: Int32Array, samples: BoolArray) -> None:
        """Rows of one token each; once, before any chunk."""
        self._singles = Rows(slots, positions, np.ones(len(slots), dtype=np.int64), samples)
        self._tokens.append(token_ids)

    def add_chunk(self, slot: int, start: int, token_ids: Int32Array, *, samples: bool) -> None:
        """A row of any number of known tokens."""
        self._chunks.append((slot, start, len(token_ids), samples))
        self._tokens.append(token_ids)

    def rows(self) -> Rows | None:
        """All rows of the step; None if it has nothing to do."""
        singles = self._singles
        if not self._chunks:
            return _NO_ROWS if singles is None and self.moves is not None else singles
        chunks = Rows(*map(np.array, zip(*self._chunks, strict=True)))
        parts = [chunks] if singles is None else [singles, chunks]
        return Rows(*map(np.concatenate, list[Any](zip(*parts, strict=True))))

    def build(self, step_id: int, epoch: int, rows: Rows, prefix_groups: Int32Array = NO_GROUPS) -> StepPlan:
        """The plan of `rows`, which are `self.rows()`."""
        if self._cells:
            cell_slots, cell_columns, cell_pages = map(np.concatenate, zip(*self._cells, strict=True))
        else:
            cell_slots = cell_columns = cell_pages = np.empty(0, dtype=np.int32)
        return StepPlan(
            step_id=step_id,
            epoch=epoch,
            new_slots=tuple(self.new_slots),
            page_slots=cell_slots.astype(np.int32),
            page_columns=cell_columns.astype(np.int32),
            page_ids=cell_pages.astype(np.int32),
            row_slots=rows.slots.astype(np.int32),
            row_starts=rows.starts.astype(np.int32),
            row_lengths=rows.lengths.astype(np.int32),
            token_ids=np.concatenate(self._tokens) if self._tokens else np.empty(0, dtype=np.int32),
            row_samples=rows.samples,
            prefix_groups=prefix_groups,
            page_moves=NO_MOVES if self.moves is None else self.moves.as_array(),
        )
