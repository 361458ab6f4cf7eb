"""Who is preempted when pages run out. Must not know pages; changes nothing.

The last in rank has the least to compute again. Where the host's memory keeps what has been computed, and ends are
known, that is not what counts: a batch ends soonest if those run on that have most left, and if few make the room. So
it is the one that holds most beyond what it has left.
"""

from __future__ import annotations

import numpy as np

from headrace.scheduler.roster import Roster
from headrace.scheduler.running_table import IndexArray
from headrace.scheduler.waiting_queue import band_of

_SOON = 2
"""Whoever ends within so many pages makes room by himself."""


def victim_behind(roster: Roster, slot: int) -> int:
    """The slot to be preempted of those behind `slot` in rank; `slot` itself where nobody is."""
    order = roster.order()
    behind = order[int(np.flatnonzero(order == slot)[0]) + 1 :]
    if not len(behind):
        return slot
    candidates = _candidates(roster, behind) if roster.limits.lends_host_room else behind[:0]
    if not len(candidates):
        return int(behind[-1])
    table = roster.table
    left = table.compute_length[candidates] - table.num_expected[candidates]
    worth = table.num_scheduled[candidates] - left
    return int(candidates[np.argmax(np.where(left > _SOON * roster.limits.page_size, worth, worth.min() - 1))])


def _candidates(roster: Roster, slots: IndexArray) -> IndexArray:
    """Those that came with the last, whose ends are known, and whose pages the host can keep for them."""
    table, leases = roster.table, roster.leases
    last = band_of(table.sequence(int(slots[-1])))
    may_go = [band_of(table.sequence(slot)) == last and leases.may_publish(slot) for slot in slots.tolist()]
    return slots[table.has_known_end[slots] & may_go & (leases.num_pages[slots] <= leases.num_keepable)]
