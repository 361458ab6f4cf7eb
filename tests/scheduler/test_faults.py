"""Failing steps and broken books at random moments: the culprits are found, and nobody else notices.

Everything is checked against the strict device and the true tokens of each request, as in `test_properties`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from headrace.scheduler import SchedulerLimits
from headrace.scheduler.fault_isolation import MAX_LONE_FAILURES
from headrace.types.plan import StepPlan
from tests.rounds import rounds
from tests.scheduler.harness import Harness, random_limits
from tests.scheduler.test_properties import NAMES, play_event

NUM_SEQUENCES = rounds(110)
NUM_FAILING = rounds(70)
EVENTS = [name for name in NAMES if name not in ("lose_step", "fail", "expire")]


class Injected(AssertionError):
    """A broken invariant that a test has made up."""


class FailingHarness(Harness):
    """Plans fail at random, and always when they take a culprit past its fatal position.

    What fails at random never fails so often that a request would be thought the culprit.
    """

    def __init__(self, limits: SchedulerLimits, random_: random.Random) -> None:
        super().__init__(limits)
        self.random = random_
        self.failure_rate = 0.0
        self.fatal: dict[int, int] = {}
        self.num_failures = 0
        self._is_doomed: list[bool] = []
        self._num_alone: Counter[int] = Counter()

    def issue(self, *, admit_new: bool = True) -> StepPlan | None:
        plan = super().issue(admit_new=admit_new)
        if plan is not None:
            self._is_doomed.append(self._dooms(plan))
        return plan

    def land(self) -> None:
        if self._is_doomed[0]:
            self.num_failures += 1
            self.lose_steps()
            return
        self._is_doomed.pop(0)
        for handle, samples in self._rows(self.device.in_flight[0].plan):
            if samples:
                self._num_alone.pop(handle, None)
        super().land()

    def lose_steps(self) -> None:
        self._is_doomed.clear()
        super().lose_steps()

    def _dooms(self, plan: StepPlan) -> bool:
        handles = [handle for handle, _ in self._rows(plan)]
        ends = (plan.row_starts + plan.row_lengths).tolist()
        if any(end > self.fatal.get(handle, end) for handle, end in zip(handles, ends, strict=True)):
            return True
        if self.random.random() >= self.failure_rate:
            return False
        if len(handles) == 1:
            if self._is_doomed:
                return False  # what is in flight decides how often it has failed already
            self._num_alone[handles[0]] += 1
            return self._num_alone[handles[0]] < MAX_LONE_FAILURES
        return True

    def _rows(self, plan: StepPlan) -> list[tuple[int, bool]]:
        slots = plan.row_slots.tolist()
        return [(self.device.slots[slot].init.seed, bool(s)) for slot, s in zip(slots, plan.row_samples, strict=True)]


def play_failures(seed: int, depth: int) -> FailingHarness:
    random_ = random.Random(seed)
    harness = FailingHarness(random_limits(random_, depth), random_)
    harness.failure_rate = random_.choice((0.0, 0.05, 0.3))
    culprit_rate = random_.choice((0.0, 0.1, 0.5, 1.0)) if seed % 3 else 0.0
    family = random_.randrange(100)
    for now in range(8 + seed % 12):
        num_known = len(harness.truths)
        play_event(random_.choice(EVENTS), random_, harness, family, float(now))
        for handle in list(harness.truths)[num_known:]:
            if random_.random() < culprit_rate:
                harness.fatal[handle] = random_.randrange(harness.limits.context_length)
    harness.end()
    return harness


def check_verdicts(harness: FailingHarness) -> int:
    """Only culprits were ended, and all who went too far; returns how many."""
    num_condemned = 0
    for handle, received in harness.received.items():
        if received.final is None or received.final.finish is None:
            continue
        num_known = len(harness.truths[handle].prompt) + len(received.token_ids)
        if received.final.finish.type == "error":
            num_condemned += 1
            assert handle in harness.fatal and harness.fatal[handle] <= num_known
        elif received.final.finish.type in ("stop", "length"):
            assert max(1, num_known - 1) <= harness.fatal.get(handle, num_known)
    return num_condemned


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_only_culprits_fail_whatever_else_happens(depth: int) -> None:
    num_condemned = num_failures = num_whole = 0
    for seed in range(NUM_FAILING):
        harness = play_failures(4 * seed + depth, depth)
        found = check_verdicts(harness)
        metrics = harness.scheduler.metrics()
        assert metrics["num_isolated_failures"] == metrics["num_failed"] == found
        assert metrics["num_failed_steps"] == harness.num_failures and metrics["num_invariant_breaches"] == 0
        num_condemned, num_failures = num_condemned + found, num_failures + harness.num_failures
        num_whole += int(metrics["num_finished"])
    assert num_condemned > 20 and num_failures > 123 and num_whole > 123


def raise_once(owner: Any, name: str, *, after: bool) -> Callable[[], bool]:
    """The next call of a method breaks, before or after its work; returns what ends that and says whether it has."""
    real = getattr(owner, name)

    def broken(*args: Any, **kwargs: Any) -> Any:
        delattr(owner, name)
        if after:
            real(*args, **kwargs)
        raise Injected(name)

    setattr(owner, name, broken)

    def disarm() -> bool:
        is_armed = name in vars(owner)
        if is_armed:
            delattr(owner, name)
        return not is_armed

    return disarm


class BreakingHarness(Harness):
    """Breaks methods behind `plan`, `apply`, `abort` and `discard`, and recovers as the core does."""

    METHODS = (
        ("leases", ("match", "open", "grow", "grow_each", "publish", "close")),
        ("table", ("enter", "leave")),
        ("roster", ("admit", "preempt", "end", "retire")),
        ("applier", ("_take_tokens", "_take_column", "_mark_version", "_take_extras", "_deliver_due", "delta")),
        ("planner", ("_add_singles", "_add_chunk", "_groups", "_enter")),
    )

    def __init__(self, limits: SchedulerLimits, random_: random.Random) -> None:
        super().__init__(limits)
        self.random = random_
        self.num_breaches = 0
        self.broken: Counter[str] = Counter()
        self._num_plans_broken = 0

    def issue(self, *, admit_new: bool = True) -> StepPlan | None:
        if self._num_plans_broken >= MAX_LONE_FAILURES - 1:
            return super().issue(admit_new=admit_new)
        try:
            plan: StepPlan | None = self._breaking(lambda: super(BreakingHarness, self).issue(admit_new=admit_new))
            return plan
        except Injected as breach:
            self._num_plans_broken += 1
            self._survive(breach)
            return super().issue(admit_new=admit_new)

    def land(self) -> None:
        self._num_plans_broken = 0
        try:
            self._breaking(super().land)
        except Injected as breach:
            self._survive(breach)

    def end_some(self, handles: list[int]) -> None:
        """Abort or discard, breaking something."""
        if self.random.random() < 0.5:
            self.take(self._breaking(lambda: self.scheduler.abort(handles, "stopped")))
        else:
            self._breaking(lambda: self.discard([h for h in handles if self.received[h].final is None]))
        if len(self.device.in_flight) > self.scheduler.num_in_flight:
            self.forget_steps()

    def _breaking(self, action: Callable[[], Any]) -> Any:
        if self.random.random() > 0.15:
            return action()
        scheduler = self.scheduler
        parts = {
            "leases": scheduler._roster.leases,
            "table": scheduler._roster.table,
            "roster": scheduler._roster,
            "applier": scheduler._applier,
            "planner": scheduler._planner,
        }
        part, names = self.random.choice(self.METHODS)
        name = self.random.choice(names)
        disarm = raise_once(parts[part], name, after=self.random.random() < 0.5)
        try:
            return action()
        finally:
            if disarm():
                self.num_breaches += 1
                self.broken[name] += 1

    def _survive(self, breach: Injected) -> None:
        self.forget_steps()
        self.take(self.scheduler.recover(breach))
        assert self.scheduler.num_in_flight == 0


def play_breaches(seed: int, depth: int) -> BreakingHarness:
    random_ = random.Random(seed)
    harness = BreakingHarness(random_limits(random_, depth), random_)
    family = random_.randrange(100)
    for now in range(8 + seed % 12):
        name = random_.choice(EVENTS)
        if name in ("abort", "discard"):
            known = sorted(harness.received)
            harness.end_some(random_.sample(known, min(len(known), 2)))
        elif name not in ("abort_all", "update"):
            play_event(name, random_, harness, family, float(now))
    harness.end()
    return harness


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_broken_books_are_rebuilt_and_everybody_is_answered(depth: int) -> None:
    broken: Counter[str] = Counter()
    num_whole = num_errors = 0
    for seed in range(NUM_SEQUENCES // 2):
        harness = play_breaches(4 * seed + depth, depth)
        broken += harness.broken
        assert harness.scheduler.metrics()["num_invariant_breaches"] == harness.num_breaches
        for received in harness.received.values():
            finish = received.final.finish if received.final is not None else None
            num_whole += finish is not None and finish.type in ("stop", "length")
            if finish is not None and finish.type == "error":
                num_errors += 1
                assert "invariant" in finish.message, "only what broke in the middle of a result is ended"
    assert num_whole > 160 and num_errors > 5
    assert len(broken) > 12, f"few things broke: {broken}"
