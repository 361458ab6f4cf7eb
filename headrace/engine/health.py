"""Judges a core by its pulse: what it suffers from, and whether it is past hope. Pure functions; owns the bounds.

Executing and commanding are work that may last: a long forward, a commit, a reset. Deciding takes milliseconds, and a
loop with work to do always finds a step.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from headrace.ipc import Phase, PulseReading

_SECOND = 1_000_000_000


class HealthLimits(msgspec.Struct, frozen=True):
    """In seconds. After `patience` of silence, of deciding, or of runnable work without a step, no new request is
    taken; after `hopeless` of the same the core is given up. `watchdog` bounds one piece of legal work."""

    watchdog: float
    patience: float = 3.0
    hopeless: float = 60.0


class Ailment(NamedTuple):
    """What a core suffers from, in words, and whether it has for so long that it will not recover."""

    message: str
    is_hopeless: bool


def diagnose(pulse: PulseReading, now: int, limits: HealthLimits) -> Ailment | None:
    """What is wrong at `now` (CLOCK_MONOTONIC, ns) with the core of this pulse; None while nothing is."""
    silent = (now - pulse.beat) / _SECOND
    busy = (now - pulse.entered) / _SECOND
    stalled = (now - pulse.stalled) / _SECOND if pulse.stalled else 0.0
    if silent > limits.patience:
        return Ailment(f"the core's process has not run for {silent:.0f} s", silent > limits.hopeless)
    if pulse.phase == Phase.DECIDING and busy > limits.patience:
        return Ailment(f"the core is deadlocked: it has been deciding for {busy:.0f} s", busy > limits.hopeless)
    if stalled > limits.patience:
        return Ailment(f"the core has taken no step for {stalled:.0f} s with work to do", stalled > limits.hopeless)
    if pulse.phase in (Phase.EXECUTING, Phase.COMMANDING) and busy > limits.watchdog:
        what = "one step" if pulse.phase == Phase.EXECUTING else "one command"
        return Ailment(f"the core has been busy with {what} for over watchdog_timeout {limits.watchdog:g} s", True)
    return None
