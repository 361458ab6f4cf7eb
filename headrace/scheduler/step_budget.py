"""How much a step may still compute. Owns the rule for what a prompt's tokens cost beside rows that wait for them; must
not know sequences or pages."""

from __future__ import annotations

import math

from headrace.scheduler.limits import SchedulerLimits


class StepBudget:
    """Tokens that are left, and once rows decode in the step, what is left of `limits.max_step_cost`: a token costs 1,
    and as much again for each `limits.attended_per_token` positions before it."""

    def __init__(self, limits: SchedulerLimits, num_running: int) -> None:
        self.tokens = limits.step_tokens(num_running)
        self._limits = limits
        self._cost = math.inf
        self._is_first = True

    def take_singles(self, number: int) -> None:
        """So many rows decode, one token each: from now on what others take is bounded."""
        self.tokens -= number
        if number and self._limits.max_step_cost:
            self._cost = self._limits.max_step_cost

    def take(self, start: int, wanted: int) -> int:
        """How many of so many tokens, from position `start` on, the step may compute: all, or as many as are left. The
        first to ask gets one at least, so that everybody gets on."""
        granted = min(wanted, self.tokens)
        if self._cost < math.inf:
            granted = min(granted, max(self._affordable(start), int(self._is_first)))
            self._cost -= self._cost_of(start, granted)
        self._is_first = False
        self.tokens = self.tokens - granted if granted == wanted else 0
        return granted

    def give_back(self, tokens: int) -> None:
        """So many were granted and will not be computed: there are no pages for them."""
        self.tokens += tokens

    def _cost_of(self, start: int, number: int) -> float:
        return number * (1 + (start + number / 2) / self._limits.attended_per_token)

    def _affordable(self, start: int) -> int:
        """The most tokens from there that cost no more than what is left: n + n (start + n / 2) / a <= cost."""
        a = self._limits.attended_per_token
        each = 1 + start / a
        return int(a * (math.sqrt(each * each + 2 * max(0.0, self._cost) / a) - each))
