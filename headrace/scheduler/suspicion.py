"""Finds the request that makes steps fail. Owns the suspects and the order in which they are tried; decides no step.

Every sequence of a failed step is a suspect. Suspects are tried apart from all others: first together, for the fault
may have passed, then each failing group as two halves. One that fails alone MAX_STRIKES times is guilty. A suspect that
computes all its known tokens and samples the next is cleared. So every trial clears somebody, halves a group or is a
strike, and everybody comes out of the trials with more tokens than before: there is an end, whatever fails.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from headrace.scheduler.sequence import Sequence, State

MAX_STRIKES = 3


class Suspect:
    """A sequence, and how often it has failed with no other sequence in the step."""

    __slots__ = ("num_strikes", "sequence")

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self.num_strikes = 0


class Suspicion:
    """The suspects, in groups that are tried one after the other."""

    def __init__(self) -> None:
        self._groups: deque[list[Suspect]] = deque()

    @property
    def is_active(self) -> bool:
        """True while somebody is suspected, or has ended since the last trial."""
        return bool(self._groups)

    def on_trial(self) -> list[Sequence]:
        """The sequences that alone may run now; empty when everybody may."""
        while self._groups:
            group = [suspect for suspect in self._groups[0] if suspect.sequence.state is not State.ENDED]
            if group:
                self._groups[0] = group
                return [suspect.sequence for suspect in group]
            self._groups.popleft()
        return []

    def accuse(self, sequences: Iterable[Sequence], *, is_alone: bool) -> Sequence | None:
        """A step of these sequences has failed. Returns the one that is guilty beyond doubt, if that is so now.

        `is_alone`: the step had one row. One of several may be left because the others have been answered meanwhile.
        """
        was_trial = self.is_active
        known = {suspect.sequence.handle: suspect for group in self._groups for suspect in group}
        accused = [known.get(sequence.handle) or Suspect(sequence) for sequence in sequences]
        if not accused:
            return None  # all of them have been answered meanwhile
        self.clear(suspect.sequence for suspect in accused)
        if is_alone:
            accused[0].num_strikes += 1
            if accused[0].num_strikes >= MAX_STRIKES:
                return accused[0].sequence
            self._groups.append(accused)
        elif was_trial and len(accused) > 1:
            middle = len(accused) // 2
            self._groups.extendleft([accused[middle:], accused[:middle]])
        else:
            self._groups.append(accused)
        return None

    def clear(self, sequences: Iterable[Sequence]) -> None:
        """These are no suspects any more."""
        handles = {sequence.handle for sequence in sequences}
        groups = ([each for each in group if each.sequence.handle not in handles] for group in self._groups)
        self._groups = deque(group for group in groups if group)
