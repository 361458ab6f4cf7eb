"""Finds the request that makes steps fail, by bisection. Owns the suspects and the order in which they run; decides no
step.

Every sequence of a failed step is a suspect. Suspects run isolated from all others: first together, for the fault may
have passed, then each failing group as two halves. One that fails alone MAX_LONE_FAILURES times is the culprit. A
suspect that computes all its known tokens and samples the next is cleared. So every such step clears somebody, halves a
group or counts a lone failure, and everybody comes out of it with more tokens than before: there is an end, whatever
fails.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from headrace.scheduler.sequence import Sequence, State

MAX_LONE_FAILURES = 3


@dataclass(slots=True)
class Suspect:
    """A sequence, and how often it has failed with no other sequence in the step."""

    sequence: Sequence
    num_lone_failures: int = 0


class FaultIsolation:
    """The suspects, in groups that run one after the other."""

    def __init__(self) -> None:
        self._groups: deque[list[Suspect]] = deque()

    @property
    def is_active(self) -> bool:
        """True while somebody is suspected, or has ended since the last step."""
        return bool(self._groups)

    def isolated(self) -> list[Sequence]:
        """The sequences that alone may run now; empty when everybody may."""
        while self._groups:
            group = [suspect for suspect in self._groups[0] if suspect.sequence.state is not State.ENDED]
            if group:
                self._groups[0] = group
                return [suspect.sequence for suspect in group]
            self._groups.popleft()
        return []

    def narrow(self, sequences: Iterable[Sequence], *, is_alone: bool) -> Sequence | None:
        """A step of these sequences has failed. Returns the culprit, if there is no doubt now.

        `is_alone`: the step had one row. One of several may be left because the others have been answered meanwhile.
        """
        was_active = self.is_active
        known = {suspect.sequence.handle: suspect for group in self._groups for suspect in group}
        failed = [known.get(sequence.handle) or Suspect(sequence) for sequence in sequences]
        if not failed:
            return None  # all of them have been answered meanwhile
        self.clear(suspect.sequence for suspect in failed)
        if is_alone:
            failed[0].num_lone_failures += 1
            if failed[0].num_lone_failures >= MAX_LONE_FAILURES:
                return failed[0].sequence
        if was_active and len(failed) > 1:
            middle = len(failed) // 2
            self._groups.extendleft([failed[middle:], failed[:middle]])
        else:
            self._groups.append(failed)
        return None

    def clear(self, sequences: Iterable[Sequence]) -> None:
        """These are no suspects any more."""
        handles = {sequence.handle for sequence in sequences}
        groups = ([each for each in group if each.sequence.handle not in handles] for group in self._groups)
        self._groups = deque(group for group in groups if group)
