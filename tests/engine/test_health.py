"""The judgement of a pulse, by a hand-set clock."""

from __future__ import annotations

import pytest

from headrace.engine.health import HealthLimits, diagnose
from headrace.ipc import Phase, PulseReading

SECOND = 1_000_000_000
NOW = 10_000 * SECOND
LIMITS = HealthLimits(watchdog=1800.0)


def pulse(
    phase: int = Phase.IDLE, *, silent: float = 0.1, busy: float = 0.1, stalled: float | None = None
) -> PulseReading:
    """A pulse whose parts are that many seconds old at NOW."""
    since = 0 if stalled is None else NOW - int(stalled * SECOND)
    return PulseReading(NOW - int(silent * SECOND), phase, NOW - int(busy * SECOND), since, 7)


@pytest.mark.parametrize(
    "healthy",
    [
        pulse(),
        pulse(busy=9000.0),
        pulse(silent=2.9),
        pulse(Phase.DECIDING, busy=2.9),
        pulse(Phase.EXECUTING, busy=1799.0),
        pulse(Phase.COMMANDING, busy=1799.0),
        pulse(stalled=2.9),
    ],
)
def test_what_a_healthy_core_does(healthy: PulseReading) -> None:
    assert diagnose(healthy, NOW, LIMITS) is None


@pytest.mark.parametrize(
    ("sick", "is_hopeless", "named"),
    [
        (pulse(silent=3.1), False, "has not run"),
        (pulse(silent=61.0), True, "has not run"),
        (pulse(Phase.EXECUTING, silent=4.0), False, "has not run"),
        (pulse(Phase.DECIDING, busy=3.1), False, "deadlocked"),
        (pulse(Phase.DECIDING, busy=61.0), True, "deadlocked"),
        (pulse(stalled=3.1), False, "no step"),
        (pulse(stalled=61.0), True, "no step"),
        (pulse(Phase.EXECUTING, busy=1801.0), True, "watchdog_timeout 1800"),
        (pulse(Phase.COMMANDING, busy=1801.0), True, "watchdog_timeout 1800"),
    ],
)
def test_what_a_sick_core_suffers_from(sick: PulseReading, is_hopeless: bool, named: str) -> None:
    ailment = diagnose(sick, NOW, LIMITS)
    assert ailment is not None and ailment.is_hopeless is is_hopeless
    assert named in ailment.message


def test_a_clock_that_lags_the_writer_s_is_no_ailment() -> None:
    """The reading is made before the clock is looked at, but not by much: nothing is judged on negative ages."""
    assert diagnose(pulse(Phase.DECIDING, silent=-0.1, busy=-0.1), NOW, LIMITS) is None
