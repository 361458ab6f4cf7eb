"""A bar on a terminal, and where there is none."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable

import pytest

from headrace.telemetry import Progress, ProgressBar, can_draw, progress_bar
from tests.telemetry.terminal import terminal


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "headrace-progress"]


def test_a_bar_shows_what_is_read_rests_at_the_line_s_beginning_and_leaves_nothing() -> None:
    state = [Progress("model: weights", 3, 12)]
    with terminal() as screen:
        with ProgressBar(lambda: state[0]):
            screen.wait_for("\r\x1b[Kmodel: weights [######                  ] 3/12  0 s\r")
            state[0] = Progress("model: sizing")
            screen.wait_for("\r\x1b[Kmodel: sizing  ")
        assert not threads()
        while not screen.text.endswith(" s\r\r\x1b[K"):
            time.sleep(0.002)  # what was written is on its way


@pytest.mark.parametrize("without", [{"TERM": "dumb"}, {"LOCAL_RANK": "1"}])
def test_nothing_is_drawn_where_it_would_be_no_bar(without: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal():
        assert can_draw()
        for name, value in without.items():
            monkeypatch.setenv(name, value)
        with ProgressBar(lambda: Progress("nobody sees it", 1, 2)):
            assert not can_draw() and not threads()


def test_there_is_no_bar_without_a_terminal_or_where_it_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal():
        with ProgressBar(lambda: Progress("nobody sees it"), is_wanted=False):
            assert not threads()
        read, write = os.pipe()
        with os.fdopen(read), os.fdopen(write, "w") as pipe:
            monkeypatch.setattr(sys, "stderr", pipe)
            with ProgressBar(lambda: Progress("nobody sees it")):
                assert not threads()
        for stream in (None, object(), pipe):
            monkeypatch.setattr(sys, "stderr", stream)
            assert not can_draw()


def test_what_is_over_soon_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal() as screen:
        monkeypatch.setattr(progress_bar, "DELAY_SECONDS", 60.0)
        ProgressBar(lambda: Progress("never seen")).close()
        monkeypatch.setattr(progress_bar, "DELAY_SECONDS", 0.0)
        with ProgressBar(lambda: Progress("seen")):
            assert "never" not in screen.wait_for("seen")


def test_nobody_waits_for_a_terminal_that_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody reads, the thread that draws waits in its write, and only it."""
    monkeypatch.setattr(progress_bar, "_CLOSE_SECONDS", 0.05)
    writes, goes_on = threading.Event(), threading.Event()
    write: Callable[[int, bytes], int] = os.write

    def stopped(descriptor: int, data: bytes) -> int:
        writes.set()
        goes_on.wait(60)
        return write(descriptor, data)

    with terminal() as screen:
        monkeypatch.setattr(os, "write", stopped)
        bar = ProgressBar(lambda: Progress("slow", 1, 2))
        assert writes.wait(60)
        bar.close()
        assert threads()
        monkeypatch.setattr(progress_bar, "_CLOSE_SECONDS", 60.0)
        goes_on.set()
        bar.close()
        screen.wait_for("slow")
