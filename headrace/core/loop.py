"""The step loop. Owns the order of things in a turn: commands, one step, then what may happen between steps.

A turn waits for the oldest step in flight, and where a commit that the device has begun must end first, 0.2 ms at a
time. Else the loop sleeps only in `CoreLink.poll`, when the last turn found nothing to do, until the next command or
the next deadline.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from headrace.config import ResolvedConfig
from headrace.core.commands import apply_command
from headrace.core.executor import Executor
from headrace.core.replica import Replica
from headrace.ipc import CoreLink, Phase, Pulse
from headrace.types.errors import ErrorInfo, PauseTimeoutError
from headrace.types.messages import Command, GiveUp

STAGE_BUDGET_BUSY_S = 0.0008
"""Seconds of staging or reading at a step boundary while requests run; a boundary costs at most a millisecond."""

STAGE_BUDGET_IDLE_S = 0.02
"""The same while no step runs: long enough not to matter, short enough to answer commands between two slices."""

_LONGEST_WAIT_S = 3600.0
_EXPIRY_CHECK_S = 0.25
_JOINING_LOOK_S = 0.001
"""Between two looks, where nothing else is done, at a group that is being joined: its thread does not wake the loop."""


class CoreLoop:
    """Steps a replica until it is shut down or its front goes away."""

    def __init__(
        self,
        resolved: ResolvedConfig,
        executor: Executor,
        link: CoreLink,
        *,
        front: int = 0,
        clock: Callable[[], float] = time.monotonic,
        pulse: Pulse | None = None,
    ) -> None:
        """`front` is the number of who is at the other end of `link`."""
        self.front = front
        self._link = link
        self._pulse = pulse or Pulse()
        self._clock = clock
        self._pause_timeout = resolved.engine.pause_timeout
        self._held_since: float | None = None
        self._next_expiry = 0.0
        self.replica = Replica(resolved, executor, link, self._pulse, clock())

    def run(self) -> None:
        """Run until `Shutdown`. Raises `PeerClosed` when the front is gone; closes nothing."""
        is_busy = True
        while not self.replica.is_ending:
            is_busy = self.turn(0.0 if is_busy else self._time_to_deadline())

    def turn(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for commands, apply them, and do one step. False when nothing was to be done."""
        replica = self.replica
        if timeout > 0:
            self._pulse.enter(Phase.IDLE)
        commands = self._link.poll(timeout)
        if timeout > 0:
            self._pulse.enter(Phase.COMMANDING)
        if commands and not self._apply(commands):
            return False
        if self._is_quiet:  # nearly always
            self._held_since = None
            stepped = replica.stepper.step(may_submit=True, admit_new=True)
            replica.outbox.flush(force=not stepped)
            return stepped
        pause, update, memory = replica.pause, replica.update, replica.memory
        may_submit = not replica.stands_still and not update.holder
        admit_new = not pause.is_draining and not update.is_draining
        stepped = replica.stepper.step(may_submit=may_submit, admit_new=admit_new)
        replica.outbox.flush()
        now = self._clock()
        pause.advance(now, lacks=memory.is_wanted, holder=update.holder)
        update.expire(now)
        replica.reading.expire(now)
        memory.expire(now)
        replica.groups.advance(now)
        budget = STAGE_BUDGET_BUSY_S if stepped else STAGE_BUDGET_IDLE_S
        progressed = memory.advance(budget) or update.advance(budget, now) or replica.reading.advance(budget)
        self._expire_held_requests(now)
        replica.outbox.flush(force=not stepped)
        return stepped or progressed

    def _apply(self, commands: list[Command]) -> bool:
        """Do what the front asks for; False when that is the end."""
        given_up = set[int]()
        for command in commands:
            if isinstance(command, GiveUp):
                given_up.add(command.target)
        for command in commands:
            apply_command(self.replica, command, self.front, self._clock, given_up)
            if self.replica.is_ending:
                return False
        return True

    def fail_requests(self, error: ErrorInfo) -> None:
        """Answer every request with `error`: the loop has crashed and does not go on."""
        self.replica.outbox.add(self.replica.scheduler.fail(None, error))
        self.replica.outbox.flush(force=True)

    @property
    def _is_quiet(self) -> bool:
        """Nothing waits for what happens between steps, and nothing holds them up."""
        replica, memory = self.replica, self.replica.memory
        if not replica.update.is_quiet or memory.lacks or memory.jobs:
            return False
        return not (replica.pause.pauses or replica.reading.reads or replica.groups.joining)

    def _expire_held_requests(self, now: float) -> None:
        """Answer requests that have waited behind a pause, an update or for memory for `pause_timeout`."""
        replica = self.replica
        held = replica.pause.mode is not None or replica.update.holder or replica.update.is_draining
        held = held or bool(replica.memory.lacks)
        if not held:
            self._held_since = None
            return
        if self._held_since is None:
            self._held_since = now
            self._next_expiry = now + self._pause_timeout
        if now < self._next_expiry:
            return
        self._next_expiry = now + min(_EXPIRY_CHECK_S, max(0.01, self._pause_timeout / 4))
        error = PauseTimeoutError(f"the request waited behind a pause for {self._pause_timeout:g} s")
        replica.outbox.add(replica.scheduler.expire(now - self._pause_timeout, error.info()))

    def _time_to_deadline(self) -> float:
        replica = self.replica
        longest = min(replica.executor.attend(), _LONGEST_WAIT_S)
        if self._is_quiet:
            return longest
        if look_s := replica.update.look_s:
            return look_s
        if replica.groups.joining:
            return _JOINING_LOOK_S
        owners = (replica.pause, replica.update, replica.reading, replica.memory)
        deadlines = [owner.deadline for owner in owners]
        if self._held_since is not None and replica.scheduler.num_waiting:
            deadlines.append(self._next_expiry)
        waits = [deadline - self._clock() for deadline in deadlines if deadline is not None]
        return max(0.0, min([*waits, longest]))
