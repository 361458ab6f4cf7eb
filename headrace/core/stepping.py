"""The pipeline of plans between scheduler and executor. Owns which plans are in flight, and nothing of why."""

from __future__ import annotations

import contextlib

from headrace.core.executor import Executor, StepError
from headrace.core.outbox import Outbox
from headrace.ipc import Phase, Pulse
from headrace.scheduler import Scheduler
from headrace.types.errors import InternalError


class Stepper:
    """Keeps up to `overlap_depth` + 1 plans in flight and applies results in plan order."""

    def __init__(
        self, scheduler: Scheduler, executor: Executor, outbox: Outbox, pulse: Pulse, overlap_depth: int
    ) -> None:
        self.num_completed = 0
        self._scheduler = scheduler
        self._executor = executor
        self._outbox = outbox
        self._pulse = pulse
        self._max_in_flight = overlap_depth + 1

    def step(self, *, may_submit: bool, admit_new: bool) -> bool:
        """Fill the pipeline if allowed, then complete its oldest plan. Returns whether one was completed."""
        scheduler = self._scheduler
        while may_submit and scheduler.num_in_flight < self._max_in_flight:
            plan = scheduler.plan(admit_new=admit_new)
            if plan is None:
                break
            self._pulse.enter(Phase.EXECUTING)
            self._executor.submit(plan)
            self._pulse.enter(Phase.DECIDING)
        if not scheduler.num_in_flight:
            return False
        self._complete()
        return True

    def settle(self) -> None:
        """Complete every plan in flight: afterwards no step runs until the next `step`. Part of a command."""
        while self._scheduler.num_in_flight:
            self._complete()
        self._pulse.enter(Phase.COMMANDING)

    def _complete(self) -> None:
        self._pulse.enter(Phase.EXECUTING)
        try:
            result = self._executor.collect()
        except StepError as error:
            self._abandon(error)
        else:
            self._pulse.enter(Phase.DECIDING)
            self._outbox.add(self._scheduler.apply(result))
            self.num_completed += 1
        self._pulse.stepped()

    def _abandon(self, error: StepError) -> None:
        """A step failed: end what had started, and go on with what waits. Later plans built on it and are dropped."""
        for _ in range(self._scheduler.num_in_flight - 1):
            with contextlib.suppress(StepError):
                self._executor.collect()
        self._outbox.add(self._scheduler.abandon_in_flight(InternalError(str(error)).info()))
