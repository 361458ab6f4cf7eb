"""An engine is called where locks are traps: in a fork, and in a signal handler that has interrupted another call."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace import Engine, ShutdownError
from headrace.engine.runtime import EngineLoop, _Errand, _Latch
from headrace.engine.starting import Start
from headrace.engine.supervision import Supervisor
from tests.arch.source import child_environment
from tests.engine.builders import SETTINGS
from tests.engine.lines import BeforeLine

HANG_SECONDS = 60.0
FREE: dict[str, Any] = {**SETTINGS, "executor": "free", "skip_tokenizer_init": True, "inprocess": True}
INTERRUPTED: list[Callable[..., Any]] = [
    EngineLoop.wait,
    EngineLoop._start,
    EngineLoop.close,
    Start.close,
    Supervisor.end,
]
INTERRUPTED += [_Errand.start, _Latch.wait, threading.Event.wait, threading.Condition.wait]
WATCHED = {each.__code__ for each in INTERRUPTED}
FORK = """
import asyncio, os, sys, threading, time
from headrace import Engine, ShutdownError
engine = Engine({folder!r}, executor="free", skip_tokenizer_init=True, **{settings!r})
ours = engine.asynchronous
held = threading.Event()

def stand_still(*_):
    held.set()
    time.sleep({seconds})

def begin_a_call():
    ours.loop.call_soon_threadsafe = stand_still
    engine.status()

def hold(lock):
    with lock:
        stand_still()

actions = dict(
    call=begin_a_call,
    start=lambda: hold(ours._start._lock),
    outcome=lambda: hold(ours._start._outcome._condition),
    end=lambda: hold(ours.runtime.supervisor.ended._condition),
)
threading.Thread(target=actions[sys.argv[1]], daemon=True).start()
held.wait()
child = os.fork()
if child == 0:
    assert not (engine.is_alive or engine.is_ready or engine.is_responsive)
    assert isinstance(engine.wait_ended(), ShutdownError)
    for call in (engine.status, engine.resume, lambda: asyncio.run(ours.start()), lambda: asyncio.run(ours.status())):
        try:
            call()
        except ShutdownError as error:
            assert "fork" in str(error)
        else:
            raise AssertionError("it was not refused")
    engine.shutdown()
    asyncio.run(ours.shutdown())
    print("refused", flush=True)
    os._exit(0)
def give_up():
    os.kill(child, 9)
threading.Timer({seconds} / 2, give_up).start()
os.waitpid(child, 0)
os._exit(0)
"""


@pytest.mark.parametrize("busy", ["call", "start", "outcome", "end"])
def test_a_fork_taken_in_the_middle_of_a_call_refuses_at_once(model_folder: Path, busy: str) -> None:
    """Whatever another thread is at, and holds for ever in the child."""
    code = FORK.format(folder=str(model_folder), settings=SETTINGS, seconds=HANG_SECONDS)
    environment = child_environment()
    command = [sys.executable, "-c", code, busy]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=2 * HANG_SECONDS)
    assert done.stdout.split() == ["refused"], done.stderr


@pytest.mark.parametrize("name", ["status", "shutdown"])
def test_a_signal_handler_may_shut_the_engine_down_at_any_line(model_folder: Path, name: str) -> None:
    """Of a call, and of another shutdown: neither it nor what it has interrupted waits for the other."""

    def interrupted(engine: Engine, handler: BeforeLine) -> None:
        try:
            with handler.tracing():
                getattr(engine, name)()
        except ShutdownError:
            assert name == "status"
        finally:
            outcomes.append(engine.is_alive)

    for number in range(100):
        outcomes: list[bool] = []
        engine = Engine(model_folder, **FREE)
        handler = BeforeLine(number, WATCHED, engine.shutdown)
        thread = threading.Thread(target=interrupted, args=(engine, handler), daemon=True)
        thread.start()
        thread.join(HANG_SECONDS)
        assert len(outcomes) == 1, f"it hangs when line {number} is interrupted"
        engine.shutdown()
        if not handler.has_come:
            break
        assert not outcomes[0]
    assert 5 < number < 100


def test_calls_that_meet_the_end_are_answered(model_folder: Path) -> None:
    """However far they have come when the engine is shut down, also from a thread that was slow to begin."""
    for _ in range(5):
        engine = Engine(model_folder, **FREE)
        outcomes: list[BaseException | None] = []

        def call_on(engine: Engine = engine, outcomes: list[BaseException | None] = outcomes) -> None:
            try:
                while True:
                    engine.status()
            except ShutdownError as error:
                outcomes.append(error)

        threads = [threading.Thread(target=call_on, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        engine.shutdown()
        for thread in threads:
            thread.join(HANG_SECONDS)
        assert len(outcomes) == 4


@pytest.mark.parametrize("is_closed", [False, True])
def test_a_call_that_comes_to_a_loop_that_turns_no_more_is_refused(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, is_closed: bool
) -> None:
    """Its thread was slow to begin it: the loop is about to be closed by then, or is."""
    engine = Engine(model_folder, **FREE)
    loop = engine.asynchronous.loop
    close, start = loop.close, _Errand.start
    turns_no_more, started = threading.Event(), threading.Event()

    def start_late(errand: _Errand[Any]) -> None:
        ender = threading.Thread(target=engine.shutdown)
        ender.start()
        assert turns_no_more.wait(HANG_SECONDS)
        if is_closed:
            ender.join(HANG_SECONDS)
        start(errand)
        started.set()

    def close_late() -> None:
        turns_no_more.set()
        if not is_closed:
            assert started.wait(HANG_SECONDS)
        close()

    monkeypatch.setattr(loop, "close", close_late)
    monkeypatch.setattr(_Errand, "start", start_late)
    with pytest.raises(ShutdownError):
        engine.status()
