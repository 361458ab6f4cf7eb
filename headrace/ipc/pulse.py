"""A core's pulse: a few words of shared memory that say what its loop is doing, readable while it is not able to speak.

The core writes, one store a word; the front reads whenever it likes and judges (`headrace.engine.health`). Times are
nanoseconds of CLOCK_MONOTONIC, which all processes of a host share. Knows no requests.
"""

from __future__ import annotations

import mmap
import threading
from time import monotonic_ns
from typing import Final, NamedTuple

PULSE_BYTES = 64
BEAT_SECONDS = 0.25

_BEAT, _PHASE, _STALLED, _NUM_STEPS, _CLAIMED, _START = range(6)
_PHASE_BITS = 2
_PHASE_MASK = (1 << _PHASE_BITS) - 1
_STAGES = ("", "weights", "sizing", "graphs")
_COUNT_BITS = 28
_COUNT_MASK = (1 << _COUNT_BITS) - 1


class Phase:
    """What the loop does now. Executing and commanding (staging, a commit, a reset) may last; deciding may not.

    No enum: the loop names one several times a step, and an enum's members are slow to come by.
    """

    IDLE: Final = 0
    DECIDING: Final = 1
    EXECUTING: Final = 2
    COMMANDING: Final = 3


class PulseReading(NamedTuple):
    """The pulse at one moment.

    beat      when the core's process last ran at all
    phase     what its loop does, since `entered`
    stalled   since when there has been runnable work and no step, 0 while there is none or steps complete
    """

    beat: int
    phase: int
    entered: int
    stalled: int
    num_steps: int


class StartReading(NamedTuple):
    """How far the core's start has come: `done` of `total` things of a stage; a total of 0 is not known."""

    stage: str
    done: int
    total: int


class PulsePage:
    """The memory of one pulse, as the front keeps it. A core in the same process may share the object."""

    def __init__(self, memory: mmap.mmap | None = None) -> None:
        self.words = memoryview(memory or bytearray(PULSE_BYTES)).cast("q")

    @classmethod
    def map(cls, descriptor: int) -> PulsePage:
        """The page behind a file of PULSE_BYTES. It keeps a descriptor of its own until `close`."""
        return cls(mmap.mmap(descriptor, PULSE_BYTES))

    def close(self) -> None:
        """Let go of the memory; the last reading stays. Whoever reads at this moment holds it until he is done."""
        self.words = memoryview(bytearray(self.words)).cast("q")

    def has_claimed(self, call_id: int) -> bool:
        """Whether the core has come to this call. Calls arrive in the order of their ids."""
        return self.words[_CLAIMED] >= call_id

    def read(self) -> PulseReading:
        """Phase and the time it was entered share a word: never one without the other."""
        words = self.words
        phase = words[_PHASE]
        return PulseReading(words[_BEAT], phase & _PHASE_MASK, phase >> _PHASE_BITS, words[_STALLED], words[_NUM_STEPS])

    def read_start(self) -> StartReading:
        """All of it is in one word: never parts of two."""
        rest, total = divmod(self.words[_START], 1 << _COUNT_BITS)
        stage, done = divmod(rest, 1 << _COUNT_BITS)
        return StartReading(_STAGES[stage], done, total)


class Pulse:
    """The core's side. `reach` is of its start; `enter`, `claim`, `stepped` and `found_nothing` are the loop's; a
    thread beats between `__enter__` and `__exit__`."""

    def __init__(self, page: PulsePage | None = None) -> None:
        self._words = (page or PulsePage()).words
        self._phase, self._entered = Phase.COMMANDING, monotonic_ns()
        self._spent = [0] * (1 << _PHASE_BITS)  # nanoseconds by phase, up to when this one was entered
        self._is_stalled = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="headrace-pulse", daemon=True)
        self._words[_BEAT] = monotonic_ns()
        self.enter(Phase.COMMANDING)

    def reach(self, stage: str, done: int, total: int) -> None:
        """The start has come so far."""
        counts = min(done, _COUNT_MASK) << _COUNT_BITS | min(total, _COUNT_MASK)
        self._words[_START] = _STAGES.index(stage) << 2 * _COUNT_BITS | counts

    def enter(self, phase: int) -> None:
        """The loop does something else from now on."""
        now = monotonic_ns()
        self._spent[self._phase] += now - self._entered
        self._phase, self._entered = phase, now
        self._words[_PHASE] = now << _PHASE_BITS | phase

    def spent(self, phase: int) -> float:
        """Seconds that the loop has been in a phase, up to when it last left it."""
        return self._spent[phase] / 1e9

    def claim(self, call_id: int) -> None:
        """The loop comes to this call; it looks at the clock afterwards, and refuses one that comes too late.

        So a front that finds a call unclaimed after its deadline knows that it will never happen.
        """
        self._words[_CLAIMED] = call_id

    def stepped(self) -> None:
        """A step was completed, or given up."""
        self._words[_NUM_STEPS] += 1
        if self._is_stalled:
            self.found_nothing(has_work=False)

    def found_nothing(self, *, has_work: bool) -> None:
        """No step could be taken; `has_work` if one should have been."""
        if has_work != self._is_stalled:
            self._is_stalled = has_work
            self._words[_STALLED] = monotonic_ns() if has_work else 0

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            self._words[_BEAT] = monotonic_ns()
