"""Pausing generation. Owns the pause mode and the calls that wait for a drain; knows no weights.

    abort       everything accepted so far is answered now with its partial tokens
    keep        steps stop; running requests keep their KV and go on at resume
    recompute   steps stop; running requests give up their KV and are computed again at resume
    drain       started requests run to their end first; answered when none is left

Requests that arrive while paused wait in the queue, for at most the configured time.
"""

from __future__ import annotations

from headrace.core.outbox import Outbox
from headrace.core.stepping import Stepper
from headrace.scheduler import Scheduler
from headrace.types.errors import DeadlineError, HeadraceError, UpdateConflictError
from headrace.types.weights import PauseMode


class PauseControl:
    """The pause state of one replica. `mode` is None while generation is not paused nor about to be."""

    def __init__(self, scheduler: Scheduler, stepper: Stepper, outbox: Outbox, drain_timeout: float) -> None:
        self.mode: PauseMode | None = None
        self._scheduler = scheduler
        self._stepper = stepper
        self._outbox = outbox
        self._drain_timeout = drain_timeout
        self._draining_calls: list[int] = []
        self._deadline = 0.0

    @property
    def is_draining(self) -> bool:
        """Started requests still run towards the pause; no new one starts."""
        return bool(self._draining_calls)

    @property
    def is_paused(self) -> bool:
        """The pause is in force: no step may run."""
        return self.mode is not None and not self._draining_calls

    @property
    def deadline(self) -> float | None:
        """When a drain fails; None when none is going on."""
        return self._deadline if self._draining_calls else None

    def pause(self, call_id: int, mode: PauseMode, now: float) -> None:
        """Pause, and reply when the mode's promise holds. A later pause replaces one that still drains."""
        if mode == "drain":
            if not self._draining_calls:
                self._deadline = now + self._drain_timeout
            self._draining_calls.append(call_id)
            self.mode = mode
            self.advance(now)
            return
        self.end(UpdateConflictError("a later pause replaced this one"))
        self.mode = mode
        if mode == "abort":
            self._outbox.add(self._scheduler.abort(None, "Aborted by a pause"))
        self._stepper.settle()
        if mode == "recompute":
            self._scheduler.recompute_running()
        self._outbox.reply(call_id)

    def resume(self) -> None:
        """End the pause. A drain that was not complete is answered with an error."""
        self.end(UpdateConflictError("generation was resumed before it had drained"))
        self.mode = None

    def advance(self, now: float) -> None:
        """Complete a drain when nothing started is left, or fail it when its time is up: then nothing is paused."""
        if not self._draining_calls:
            return
        if self._scheduler.num_started == 0:
            self._stepper.settle()
            calls, self._draining_calls = self._draining_calls, []
            for call_id in calls:
                self._outbox.reply(call_id)
        elif now >= self._deadline:
            self.end(DeadlineError(f"requests still ran {self._drain_timeout:g} s after the pause was asked for"))
            self.mode = None

    def end(self, error: HeadraceError) -> None:
        """Answer the calls that wait for a drain with `error`."""
        calls, self._draining_calls = self._draining_calls, []
        for call_id in calls:
            self._outbox.refuse(call_id, error.info())
