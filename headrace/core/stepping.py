"""The pipeline of plans between scheduler and executor. Owns which plans are in flight, and nothing of why."""

from __future__ import annotations

import contextlib

from headrace.core.canary import check_device
from headrace.core.executor import Executor
from headrace.core.faults import StepError
from headrace.core.outbox import Outbox
from headrace.ipc import Phase, Pulse
from headrace.scheduler import BREACHES, Scheduler
from headrace.types.errors import InternalError
from headrace.types.request import Delta

MAX_BLAMELESS = 32
"""Steps in a row that may fail through nobody's fault; from then on it is treated as somebody's, so that there is an
end."""


class Stepper:
    """Keeps up to `overlap_depth` + 1 plans in flight and applies results in plan order."""

    def __init__(
        self, scheduler: Scheduler, executor: Executor, outbox: Outbox, pulse: Pulse, overlap_depth: int
    ) -> None:
        self.num_completed = 0
        self._scheduler = scheduler
        self._executor = executor
        self.submit, self.collect = executor.submit, executor.collect
        """The executor's; who looks at steps stands around them (`headrace.core.probing`)."""
        self._outbox = outbox
        self._pulse = pulse
        self._max_in_flight = overlap_depth + 1
        self._num_uncollected = 0
        self._num_blameless = 0

    def step(self, *, may_submit: bool, admit_new: bool) -> bool:
        """Fill the pipeline if allowed, then complete its oldest plan. False when there was nothing to do."""
        scheduler = self._scheduler
        self._drop_void_results()
        stepped = may_submit and not self._fill(admit_new=admit_new)
        if scheduler.num_in_flight:  # none after a recovery
            self._complete()
            stepped = True
        self._pulse.enter(Phase.COMMANDING)
        if not stepped:
            num_runnable = scheduler.num_live if admit_new else scheduler.num_started
            self._pulse.found_nothing(has_work=may_submit and num_runnable > 0)
        return stepped

    def settle(self) -> None:
        """Complete every plan in flight: afterwards no step runs until the next `step`. Part of a command."""
        self._drop_void_results()
        while self._scheduler.num_in_flight:
            self._complete()
        self._pulse.enter(Phase.COMMANDING)

    def _fill(self, *, admit_new: bool) -> bool:
        """Issue plans up to the depth. False when the scheduler broke down over it, and recovered."""
        scheduler, pulse = self._scheduler, self._pulse
        while scheduler.num_in_flight < self._max_in_flight:
            pulse.enter(Phase.DECIDING)
            try:
                plan = scheduler.plan(admit_new=admit_new)
            except BREACHES as breach:
                self._go_on(scheduler.recover(breach))
                return False
            if plan is None:
                break
            pulse.enter(Phase.EXECUTING)
            self.submit(plan)
            self._num_uncollected += 1
        return True

    def _complete(self) -> None:
        self._pulse.enter(Phase.EXECUTING)
        self._num_uncollected -= 1
        try:
            result = self.collect()
        except StepError as error:
            self._pulse.enter(Phase.DECIDING)
            self._num_blameless = self._num_blameless + 1 if error.is_blameless else 0
            is_blamed = not 0 < self._num_blameless <= MAX_BLAMELESS
            failed = self._scheduler.lose_step(InternalError(str(error)).info(), is_blamed=is_blamed)
            self._drop_void_results()
            if failed and not error.is_refusal:
                self._pulse.enter(Phase.EXECUTING)
                check_device(self._executor, error, self._scheduler.epoch)
            self._outbox.add(failed)
        else:
            self._pulse.enter(Phase.DECIDING)
            try:
                self._outbox.add(self._scheduler.apply(result))
            except BREACHES as breach:
                self._go_on(self._scheduler.recover(breach))
            self.num_completed += 1
            self._num_blameless = 0
        self._pulse.stepped()

    def _go_on(self, deltas: list[Delta]) -> None:
        """The scheduler has given up all plans in flight. None may be left: weights may change next."""
        self._outbox.add(deltas)
        self._drop_void_results()

    def _drop_void_results(self) -> None:
        """Collect and forget what comes of plans that the scheduler has given up: they are older than any it makes."""
        while self._num_uncollected > self._scheduler.num_in_flight:
            self._num_uncollected -= 1
            self._pulse.enter(Phase.EXECUTING)
            with contextlib.suppress(StepError):
                self._executor.collect()
