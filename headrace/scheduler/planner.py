"""Decides one step: which sequences compute how many tokens, on which pages, within one token budget.

A step serves single-token rows first, then longer runs of known tokens, then preempted sequences, then new ones. New
ones whose ends are known come in only where the pool, and the host's memory with it, will hold all to their ends
(`headrace.scheduler.pool_forecast`). When pages run out all the same, sequences are served by rank and one behind is
preempted (`headrace.scheduler.victims`), so the first in rank always goes on: alone it fits the pool, which
`read_prompt` made sure of. The planner keeps no state of its own but what saves work.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

import numpy as np

from headrace.cache import Match, Namespace
from headrace.cache.offload import Offload, StepMoves
from headrace.scheduler.counters import Counters
from headrace.scheduler.limits import SchedulerLimits
from headrace.scheduler.plan_builder import PlanBuilder, Rows
from headrace.scheduler.pool_forecast import PoolForecast
from headrace.scheduler.prefix_groups import NO_GROUPS, find_groups
from headrace.scheduler.roster import Roster
from headrace.scheduler.running_table import IndexArray
from headrace.scheduler.sequence import Sequence, State
from headrace.scheduler.step_budget import StepBudget
from headrace.scheduler.victims import victim_behind
from headrace.types.plan import LAST_TOKEN, StepPlan
from headrace.types.request import Int32Array

_MAX_PASSED = 1024
_MAX_TRIED = 8
"""How many of those in line behind one that does not fit are looked at, and are matched with the cache."""


class _Entrant(NamedTuple):
    """A sequence that may enter a slot, what of it is cached, and the pages that it needs at once."""

    sequence: Sequence
    namespace: Namespace
    match: Match
    num_pages: int


class _Room(NamedTuple):
    """Pages that the running sequences will need at once, and how full the pool will be with them, for one who comes
    and whose end is known."""

    num_reserved: int
    forecast: PoolForecast | None


class StepPlanner:
    """Plans steps for the sequences of a roster."""

    def __init__(self, roster: Roster, limits: SchedulerLimits, counters: Counters, clock: Callable[[], float]) -> None:
        self._roster = roster
        self._clock = clock
        self._limits = limits
        self._counters = counters
        self._refused = (-1, -1)  # when nobody behind the first had room; nothing has changed that since
        self._grouped: tuple[int, IndexArray, Int32Array] = (-1, np.empty(0, dtype=np.int64), NO_GROUPS)

    def plan(self, step_id: int, epoch: int, *, admit_new: bool) -> tuple[StepPlan, Rows, StepMoves | None] | None:
        """The next step, its pages leased and its rows counted as in flight; None when there is nothing to do."""
        builder = PlanBuilder()
        offload = self._roster.leases.offload
        if offload is not None:
            offload.begin_step()
        order = self._roster.order()
        budget = StepBudget(self._limits, len(order))
        if len(order):
            self._add_running(builder, order, budget)
        if budget.tokens > 0:
            self._admit(builder, budget, epoch, admit_new=admit_new)
        if offload is not None:
            builder.moves = offload.end_step()
        rows = builder.rows()
        if rows is None:
            return None
        self._roster.table.num_in_flight[rows.slots] += 1
        plan = builder.build(step_id, epoch, rows, self._groups(rows))
        self._counters.num_steps += 1
        self._counters.num_scheduled_tokens += len(plan.token_ids)
        return plan, rows, builder.moves

    def _add_running(self, builder: PlanBuilder, order: IndexArray, budget: StepBudget) -> None:
        """Serve the sequences that hold slots."""
        table, leases = self._roster.table, self._roster.leases
        ends = table.num_expected[order] if self._limits.num_cohorts == 1 else table.num_known[order]
        pending = np.minimum(ends, table.compute_length[order]) - table.num_scheduled[order]
        singles = order[pending == 1][: self._most_singles(pending, budget.tokens)]
        budget.take_singles(len(singles))
        are_long = pending > 1
        chunks = self._cut(order[are_long], pending[are_long], budget)
        growing = singles[table.num_scheduled[singles] >= leases.num_pages[singles] * leases.page_size]
        num_missing = len(growing) + sum(self._num_missing(slot, length) for slot, length in chunks)
        if num_missing > leases.num_available:
            granted = self._share_pages(order, dict(chunks) | dict.fromkeys(singles.tolist(), 1))
            budget.give_back(len(singles) + sum(length for _, length in chunks) - sum(granted.values()))
            singles, growing = (slots[[slot in granted for slot in slots.tolist()]] for slots in (singles, growing))
            chunks = [(slot, granted[slot]) for slot, _ in chunks if slot in granted]
        if len(singles):
            self._add_singles(builder, singles, growing)
        for slot, length in chunks:
            self._add_chunk(builder, slot, length)

    def _cut(self, slots: IndexArray, lengths: IndexArray, budget: StepBudget) -> list[tuple[int, int]]:
        """(slot, tokens) of each, as far as the budget goes."""
        chunks = []
        for slot, length in zip(slots.tolist(), lengths.tolist(), strict=True):
            granted = budget.take(int(self._roster.table.num_scheduled[slot]), length)
            if not granted:
                break
            chunks.append((slot, granted))
        return chunks

    def _most_singles(self, pending: IndexArray, budget: int) -> int:
        """How many rows of one token a step may have: with several cohorts each takes a part of those that have no more
        to compute. The others are in flight then, so that the parts take turns by themselves, and stay equal."""
        if self._limits.num_cohorts == 1:
            return budget
        return min(budget, self._share(int(np.count_nonzero(pending <= 1))))

    def _share(self, number: int) -> int:
        """A cohort's part of so many, rounded up."""
        return -(-number // self._limits.num_cohorts)

    def _num_missing(self, slot: int, length: int) -> int:
        """Pages the lease of `slot` lacks for its next `length` tokens."""
        end = int(self._roster.table.num_scheduled[slot]) + length
        return max(0, self._limits.num_pages_for(end) - int(self._roster.leases.num_pages[slot]))

    def _share_pages(self, order: IndexArray, wanted: dict[int, int]) -> dict[int, int]:
        """Not everybody gets the pages for the tokens that are wanted of his slot: serve by rank, preempting from the
        end of it. Returns how many tokens each slot computes now."""
        table, leases = self._roster.table, self._roster.leases
        granted: dict[int, int] = {}
        num_promised = 0
        for slot in order.tolist():
            if slot not in wanted or not table.is_running[slot]:  # it has been preempted meanwhile
                continue
            missing = self._num_missing(slot, wanted[slot])
            self._preempt_after(slot, num_promised + missing)
            missing = min(missing, leases.num_available - num_promised)
            num_promised += missing
            room = (int(leases.num_pages[slot]) + missing) * self._limits.page_size - int(table.num_scheduled[slot])
            if room > 0:
                granted[slot] = min(wanted[slot], room)
        return granted

    def _preempt_after(self, slot: int, num_pages: int) -> None:
        """Preempt sequences behind `slot` in rank until so many pages are available or will be: those that steps in
        flight still refer to come back later, and nobody else is preempted for them."""
        roster = self._roster
        while roster.leases.num_available < num_pages:
            leaving = ~roster.table.is_running & (roster.table.num_in_flight > 0)
            coming = int(roster.leases.num_pages[leaving].sum())
            if roster.leases.num_available + coming >= num_pages:
                return
            victim = victim_behind(roster, slot)
            if victim == slot:
                return
            roster.preempt(victim)

    def _add_singles(self, builder: PlanBuilder, slots: IndexArray, growing: IndexArray) -> None:
        """A row of one token for each of these, known or just being sampled; those that grow get a page first."""
        table = self._roster.table
        if len(growing):
            builder.add_page_each(growing, *self._roster.leases.grow_each(growing))
        positions = table.num_scheduled[slots]
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

    def _admit(self, builder: PlanBuilder, budget: StepBudget, epoch: int, *, admit_new: bool) -> None:
        """Let sequences into free slots while budget and pages last. One that does not fit is passed only by such as
        came with it and end in the room that is left; see `_one_behind`."""
        limits = self._limits
        num_reserved: int | None = None
        forecast: PoolForecast | None = None
        while budget.tokens > 0 and self._roster.num_running < limits.max_served:
            sequence = self._roster.next_to_admit(admit_new=admit_new)
            if sequence is None or (
                limits.num_cohorts > 1 and len(builder.new_slots) >= self._share(len(self._roster.by_handle))
            ):
                return
            if num_reserved is None:
                num_reserved = self._num_reserved()
            forecast = (forecast or self._forecast()) if sequence.has_known_end else None
            room = _Room(num_reserved, forecast)
            first = self._entrant(sequence, epoch)
            entrant = first if self._has_room(first, room) else None
            if entrant is None and not self._has_lasting_room(first, room):
                entrant = self._one_behind(sequence, room, epoch)
            if entrant is None:
                return
            sequence, namespace, match, num_pages = entrant
            offload = self._roster.leases.offload
            if offload is not None and self._waits_for_host(offload, sequence, namespace, match):
                return
            start = match.num_pages * limits.page_size
            pending = min(len(sequence.token_ids), sequence.compute_length) - start
            granted = budget.take(start, pending)
            if not granted:
                return
            course = self._course_of(entrant)
            slot = self._enter(builder, sequence, namespace, match)
            self._counters.num_chunked_prompts += granted < pending
            self._add_chunk(builder, slot, granted)
            num_reserved += num_pages - int(self._roster.leases.num_pages[slot])
            forecast = None if forecast is None else forecast.with_one(*course)

    def _entrant(self, sequence: Sequence, epoch: int) -> _Entrant:
        """With the pages that it needs at once: those of what it knows and one of output."""
        limits = self._limits
        namespace = Namespace(epoch, None, sequence.request.extra_key)
        match = self._roster.leases.match(namespace, sequence.units, sequence.max_hit // limits.page_size)
        num_tokens = min(len(sequence.token_ids) + limits.page_size, sequence.compute_length)
        return _Entrant(sequence, namespace, match, limits.num_pages_for(num_tokens))

    def _has_room(self, entrant: _Entrant, room: _Room) -> bool:
        """Whether there are pages for it now and, as far as ends are known, to its end. Alone it fits."""
        match, leases = entrant.match, self._roster.leases
        needed = entrant.num_pages - match.num_pages + match.num_unpinned + room.num_reserved
        return needed <= leases.num_available and self._has_lasting_room(entrant, room)

    def _has_lasting_room(self, entrant: _Entrant, room: _Room) -> bool:
        """As far as ends are known."""
        if room.forecast is None or not self._roster.num_running:
            return True
        held, left = self._course_of(entrant)
        return bool(room.forecast.fits(np.array([held]), np.array([left]))[0])

    def _course_of(self, entrant: _Entrant) -> tuple[int, int]:
        """Tokens that the pages of its own hold after this step, which computes all that it knows, at most; and how
        many it will compute after that."""
        num_shared = entrant.match.num_pages - entrant.match.num_unpinned
        num_tokens = min(len(entrant.sequence.token_ids) + 1, entrant.sequence.compute_length)
        held = num_tokens + (1 - num_shared) * self._limits.page_size - 1
        return held, entrant.sequence.compute_length - num_tokens

    def _forecast(self) -> PoolForecast:
        """Of the running sequences whose ends are known; what others hold, and what is shared, is taken to stay. What
        the pool will not hold then, the host will."""
        table, leases, page_size = self._roster.table, self._roster.leases, self._limits.page_size
        order = self._roster.order()
        order = order[table.has_known_end[order]]
        num_own = leases.num_pages[order] - leases.num_matched[order]
        known = np.minimum(table.num_expected[order], table.compute_length[order])
        held = known - (leases.num_matched[order] - 1) * page_size - 1
        num_others = leases.num_used - int(num_own.sum())
        num_kept = leases.num_keepable if self._limits.lends_host_room else 0
        num_tokens = self._limits.max_total_num_tokens + (num_kept - num_others) * page_size
        return PoolForecast(held, table.compute_length[order] - known, num_tokens)

    def _one_behind(self, first: Sequence, room: _Room, epoch: int) -> _Entrant | None:
        """Where the first in line has no room, the next of those that came with it that has, to its end: what is free
        only until others have grown is used by short ones. None where there is none, or it is not known."""
        waiting, marker = self._roster.waiting, (self._roster.generation, self._roster.waiting.num_arrived)
        if room.forecast is None or first.state is not State.WAITING or self._refused == marker:
            return None
        line = [each for each in islice(waiting.first_band(), 1, _MAX_PASSED) if each.has_known_end]
        held = np.array([len(each.token_ids) for each in line], dtype=np.int64) + self._limits.page_size
        left = np.array([each.compute_length for each in line], dtype=np.int64) - held + self._limits.page_size - 1
        for index in np.flatnonzero(room.forecast.fits(held, left))[:_MAX_TRIED].tolist():
            entrant = self._entrant(line[index], epoch)
            if self._has_room(entrant, room):
                return entrant
        self._refused = marker
        return None

    def _waits_for_host(self, offload: Offload, sequence: Sequence, namespace: Namespace, match: Match) -> bool:
        """Whether it had better wait for pages that the host holds: they may just have been sent for. It waits once for
        each: what is evicted again before it gets in is computed."""
        if offload.is_loading:
            return True
        max_pages = sequence.max_hit // self._limits.page_size
        host_pages = offload.find(namespace, sequence.units, match, max_pages)
        if match.num_pages + len(host_pages) <= max(match.num_pages, sequence.num_loaded_pages):
            return False
        sequence.num_loaded_pages = match.num_pages + len(host_pages)
        self._roster.leases.begin_load(namespace, sequence.units, match, host_pages)
        return True

    def _enter(self, builder: PlanBuilder, sequence: Sequence, namespace: Namespace, match: Match) -> int:
        """Give a sequence a slot and the pages of `match`, and count the hit."""
        counters, num_hit = self._counters, match.num_pages * self._limits.page_size
        is_new = sequence.state is State.WAITING
        slot = self._roster.admit(sequence, namespace, match)
        builder.add_new_slot(sequence, slot)
        if num_hit:
            builder.add_page_run(slot, 0, self._roster.leases.pages[slot, : match.num_pages].copy())
        if is_new:
            sequence.started = self._clock()
            sequence.num_cached_tokens = num_hit
            counters.num_prompt_tokens += sequence.num_prompt
            counters.num_cached_tokens += num_hit
            counters.num_shared_prefills += num_hit > 0
        else:
            counters.num_resumed_tokens += num_hit
        return slot

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
        if len(rows.slots) < 2:
            return NO_GROUPS
        generation, slots, groups = self._grouped
        if generation == self._roster.generation and np.array_equal(slots, rows.slots):
            return groups
        leases = self._roster.leases
        if not len(rows.slots):
            return NO_GROUPS
        num_full = rows.starts // self._limits.page_size
        groups = find_groups(leases.pages, rows.slots, num_full, int(leases.num_matched[rows.slots].max()))
        if (rows.lengths == 1).all():
            self._grouped = (self._roster.generation, rows.slots, groups)
        return groups
