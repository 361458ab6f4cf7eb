"""A device that keeps to the letter of `StepPlan` and believes nothing: it mirrors slots, page table and KV cells.

It executes plans as they are issued, in order, and hands out results when asked. Each KV cell remembers the weights and
the token prefix it was computed from; a row whose cells are missing, stale or of other tokens is an error, as is any
break of the promises of `StepPlan`. It may sample several tokens a row, also of positions that steps in flight sampled,
or none: rows that go on from what was never sampled compute and bring junk.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from headrace.scheduler import SchedulerLimits
from headrace.types.plan import (
    LAST_TOKEN,
    PositionLogprobs,
    PromptLogprobs,
    SlotInit,
    StepPlan,
    StepResult,
)
from tests.scheduler.oracle import VOCAB_SIZE, Truth, cell_value, extend, logprob

JUNK = -77


class Slot:
    """What the device holds for a slot: whose it is, its page row, and what it expects in its KV cells.

    `is_void`: a row of it was issued behind one that sampled nothing; so is all that comes until it is entered again.
    """

    def __init__(self, init: SlotInit, truth: Truth, epoch: int) -> None:
        self.init = init
        self.truth = truth
        self.epoch = epoch
        self.pages: list[int] = []
        self.cells: list[int] = []
        self.num_sampled = len(init.token_ids)
        self.has_run = False
        self.is_void = False


class Issued:
    """A plan in flight: its result, per row (seed, pages it may read, pages it writes), and per sampling row the
    (seed, positions) of its tokens, of those that are not void."""

    def __init__(
        self,
        plan: StepPlan,
        result: StepResult,
        rows: list[tuple[int, set[int], set[int]]],
        sampled: list[tuple[int, range]],
        moved: dict[tuple[int, int, int], list[int | None]],
    ) -> None:
        """`moved` has, by move, the cells that are copied. `pages` are all that the plan may touch."""
        self.moved = moved
        self.plan = plan
        self.result = result
        self.rows = rows
        self.sampled = sampled
        self.pages = set[int]().union(*(pages for _, pages, _ in rows))


class FakeDevice:
    """Executes plans for requests whose truth is found by seed. A sampling row brings `num_tokens`, first to last."""

    def __init__(self, limits: SchedulerLimits, truths: dict[int, Truth], num_tokens: tuple[int, int] = (1, 1)) -> None:
        self.limits = limits
        self.truths = truths
        self.min_tokens, self.max_tokens = num_tokens
        self.epoch = 0
        self.in_flight: deque[Issued] = deque()
        self.slots: dict[int, Slot] = {}
        self.num_grouped_rows = 0
        self._kv: list[int | None] = [None] * (limits.num_pages * limits.page_size)
        self._host: dict[int, list[int | None]] = {}

    def submit(self, plan: StepPlan) -> None:
        """Check and execute one plan."""
        assert plan.epoch == self.epoch, "a plan for other weights"
        slots, starts, lengths = plan.row_slots.tolist(), plan.row_starts.tolist(), plan.row_lengths.tolist()
        assert sum(lengths) > 0 or len(plan.page_moves), "a plan of nothing"
        num_before = len(slots) - len(plan.new_slots)
        assert sum(lengths) <= self.limits.step_tokens(num_before), "over the token budget"
        assert min(lengths, default=1) >= 1 and len(plan.token_ids) == sum(lengths)
        assert len(set(slots)) == len(lengths), "two rows of one slot"
        moved = self._begin_moves(plan)
        self._enter(plan)
        self._write_table(plan)
        rows, offset, token_ids = [], 0, plan.token_ids.tolist()
        for slot, start, length in zip(slots, starts, lengths, strict=True):
            rows.append(self._write_kv(slot, start, token_ids[offset : offset + length]))
            offset += length
        self._check_ownership(rows)
        self._check_moves(moved, rows)
        self._check_groups(plan)
        for slot, start in zip(slots, starts, strict=True):
            self._attend(slot, start)
        result, sampled = self._sample(
            plan, slots, [start + length for start, length in zip(starts, lengths, strict=True)]
        )
        self.in_flight.append(Issued(plan, result, rows, sampled, moved))

    def collect(self) -> StepResult:
        """The result of the oldest plan in flight."""
        issued = self.in_flight.popleft()
        for (direction, page, host_page), cells in issued.moved.items():
            if direction == 0:  # what was written meanwhile, because nobody wanted the copy any more, is anything
                self._host[host_page] = cells if self.cells([page]) == cells else [None] * len(cells)
            else:
                self._fill(page, cells)
        return issued.result

    def _begin_moves(self, plan: StepPlan) -> dict[tuple[int, int, int], list[int | None]]:
        """What is copied beside the step, as it is when all plans before it have run."""
        moved = {}
        for direction, page, host_page in plan.page_moves.tolist():
            assert 0 < page < self.limits.num_pages and 0 <= host_page < self.limits.num_host_pages
            moved[direction, page, host_page] = list(self._host[host_page]) if direction else self.cells([page])
        for direction in (0, 1):
            count = sum(each[0] == direction for each in moved)
            assert count <= self.limits.max_page_moves, "more copies beside one step than there may be"
        return moved

    def _check_moves(
        self, moved: dict[tuple[int, int, int], list[int | None]], rows: list[tuple[int, set[int], set[int]]]
    ) -> None:
        """No row writes a page while it is saved, and none knows of one that is being filled."""
        saved = {page for direction, page, _ in moved if direction == 0}
        coming = {page for direction, page, _ in moved if direction == 1}
        for issued in self.in_flight:
            assert not coming & issued.pages, "a page of a step in flight is filled"
            coming |= {page for direction, page, _ in issued.moved if direction == 1}
        for _, pages, writes in rows:
            assert not writes & saved, "a page is saved while it is written"
            assert not pages & coming, "a row knows a page that is being filled"

    def _fill(self, page: int, cells: list[int | None]) -> None:
        size = self.limits.page_size
        self._kv[page * size : page * size + size] = cells

    def cells(self, pages: list[int]) -> list[int | None]:
        """What the KV cells of these pages hold, in order."""
        size = self.limits.page_size
        return [cell for page in pages for cell in self._kv[page * size : page * size + size]]

    def forget(self, issued: Issued) -> None:
        """The step was never executed: the cells it wrote hold nothing."""
        for direction, page, host_page in issued.moved:
            if direction == 0:
                self._host[host_page] = [None] * self.limits.page_size
            else:
                self._fill(page, [None] * self.limits.page_size)
        for _, _, writes in issued.rows:
            for page in writes:
                self._fill(page, [None] * self.limits.page_size)

    def _enter(self, plan: StepPlan) -> None:
        if not plan.new_slots:
            return
        busy = {slot for issued in self.in_flight for slot in issued.plan.row_slots.tolist()}
        for init in plan.new_slots:
            assert init.slot not in busy, "a slot changed hands with a step in flight"
            truth = self.truths[init.seed]
            num_known = len(init.token_ids)
            assert num_known >= len(truth.prompt) == init.num_prompt_tokens
            truth.token(num_known - 1)
            assert init.token_ids.tolist() == [truth.token(position) for position in range(num_known)]
            assert init.min_length == truth.min_length
            self.slots[init.slot] = Slot(init, truth, plan.epoch)

    def _write_table(self, plan: StepPlan) -> None:
        cells = zip(plan.page_slots.tolist(), plan.page_columns.tolist(), plan.page_ids.tolist(), strict=True)
        for slot, column, page in cells:
            pages = self.slots[slot].pages
            assert 0 < page < self.limits.num_pages, "page 0 is reserved"
            assert column == len(pages), "page columns are not contiguous"
            pages.append(page)

    def _write_kv(self, slot_id: int, start: int, token_ids: list[int]) -> tuple[int, set[int], set[int]]:
        """Write the KV of one row; returns (seed, its pages, those it writes)."""
        slot, size = self.slots[slot_id], self.limits.page_size
        end = start + len(token_ids)
        assert end <= len(slot.pages) * size, "a position without a page"
        if slot.has_run:
            assert start == len(slot.cells), "positions are not contiguous"
        for position, token in enumerate(token_ids, start):
            if token == LAST_TOKEN:
                assert len(token_ids) == 1
                slot.is_void |= position >= slot.num_sampled
                assert not slot.is_void or self.min_tokens == 0, "a token that was never sampled"
                token = slot.truth.token(position)
            else:
                assert not slot.is_void, "a row of known tokens behind one that sampled nothing"
            assert token == slot.truth.token(position), "a row holds a token that is not its sequence's"
            page = slot.pages[position // size]
            self._kv[page * size + position % size] = self._cell(slot, position)
        return slot.init.seed, set(slot.pages), set(slot.pages[start // size : (end - 1) // size + 1])

    def _attend(self, slot_id: int, start: int) -> None:
        """Check every cell before the row: of these very tokens, by the weights of now until the slot has sampled."""
        slot = self.slots[slot_id]
        has_sampled = slot.num_sampled > len(slot.init.token_ids)
        assert has_sampled or slot.epoch == self.epoch, "what had nothing to keep goes on over old KV"
        if not slot.has_run:
            slot.cells = [cell_value(slot.epoch, slot.truth.prefix_hash(position)) for position in range(start)]
            slot.has_run = True
        assert self.cells(slot.pages)[:start] == slot.cells, "a row attends to missing, stale or foreign KV"

    def _cell(self, slot: Slot, position: int) -> int:
        """What a row of the slot writes there now."""
        return JUNK if slot.is_void else cell_value(self.epoch, slot.truth.prefix_hash(position))

    def _check_ownership(self, rows: list[tuple[int, set[int], set[int]]]) -> None:
        """A page that a row writes is written by no other row, and touched by no other sequence's step in flight."""
        written: set[int] = set()
        for _, _, writes in rows:
            assert not writes & written, "two rows write one page"
            written |= writes
        for issued in self.in_flight:
            for seed, pages, _ in issued.rows:
                for other, _, writes in rows:
                    assert other == seed or not writes & pages, "a page of a step in flight was given away"

    def _check_groups(self, plan: StepPlan) -> None:
        last = 0
        for first, num_rows, num_pages in plan.prefix_groups.tolist():
            assert first >= last and num_rows >= 2 and num_pages >= 1
            last = first + num_rows
            assert last <= len(plan.row_slots)
            heads = {tuple(self.slots[int(s)].pages[:num_pages]) for s in plan.row_slots[first:last]}
            assert len(heads) == 1 and len(heads.pop()) == num_pages
            assert (plan.row_starts[first:last] >= num_pages * self.limits.page_size).all()
            self.num_grouped_rows += num_rows

    def _num_tokens(self, slot: Slot, end: int, step_id: int) -> int:
        """How many tokens a row that ends before `end` brings: of the same prefix not always none."""
        choice = extend(slot.truth.prefix_hash(end - 1), step_id) >> 20
        return 0 if self.min_tokens == 0 and choice % 6 == 0 else 1 + choice % self.max_tokens

    def _sample(
        self, plan: StepPlan, slot_ids: list[int], ends: list[int]
    ) -> tuple[StepResult, list[tuple[int, range]]]:
        """The result of rows of these slots that end there, and what they sampled."""
        samples = plan.row_samples.tolist()
        rows = list(zip(slot_ids, ends, samples, strict=True))
        counts = [self._num_tokens(self.slots[slot], end, plan.step_id) for slot, end, sampling in rows if sampling]
        width = max([1, *counts])
        token_ids: list[list[int]] = []
        logprobs: list[list[float]] = []
        sampled: list[tuple[int, range]] = []
        extras: dict[int, PositionLogprobs] = {}
        scored: dict[int, PromptLogprobs] = {}
        for row, (slot_id, end, is_sampling) in enumerate(rows):
            slot = self.slots[slot_id]
            start = len(slot.cells)
            slot.cells += [self._cell(slot, at) for at in range(start, end)]
            if slot.init.logprobs.prompt_start is not None:
                self._score(slot, row, start, end, scored)
            if is_sampling:
                count = counts[len(token_ids)]
                if slot.is_void:
                    token_ids.append([JUNK] * width)
                    logprobs.append([0.0] * width)
                    continue
                slot.num_sampled = max(slot.num_sampled, end + count)
                sampled.append((slot.init.seed, range(end, end + count)))
                positions = list(range(end, end + width))
                token_ids.append([slot.truth.token(position) for position in positions])
                logprobs.append([logprob(slot.init.seed, position) for position in positions])
                if slot.init.logprobs.wants_extras:
                    extras[row] = position_values(slot.init, positions)
        shape = len(token_ids), width
        result = StepResult(
            plan.step_id,
            np.array(token_ids, dtype=np.int32).reshape(shape),
            np.array(logprobs, dtype=np.float32).reshape(shape),
            np.array(counts, dtype=np.int32),
            extras,
            scored,
        )
        return result, sampled

    @staticmethod
    def _score(slot: Slot, row: int, start: int, end: int, scored: dict[int, PromptLogprobs]) -> None:
        wanted = slot.init.logprobs.prompt_start
        assert wanted is not None
        first, last = max(start + 1, wanted), min(end, len(slot.truth.prompt) - 1)
        if first <= last:
            positions = list(range(first, last + 1))
            values = np.array([logprob(slot.init.seed, position) for position in positions], dtype=np.float32)
            extras = position_values(slot.init, positions) if slot.init.logprobs.wants_extras else None
            scored[row] = PromptLogprobs(first, values, extras)


def position_values(init: SlotInit, positions: list[int]) -> PositionLogprobs:
    """Top and asked values that say which position they belong to."""
    num_top, num_asked = init.logprobs.num_top, len(init.logprobs.token_ids)
    column = np.array(positions, dtype=np.int32)[:, None]
    return PositionLogprobs(
        np.repeat(column % VOCAB_SIZE, num_top, axis=1),
        np.repeat(column, num_top, axis=1).astype(np.float32),
        np.repeat(column, num_asked, axis=1).astype(np.float32),
    )
