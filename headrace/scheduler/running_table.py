"""Running sequences as arrays by slot. Owns their tokens, counters and flags while they hold a slot.

Everything a steady step reads or writes is here as one array per field, so that planning and applying it are a few
vector operations whatever the number of rows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from headrace.cache import UNIT_BYTES
from headrace.scheduler.limits import SchedulerLimits
from headrace.scheduler.sequence import Sequence, State

IndexArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

STOP_IDS_PER_SLOT = 8
NO_STOP_ID = -2


class RunningTable:
    """Fields by slot. Positions are absolute; lengths count from the start of the prompt."""

    def __init__(self, limits: SchedulerLimits) -> None:
        count, width = limits.num_slots, limits.max_length
        self.token_ids = np.zeros((count, width), dtype=np.int32)  # by position, as far as the sequence reaches
        self.logprobs = np.zeros((count, width), dtype=np.float32)
        self.num_prompt = np.zeros(count, dtype=np.int64)
        self.num_entered = np.zeros(count, dtype=np.int64)  # tokens known when the sequence entered the slot
        self.num_known = np.zeros(count, dtype=np.int64)  # prompt and accepted output
        self.num_expected = np.zeros(count, dtype=np.int64)  # known, or about to be sampled by a step in flight
        self.num_scheduled = np.zeros(count, dtype=np.int64)  # positions computed, or being so by a step in flight
        self.num_delivered = np.zeros(count, dtype=np.int64)
        self.num_in_flight = np.zeros(count, dtype=np.int64)  # steps in flight that hold a row of the slot
        self.max_length = np.zeros(count, dtype=np.int64)
        self.compute_length = np.zeros(count, dtype=np.int64)
        self.min_length = np.zeros(count, dtype=np.int64)
        self.deliver_every = np.zeros(count, dtype=np.int64)
        self.rank = np.zeros(count, dtype=np.int64)
        self.has_known_end = np.zeros(count, dtype=np.bool_)  # see `Sequence`
        self.version = np.full(count, -1, dtype=np.int64)  # its index, of the last accepted token; -1 before the first
        self.stop_ids = np.full((count, STOP_IDS_PER_SLOT), NO_STOP_ID, dtype=np.int32)
        self.many_stops: dict[int, frozenset[int]] = {}  # the sets that are longer
        self.is_running = np.zeros(count, dtype=np.bool_)  # may get rows; its sequence is not leaving
        self.accepts = np.zeros(count, dtype=np.bool_)  # False once its sequence was answered, or was brought no token
        self.sequences: list[Sequence | None] = [None] * count
        self.free_slots = list(range(count - 1, -1, -1))

    def sequence(self, slot: int) -> Sequence:
        found = self.sequences[slot]
        assert found is not None, f"slot {slot} is free"
        return found

    def enter(self, sequence: Sequence, num_computed: int) -> int:
        """Give a sequence a free slot; the KV of its first `num_computed` tokens is there already."""
        slot = self.free_slots.pop()
        request = sequence.request
        num_known = len(sequence.token_ids)
        self.token_ids[slot, :num_known] = sequence.token_ids
        if num_known > sequence.num_prompt:
            self.logprobs[slot, sequence.num_prompt : num_known] = sequence.logprobs
        self.num_prompt[slot] = sequence.num_prompt
        self.num_entered[slot] = self.num_known[slot] = self.num_expected[slot] = num_known
        self.num_scheduled[slot] = num_computed
        self.num_delivered[slot] = sequence.num_prompt + sequence.num_delivered
        self.max_length[slot] = sequence.max_length
        self.compute_length[slot] = sequence.compute_length
        self.min_length[slot] = sequence.num_prompt + request.min_new_tokens
        self.deliver_every[slot] = request.deliver_every
        self.rank[slot] = sequence.rank
        self.has_known_end[slot] = sequence.has_known_end
        self.version[slot] = sequence.version_index
        stop_ids = sequence.stop_token_ids
        self.stop_ids[slot] = NO_STOP_ID
        if len(stop_ids) <= STOP_IDS_PER_SLOT:
            self.stop_ids[slot, : len(stop_ids)] = stop_ids
            self.many_stops.pop(slot, None)
        else:
            self.many_stops[slot] = frozenset(stop_ids)
        self.is_running[slot] = self.accepts[slot] = True
        self.sequences[slot] = sequence
        sequence.slot = slot
        sequence.state = State.RUNNING
        return slot

    def leave(self, slot: int) -> None:
        """Free a slot that no step in flight refers to, saving the tokens of a sequence that will come back."""
        sequence = self.sequence(slot)
        assert self.num_in_flight[slot] == 0, "a slot was left with steps in flight"
        if sequence.state is not State.ENDED:
            self.save(sequence)
        sequence.slot = -1
        self.sequences[slot] = None
        self.is_running[slot] = self.accepts[slot] = False
        self.free_slots.append(slot)

    def units(self, slot: int, first: int, last: int) -> bytes:
        """What the prefix cache knows positions first..last-1 of a slot by: its sequence's units as it entered, then
        the ids of the tokens sampled since."""
        known = self.sequence(slot).units
        start = max(first, len(known) // UNIT_BYTES)
        return known[first * UNIT_BYTES : last * UNIT_BYTES] + self.token_ids[slot, start:last].tobytes()

    def save(self, sequence: Sequence) -> None:
        """Copy into a sequence the tokens it has, as known here."""
        slot = sequence.slot
        num_known = int(self.num_known[slot])
        sequence.units = self.units(slot, 0, num_known)
        sequence.token_ids = self.token_ids[slot, :num_known].copy()
        sequence.logprobs = self.logprobs[slot, sequence.num_prompt : num_known].copy()
        sequence.num_delivered = int(self.num_delivered[slot]) - sequence.num_prompt
