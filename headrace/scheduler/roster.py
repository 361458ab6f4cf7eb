"""Who is waiting, running, preempted or leaving. Owns every change of a sequence's state, its slot and its lease.

A slot and its lease are given back in one place, `retire`, when the sequence is leaving and no step in flight holds a
row of it.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from operator import attrgetter

import numpy as np

from headrace.cache import LeaseTable, Match, Namespace
from headrace.scheduler.limits import SchedulerLimits
from headrace.scheduler.running_table import IndexArray, RunningTable
from headrace.scheduler.sequence import Sequence, State
from headrace.scheduler.waiting_queue import WaitingQueue

_ADMISSIONS_PER_PRIORITY = 1 << 42


class Roster:
    """Live sequences by handle, and where each of them stands.

    `generation` changes whenever a slot changes hands or stops running. While `isolated` names sequences, no other is
    admitted.
    """

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.table = RunningTable(limits)
        self.leases = LeaseTable(
            self.table.units,
            num_slots=limits.num_slots,
            num_columns=limits.num_pages_for(limits.max_length),
            num_pages=limits.num_pages,
            page_size=limits.page_size,
            prefix_cache=limits.prefix_cache,
            num_host_pages=limits.num_host_pages,
            max_page_moves=limits.max_page_moves,
        )
        self.waiting = WaitingQueue()
        self.preempted: list[Sequence] = []
        self.by_handle: dict[int, Sequence] = {}
        self.num_running = 0
        self.num_preemptions = 0
        self._num_admitted = 0  # for the first time
        self.generation = 0
        self.isolated: list[Sequence] = []
        self._num_coming_back = 0
        self._order: IndexArray = np.empty(0, dtype=np.int64)
        self._order_generation = -1

    @property
    def num_started(self) -> int:
        """Live sequences that have held a slot."""
        return len(self.by_handle) - len(self.waiting)

    def order(self) -> IndexArray:
        """Running slots, first to be served first, int64."""
        if self._order_generation != self.generation:
            slots = np.flatnonzero(self.table.is_running)
            self._order = slots[np.argsort(self.table.rank[slots], kind="stable")]
            self._order_generation = self.generation
        return self._order

    def accept(self, sequence: Sequence) -> None:
        self.by_handle[sequence.handle] = sequence
        self.waiting.push(sequence)

    def next_to_admit(self, *, admit_new: bool) -> Sequence | None:
        """The sequence that may enter a slot next: preempted ones first. None while one is still leaving its slot."""
        if not self.table.free_slots or self._num_coming_back:
            return None
        if self.isolated:
            return next((sequence for sequence in self.isolated if sequence.slot < 0), None)
        if self.preempted:
            return self.preempted[0]
        return self.waiting.first() if admit_new else None

    def admit(self, sequence: Sequence, namespace: Namespace, match: Match) -> int:
        """Give the sequence that `next_to_admit` named, or one behind it, a slot and a lease that starts with `match`.
        Whoever is admitted first is preempted last: the last has the least to compute again."""
        if sequence.state is State.WAITING:
            self.waiting.remove(sequence)
            sequence.rank = self._num_admitted - sequence.request.priority * _ADMISSIONS_PER_PRIORITY
            self._num_admitted += 1
        else:
            self._leave_line(sequence)
        sequence.num_loaded_pages = 0
        slot = self.table.enter(sequence, match.num_pages * self.limits.page_size)
        self.leases.open(slot, namespace, match)
        self.num_running += 1
        self.generation += 1
        return slot

    def preempt(self, slot: int) -> None:
        """Take a running sequence off its slot, to be admitted again later with the tokens it has."""
        sequence = self.table.sequence(slot)
        sequence.state = State.PREEMPTED
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._num_coming_back += 1
        self._stop(slot)

    def end(self, sequence: Sequence) -> None:
        """The sequence has its terminal answer: forget it, and free what it holds as soon as no step refers to it."""
        state, sequence.state = sequence.state, State.ENDED
        del self.by_handle[sequence.handle]
        slot = sequence.slot
        if state is State.WAITING:
            self.waiting.remove(sequence)
        elif slot < 0:
            self._leave_line(sequence)
        else:
            self.table.accepts[slot] = False
            if state is State.PREEMPTED:
                self._num_coming_back -= 1
            else:
                self._stop(slot)

    def rebuilt(self) -> Roster:
        """A roster of the same live sequences with the tokens they have. None holds a slot, nothing is cached.

        Whatever refers to this one's slots and pages is void. Believes no books but `by_handle` and the tokens.
        """
        fresh = Roster(self.limits)
        fresh.num_preemptions = self.num_preemptions
        fresh._num_admitted = self._num_admitted
        fresh.leases.num_evicted_pages = self.leases.num_evicted_pages
        for sequence in self.by_handle.values():
            sequence.num_loaded_pages, sequence.kept_by_host = 0, []
            if sequence.state is State.WAITING:
                fresh.accept(sequence)
                continue
            if sequence.slot >= 0:
                self.table.save(sequence)
                sequence.slot = -1
            if sequence.state is State.RUNNING:
                sequence.num_preemptions += 1
                fresh.num_preemptions += 1
            sequence.state = State.PREEMPTED
            fresh.by_handle[sequence.handle] = sequence
            insort(fresh.preempted, sequence, key=attrgetter("rank"))
        return fresh

    def forget(self, sequence: Sequence) -> None:
        """The sequence has its terminal answer, and the books will be rebuilt: touch no more of them than this."""
        sequence.state = State.ENDED
        self.by_handle.pop(sequence.handle, None)

    def retire(self, slots: Iterable[int]) -> None:
        """Take back the slots and pages of sequences that are leaving and that no step in flight refers to, after
        publishing the whole pages whose tokens are known and whose KV is written."""
        for slot in slots:
            sequence = self.table.sequence(slot)
            num_tokens = int(min(self.table.num_known[slot], self.table.num_scheduled[slot]))
            self.leases.publish(slot, num_tokens, is_last=True)
            if sequence.state is State.PREEMPTED:
                sequence.kept_by_host = self.leases.keep(slot)
            self.leases.close(slot)
            self.table.leave(slot)
            self.generation += 1
            if sequence.state is State.PREEMPTED:
                self._num_coming_back -= 1
                insort(self.preempted, sequence, key=attrgetter("rank"))

    def flush_cache(self) -> int:
        """Unpublish every prefix; returns the pages freed. The host keeps for nobody what he can no longer find."""
        self.drop_kept()
        return self.leases.flush()

    def drop_kept(self) -> None:
        """What the host keeps for preempted sequences is of no use to them any more: it need not."""
        for sequence in self.preempted:
            self._drop_kept(sequence)

    def _leave_line(self, sequence: Sequence) -> None:
        """A preempted sequence comes back, or has its answer."""
        self.preempted.remove(sequence)
        self._drop_kept(sequence)

    def _drop_kept(self, sequence: Sequence) -> None:
        self.leases.drop(sequence.kept_by_host)
        sequence.kept_by_host = []

    def _stop(self, slot: int) -> None:
        self.table.is_running[slot] = False
        self.num_running -= 1
        self.generation += 1
        if self.table.num_in_flight[slot] == 0:
            self.retire((slot,))
