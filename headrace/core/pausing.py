"""Pausing generation. Owns the pauses in force and the calls that wait for a drain; knows no weights.

    abort       everything accepted so far is answered now with its partial tokens
    keep        steps stop; running requests keep their KV and go on at resume
    recompute   steps stop; running requests give up their KV and are computed again at resume
    drain       started requests run to their end first; answered when none is left

While generation lacks memory, or weights that only an update brings, nothing can drain: then "drain" is "keep". One
that waits for requests which an update holds goes on with them when that is over.

Requests that arrive while paused wait in the queue, for at most the configured time. The last pause counts, and one
resume ends them all. A pause that fails or is given up leaves what was in force before it.
"""

from __future__ import annotations

import msgspec

from headrace.core.outbox import Outbox
from headrace.core.stepping import Stepper
from headrace.scheduler import Scheduler
from headrace.types.errors import DeadlineError, HeadraceError, UpdateConflictError
from headrace.types.weights import PauseMode


class _Pause(msgspec.Struct):
    """`waits_until` is the deadline of one that still drains; None: it is in force."""

    mode: PauseMode
    waits_until: float | None = None


class PauseControl:
    """The pause state of one replica."""

    def __init__(self, scheduler: Scheduler, stepper: Stepper, outbox: Outbox) -> None:
        self._scheduler = scheduler
        self._stepper = stepper
        self._outbox = outbox
        self.pauses: dict[int, _Pause] = {}
        """By call, in order; those that drain are the last ones."""

    @property
    def mode(self) -> PauseMode | None:
        """None while generation is not paused nor about to be."""
        return next(reversed(self.pauses.values())).mode if self.pauses else None

    @property
    def is_draining(self) -> bool:
        """Started requests still run towards the pause; no new one starts."""
        return bool(self.pauses) and next(reversed(self.pauses.values())).waits_until is not None

    @property
    def is_paused(self) -> bool:
        """The pause is in force: no step may run."""
        return bool(self.pauses) and not self.is_draining

    @property
    def deadline(self) -> float | None:
        """When a drain fails; None when none is going on."""
        return min((each.waits_until for each in self.pauses.values() if each.waits_until is not None), default=None)

    def pause(self, call_id: int, mode: PauseMode, deadline: float) -> None:
        """Pause, and reply when the mode's promise holds: of a drain, in `advance`. A later pause replaces one that
        still drains."""
        if mode == "drain":
            self.pauses[call_id] = _Pause(mode, deadline)
            return
        self.end(UpdateConflictError("a later pause replaced this one"))
        self.pauses[call_id] = _Pause(mode)
        if mode == "abort":
            self._outbox.add(self._scheduler.abort(None, "Aborted by a pause"))
        self._enforce()
        self._outbox.reply(call_id)

    def resume(self) -> None:
        """End every pause. A drain that was not complete is answered with an error."""
        self.end(UpdateConflictError("generation was resumed before it had drained"))
        self.pauses.clear()

    def advance(self, now: float, *, lacks: bool, holder: str) -> None:
        """Fail drains whose time is up, and complete the others when nothing started is left, or what is cannot run.

        `lacks`: generation stands still for want of memory or weights, until a call brings them. `holder`: which update
        holds generation; "": none does.
        """
        if not self.is_draining:
            return
        message = "requests still ran at the deadline of the pause: it is undone"
        if holder:
            message = f"requests were held by {holder} at the deadline of the pause: it is undone"
        for call_id, pause in list(self.pauses.items()):
            if pause.waits_until is not None and now >= pause.waits_until:
                self.give_up(call_id, DeadlineError(message))
        if self.is_draining and (lacks or self._scheduler.num_started == 0):
            self._stepper.settle()
            for call_id in self._drop_waits():
                self._outbox.reply(call_id)

    def give_up(self, call_id: int, error: HeadraceError) -> None:
        """Undo the pause of this call, if it made one; what was in force before is so again."""
        pause = self.pauses.pop(call_id, None)
        if pause is None:
            return
        if pause.waits_until is not None:
            self._outbox.refuse(call_id, error.info())
            if self.is_paused:
                self._enforce()  # requests that it had kept ran on towards the drain

    def end(self, error: HeadraceError) -> None:
        """Answer the calls that wait for a drain with `error`; they pause nothing."""
        for call_id in self._drop_waits():
            del self.pauses[call_id]
            self._outbox.refuse(call_id, error.info())

    def _drop_waits(self) -> list[int]:
        """The calls whose drain goes on; they wait no longer."""
        waiting = [call_id for call_id, pause in self.pauses.items() if pause.waits_until is not None]
        for call_id in waiting:
            self.pauses[call_id].waits_until = None
        return waiting

    def _enforce(self) -> None:
        """No step is in flight from here on, and nobody runs on KV that the pause in force gives up."""
        self._stepper.settle()
        if self.mode == "recompute":
            self._scheduler.recompute_running()
