"""What comes of plans on the last of several stages, as rank 0 hears of it. Owns how long it waits, and what a step is
that failed on some stage: each hands on what it has, so the others are over with it, and nothing of it counts."""

from __future__ import annotations

import time

from headrace.core.rank_group import ANSWER_SECONDS, OtherRanks
from headrace.core.rank_results import ResultOn
from headrace.ipc.rank_page import NUM_RESULTS
from headrace.types.plan import StepResult

_SLICE_SECONDS = 0.1


class StepFailedThere(RuntimeError):
    """A step failed on a rank of another stage."""


class StageResults:
    """Results that rank `sampler` sends, one for each plan that was sent, in their order."""

    def __init__(self, others: OtherRanks, sampler: int, seconds: float) -> None:
        self._others, self._sampler, self._seconds = others, sampler, seconds
        self._found: dict[int, ResultOn] = {}  # not asked for yet: some are of plans that were given up

    def of(self, number: int) -> StepResult:
        """That of plan `number`. Raises `StepFailedThere`, and `DeviceLost` where it does not come."""
        result = self._await(number)
        failure = self._others.failure_until(number)
        if failure or result is None:
            raise StepFailedThere(failure or f"{self._others.names([self._sampler])} failed in a step")
        return result

    def _await(self, number: int) -> StepResult | None:
        others, now = self._others, time.monotonic()
        until, failed_until = now + self._seconds, now + ANSWER_SECONDS
        while True:
            self._found.update((found.number, found) for found in others.take_results())
            if number in self._found:
                result = self._found.pop(number)
                for old in [each for each in self._found if each < number - NUM_RESULTS]:
                    del self._found[old]
                return result.taken()
            now, name = time.monotonic(), others.names([self._sampler])
            if now >= until:
                raise others.lose(f"{name} has not executed a step for {self._seconds:g} s")
            if now >= failed_until and others.failure_until(number):
                raise others.lose(f"{others.failure_until(number)}; and {name} has not come to the end of it")
            others.look(self._sampler, _SLICE_SECONDS)
