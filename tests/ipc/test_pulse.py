"""The pulse page: what the writer stores is what a reader finds, in this process and in another."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from headrace.ipc import Phase, Pulse, PulsePage, SharedBuffer
from headrace.ipc.pulse import PULSE_BYTES

ROOT = Path(__file__).parents[2]


def test_every_change_is_readable_at_once() -> None:
    page = PulsePage()
    before = time.monotonic_ns()
    pulse = Pulse(page)
    first = page.read()
    assert before <= first.beat <= first.entered <= time.monotonic_ns()
    assert (first.phase, first.stalled, first.num_steps) == (Phase.COMMANDING, 0, 0)
    for phase in (Phase.IDLE, Phase.DECIDING, Phase.EXECUTING, Phase.COMMANDING):
        pulse.enter(phase)
        assert page.read().phase == phase
        assert first.entered <= page.read().entered <= time.monotonic_ns()
    pulse.stepped()
    assert page.read().num_steps == 1


def test_the_time_of_a_phase_is_the_sum_of_its_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0, 0, 1, 4, 10, 20, 50, 1000])
    monkeypatch.setattr("headrace.ipc.pulse.monotonic_ns", lambda: next(seconds) * 10**9)
    pulse = Pulse()  # looks at the clock three times, and is commanding from 0 on
    for phase in (Phase.DECIDING, Phase.EXECUTING, Phase.DECIDING, Phase.IDLE, Phase.COMMANDING):
        pulse.enter(phase)
    phases = (Phase.COMMANDING, Phase.DECIDING, Phase.EXECUTING, Phase.IDLE)
    assert [pulse.spent(phase) for phase in phases] == [4.0, 6.0 + 30.0, 10.0, 950.0]


def test_a_start_is_read_as_it_was_last_told_with_counts_that_fit_a_word() -> None:
    page = PulsePage()
    pulse = Pulse(page)
    assert page.read_start() == ("", 0, 0)
    for told in [("weights", 3, 290), ("sizing", 0, 0), ("graphs", (1 << 28) - 1, (1 << 28) - 1)]:
        pulse.reach(*told)
        assert page.read_start() == told
    pulse.reach("graphs", 1 << 40, 1 << 40)
    assert page.read_start() == ("graphs", (1 << 28) - 1, (1 << 28) - 1)
    assert page.read().phase == Phase.COMMANDING


def test_a_stall_is_dated_from_its_first_turn_and_ends_with_a_step_or_the_work() -> None:
    page = PulsePage()
    pulse = Pulse(page)
    pulse.found_nothing(has_work=False)
    assert page.read().stalled == 0
    pulse.found_nothing(has_work=True)
    since = page.read().stalled
    assert since > 0
    pulse.found_nothing(has_work=True)
    assert page.read().stalled == since
    pulse.stepped()
    assert page.read().stalled == 0
    pulse.found_nothing(has_work=True)
    pulse.found_nothing(has_work=False)
    assert page.read().stalled == 0


def test_the_beat_goes_on_by_itself_and_ends_with_the_block() -> None:
    page = PulsePage()
    num_threads = threading.active_count()
    with Pulse(page):
        first = page.read().beat
        while page.read().beat == first:
            time.sleep(0.01)
    last = page.read().beat
    assert threading.active_count() == num_threads
    time.sleep(0.6)
    assert page.read().beat == last


def test_another_process_writes_what_this_one_reads() -> None:
    code = """
import sys
from headrace.ipc import Phase, Pulse, PulsePage
pulse = Pulse(PulsePage.map(int(sys.argv[1])))
pulse.enter(Phase.EXECUTING)
pulse.stepped()
"""
    before = time.monotonic_ns()
    with SharedBuffer.create(PULSE_BYTES) as buffer:
        page = PulsePage.map(buffer.descriptor)
        command = [sys.executable, "-c", code, str(buffer.descriptor)]
        subprocess.run(command, pass_fds=(buffer.descriptor,), check=True, cwd=ROOT, timeout=60)
    reading = page.read()
    assert (reading.phase, reading.num_steps) == (Phase.EXECUTING, 1)
    assert before < reading.beat <= reading.entered < time.monotonic_ns()
    page.close()
    assert page.read() == reading
