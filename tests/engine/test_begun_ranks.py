"""Ranks begin while the front decides: whatever ends a start meanwhile ends them, and says what it says of one rank."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace import AsyncEngine, ConfigError, Engine, EngineDeadError, HeadraceError, ShutdownError
from headrace.engine import core_host
from headrace.engine.core_host import resolve_settings
from headrace.types.errors import DeviceLostError
from tests.arch.source import ROOT, child_environment
from tests.engine.builders import SETTINGS
from tests.engine.test_restart import is_gone, wait_for
from tests.processes import children_of, runs

RANKS: dict[str, Any] = {**SETTINGS, "tp_size": 2, "device": "cpu", "skip_tokenizer_init": True}


@pytest.fixture
def may_decide(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until it is set the front decides nothing. Machines of one core have ranks begin, too."""
    event = threading.Event()

    def decide_later(*given: Any, **more: Any) -> Any:
        assert event.wait(120.0)
        return resolve_settings(*given, **more)

    monkeypatch.setattr("headrace.engine.starting.resolve_settings", decide_later)
    monkeypatch.setattr(core_host, "available_cores", lambda: 2)
    yield event
    event.set()


def core_and_rank(front: int) -> tuple[int, int]:
    """Once both have begun."""
    found: list[tuple[int, int]] = []

    def look() -> bool:
        cores = children_of(front, word="headrace.core.process")
        found.extend((core, rank) for core in cores for rank in children_of(core, word="headrace.core.rank_process"))
        return bool(found)

    wait_for(look)
    return found[0]


def start_in_thread(folder: Path, **settings: Any) -> Callable[[], HeadraceError]:
    """What returned waits for what keeps the engine from starting."""
    errors: list[HeadraceError] = []

    def start() -> None:
        try:
            Engine(folder, **{**RANKS, **settings}).shutdown()
        except HeadraceError as error:
            errors.append(error)

    thread = threading.Thread(target=start)
    thread.start()

    def told() -> HeadraceError:
        thread.join(60.0)
        return errors[0]

    return told


def test_settings_that_are_refused_leave_no_rank(model_folder: Path, may_decide: threading.Event) -> None:
    told = start_in_thread(model_folder, context_length=1 << 20)
    core, rank = core_and_rank(os.getpid())
    may_decide.set()
    error = told()
    assert isinstance(error, ConfigError) and error.field == "context_length"
    wait_for(lambda: is_gone(core) and is_gone(rank))


def test_a_rank_that_is_killed_meanwhile_is_named(model_folder: Path, may_decide: threading.Event) -> None:
    told = start_in_thread(model_folder)
    core, rank = core_and_rank(os.getpid())
    os.kill(rank, signal.SIGKILL)
    wait_for(lambda: not runs(rank))
    may_decide.set()
    error = told()
    assert isinstance(error, DeviceLostError)
    assert f"the ranks cannot start: rank 1 (process {rank}) was killed by signal 9" in error.message
    wait_for(lambda: is_gone(core) and is_gone(rank))


def test_a_core_that_is_killed_meanwhile_takes_its_ranks_along(model_folder: Path, may_decide: threading.Event) -> None:
    told = start_in_thread(model_folder)
    core, rank = core_and_rank(os.getpid())
    os.kill(core, signal.SIGKILL)
    wait_for(lambda: is_gone(rank))
    may_decide.set()
    error = told()
    assert isinstance(error, EngineDeadError) and f"core process {core} was killed by signal 9" in error.message


def test_an_engine_that_is_shut_down_meanwhile_leaves_no_rank(model_folder: Path, may_decide: threading.Event) -> None:
    async def run() -> None:
        engine = AsyncEngine(model_folder, **RANKS)
        core, rank = await asyncio.to_thread(core_and_rank, os.getpid())
        await engine.shutdown()
        wait_for(lambda: is_gone(core) and is_gone(rank))
        may_decide.set()
        with pytest.raises(ShutdownError):
            await engine.generate(input_ids=[1])

    asyncio.run(run())


SCRIPT = """
import json, sys, time
from headrace import Engine
from headrace.engine import core_host, starting
if __name__ == "__main__":
    starting.resolve_settings = lambda *given, **more: time.sleep(600)
    core_host.available_cores = lambda: 2
    Engine(sys.argv[1], **json.loads(sys.argv[2]))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_front_that_ends_meanwhile_leaves_no_rank(model_folder: Path, how: signal.Signals) -> None:
    command = [sys.executable, "-c", SCRIPT, str(model_folder), json.dumps(RANKS)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=child_environment()) as front:
        core, rank = core_and_rank(front.pid)
        front.send_signal(how)
        _, told = front.communicate(timeout=60.0)
    wait_for(lambda: is_gone(core) and is_gone(rank))
    assert ("KeyboardInterrupt" in told) == (how == signal.SIGINT), told
