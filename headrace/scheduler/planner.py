"""Decides one step: which sequences compute how many tokens, on which pages, within one token budget.

A step serves single-token rows first, then longer runs of known tokens, then preempted sequences, then new ones. When
pages run out, sequences are served by rank and the last in rank is preempted, so the first in rank always goes on:
alone it fits the pool, which `read_prompt` made sure of. The planner keeps no state of its own but what saves work.
"""

from __future__ import annotations

import numpy as np

from headrace.scheduler.counters import Counters
from headrace.scheduler.limits import SchedulerLimits
from headrace.scheduler.plan_builder import PlanBuilder, Rows
from headrace.scheduler.prefix_groups import NO_GROUPS, find_groups
from headrace.scheduler.roster import Roster
from headrace.scheduler.sequence import Sequence, State
from headrace.scheduler.slot_table import IndexArray
from headrace.types.plan import LAST_TOKEN, StepPlan
from headrace.types.request import Int32Array


class StepPlanner:
    """Plans steps for the sequences of a roster."""

    def __init__(self, roster: Roster, limits: SchedulerLimits, counters: Counters) -> None:
        self._roster = roster
        self._limits = limits
        self._counters = counters
        self._grouped: tuple[int, IndexArray, Int32Array] = (-1, np.empty(0, dtype=np.int64), NO_GROUPS)

    def plan(self, step_id: int, epoch: int, *, admit_new: bool) -> tuple[StepPlan, Rows] | None:
        """The next step, its pages leased and its rows counted as in flight; None when there is nothing to do."""
        builder = PlanBuilder()
        budget = self._limits.max_num_batched_tokens
        order = self._roster.order()
        if len(order):
            budget -= self._add_running(builder, order, budget)
        if budget > 0:
            self._admit(builder, budget, epoch, admit_new=admit_new)
        if builder.is_empty:
            return None
        rows = builder.rows()
        self._roster.table.num_in_flight[rows.slots] += 1
        plan = builder.build(step_id, epoch, rows, self._groups(rows))
        self._counters.num_steps += 1
        self._counters.num_scheduled_tokens += len(plan.token_ids)
        return plan, rows

    def _add_running(self, builder: PlanBuilder, order: IndexArray, budget: int) -> int:
        """Serve the sequences that hold slots; returns the tokens spent."""
        table, leases = self._roster.table, self._roster.leases
        scheduled = table.num_scheduled[order]
        pending = np.minimum(table.num_expected[order], table.compute_length[order]) - scheduled
        is_single = pending == 1
        singles, positions = order[is_single][:budget], scheduled[is_single][:budget]
        chunks = self._chunks(order[pending > 1], budget - len(singles))
        needs_page = positions >= leases.capacity[singles]
        wanted = int(np.count_nonzero(needs_page)) + sum(self._num_missing(slot, length) for slot, length in chunks)
        if wanted > leases.num_available:
            granted = self._make_room(order, singles, chunks)
            keep = np.array([slot in granted for slot in singles.tolist()], dtype=np.bool_)
            singles, positions, needs_page = singles[keep], positions[keep], needs_page[keep]
            chunks = [(slot, granted[slot]) for slot, _ in chunks if slot in granted]
        if len(singles):
            self._add_singles(builder, singles, positions, singles[needs_page])
        for slot, length in chunks:
            self._add_chunk(builder, slot, length)
        return len(singles) + sum(length for _, length in chunks)

    def _chunks(self, slots: IndexArray, budget: int) -> list[tuple[int, int]]:
        """(slot, tokens) of the sequences with more than one token to compute, as far as the budget goes."""
        table = self._roster.table
        found = []
        for slot in slots.tolist():
            if budget <= 0:
                break
            end = min(table.num_expected[slot], table.compute_length[slot])
            length = min(budget, int(end - table.num_scheduled[slot]))
            found.append((slot, length))
            budget -= length
        return found

    def _num_missing(self, slot: int, length: int) -> int:
        """Pages the lease of `slot` lacks for its next `length` tokens."""
        end = int(self._roster.table.num_scheduled[slot]) + length
        return max(0, self._limits.num_pages_for(end) - int(self._roster.leases.num_pages[slot]))

    def _make_room(self, order: IndexArray, singles: IndexArray, chunks: list[tuple[int, int]]) -> dict[int, int]:
        """Share out the pages by rank, preempting from the end of it; returns the tokens each slot may compute now.

        Pages of a victim that steps in flight still refer to come back later; then nobody else is preempted for them,
        and the sequence that needs them waits.
        """
        wanted = dict(chunks) | dict.fromkeys(singles.tolist(), 1)
        table, leases = self._roster.table, self._roster.leases
        granted: dict[int, int] = {}
        promised = 0
        for slot in order.tolist():
            if slot not in wanted or not table.is_running[slot]:
                continue
            missing = self._num_missing(slot, wanted[slot])
            if missing > leases.num_available - promised:
                self._preempt_for(slot, missing + promised)
            missing = min(missing, leases.num_available - promised)
            promised += missing
            capacity = int(leases.capacity[slot]) + missing * self._limits.page_size
            length = min(wanted[slot], capacity - int(table.num_scheduled[slot]))
            if length > 0:
                granted[slot] = length
        return granted

    def _preempt_for(self, slot: int, num_pages: int) -> None:
        """Preempt sequences ranked after `slot` until `num_pages` pages are available or will be."""
        roster = self._roster
        while True:
            coming = int(roster.leases.num_pages[roster.table.leaving()].sum())
            victim = int(roster.order()[-1])
            if roster.leases.num_available + coming >= num_pages or victim == slot:
                return
            roster.preempt(victim)

    def _add_singles(self, builder: PlanBuilder, slots: IndexArray, positions: IndexArray, growing: IndexArray) -> None:
        table = self._roster.table
        if len(growing):
            columns, page_ids = self._roster.leases.grow_each(growing)
            builder.add_page_each(growing, columns, page_ids)
        token_ids = table.token_ids[slots, positions]
        token_ids[positions >= table.num_known[slots]] = LAST_TOKEN
        ends = positions + 1
        samples = (ends == table.num_expected[slots]) & (ends < table.max_length[slots])
        table.num_scheduled[slots] = ends
        table.num_expected[slots] += samples
        builder.add_singles(slots, positions, token_ids, samples)
        num_prefill = int(np.count_nonzero(positions < table.num_prompt[slots]))
        self._counters.num_prefill_tokens += num_prefill
        self._counters.num_decode_tokens += len(slots) - num_prefill

    def _add_chunk(self, builder: PlanBuilder, slot: int, length: int) -> None:
        """A row of known tokens. Its whole pages are published at once: later rows of this plan, and later plans, may
        read them, because rows write their KV before any row attends and plans run in order."""
        table, leases = self._roster.table, self._roster.leases
        start = int(table.num_scheduled[slot])
        end = start + length
        missing = self._num_missing(slot, length)
        if missing:
            first = int(leases.num_pages[slot])
            builder.add_page_run(slot, first, leases.grow(slot, missing))
        assert end <= table.num_known[slot], "a chunk holds a token that is not known"
        samples = bool(end == table.num_expected[slot] and end < table.max_length[slot])
        builder.add_chunk(slot, start, table.token_ids[slot, start:end], samples=samples)
        leases.publish(slot, end)
        table.num_scheduled[slot] = end
        table.num_expected[slot] += samples
        self._counters.num_prefill_tokens += length

    def _admit(self, builder: PlanBuilder, budget: int, epoch: int, *, admit_new: bool) -> None:
        """Let sequences into free slots while budget and pages last, never past one that does not fit."""
        leases = self._roster.leases
        reserve = -1
        while budget > 0:
            sequence = self._roster.next_to_admit(admit_new=admit_new)
            if sequence is None:
                return
            namespace = sequence.namespace(epoch)
            match = leases.match(namespace, sequence.units, sequence.max_hit // self._limits.page_size)
            reserve = self._num_reserved() if reserve < 0 else reserve
            num_known = len(sequence.token_ids)
            needed = self._num_pages_ahead(num_known, sequence.compute_length) - match.num_pages
            if needed + match.num_unpinned + reserve > leases.num_available:
                return
            is_new = sequence.state is State.WAITING
            slot = self._roster.admit(sequence, namespace, match)
            builder.add_new_slot(sequence, slot)
            if match.num_pages:
                builder.add_page_run(slot, 0, leases.pages[slot, : match.num_pages].copy())
            num_hit = match.num_pages * self._limits.page_size
            self._count_admission(sequence, num_hit, is_new=is_new)
            wanted = min(num_known, sequence.compute_length) - num_hit
            self._counters.num_chunked_prompts += wanted > budget
            self._add_chunk(builder, slot, min(wanted, budget))
            budget -= min(wanted, budget)
            reserve += match.num_pages + needed - int(leases.num_pages[slot])

    def _count_admission(self, sequence: Sequence, num_hit: int, *, is_new: bool) -> None:
        counters = self._counters
        if not is_new:
            counters.num_resumed_tokens += num_hit
            return
        sequence.num_cached_tokens = num_hit
        counters.num_prompt_tokens += sequence.num_prompt
        counters.num_cached_tokens += num_hit
        counters.num_shared_prefills += num_hit > 0

    def _num_pages_ahead(self, num_known: int, compute_length: int) -> int:
        """Pages a sequence holds one page of output from now: what admission reserves for it."""
        return self._limits.num_pages_for(min(num_known + self._limits.page_size, compute_length))

    def _num_reserved(self) -> int:
        """Pages the running sequences lack for all their known tokens and one page of output each."""
        table, page_size = self._roster.table, self._limits.page_size
        order = self._roster.order()
        ahead = np.minimum(table.num_expected[order] + page_size, table.compute_length[order])
        lacking = -(-ahead // page_size) - self._roster.leases.num_pages[order]
        return int(np.maximum(lacking, 0).sum())

    def _groups(self, rows: Rows) -> Int32Array:
        """Prefix groups of the rows, found anew only when the rows or the holders of slots changed, and after a step in
        which some row was still computing pages that others share."""
        generation, slots, groups = self._grouped
        if generation == self._roster.generation and np.array_equal(slots, rows.slots):
            return groups
        leases = self._roster.leases
        num_full = rows.starts // self._limits.page_size
        groups = find_groups(leases.pages, rows.slots, num_full, int(leases.num_matched[rows.slots].max()))
        if (rows.lengths == 1).all():
            self._grouped = (self._roster.generation, rows.slots, groups)
        return groups
