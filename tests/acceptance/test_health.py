"""Ask 17: health tells the truth within seconds, and the watchdog spares work that is long and legal."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from headrace import Engine, EngineDeadError, SamplingParams, serve
from headrace.core.fake_executor import FreeExecutor, FreeWeights
from headrace.scheduler import Scheduler
from headrace.types.plan import StepPlan, StepResult
from headrace.weights.memory import Ticket

NOTICE_SECONDS = 5.0
LONG_SECONDS = 6.0
ONE_TOKEN = SamplingParams(max_new_tokens=1, ignore_eos=True)
ENDLESS = SamplingParams(max_new_tokens=500, ignore_eos=True)
Start = Callable[..., Engine]


@pytest.fixture
def start(folders: list[Path]) -> Iterator[Start]:
    """Start engines whose steps cost nothing."""
    started: list[Engine] = []

    def start_engine(**settings: Any) -> Engine:
        started.append(Engine(folders[0], executor="free", skip_tokenizer_init=True, num_threads=1, **settings))
        return started[-1]

    yield start_engine
    for engine in started:
        engine.shutdown()


def seconds_until(condition: Callable[[], bool], limit: float) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit, f"it did not happen within {limit} s"
        time.sleep(0.02)
    return time.monotonic() - began


def generate_in_thread(engine: Engine, outcomes: list[object], params: SamplingParams = ONE_TOKEN) -> threading.Thread:
    def call() -> None:
        try:
            outcomes.extend(engine.generate(input_ids=[5, 6, 7], sampling_params=params))
        except EngineDeadError as error:
            outcomes.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    return thread


def test_a_stopped_core_is_unready_until_it_goes_on_and_a_killed_one_for_good(start: Start) -> None:
    engine = start()
    server = serve(engine)
    pid = engine.asynchronous.runtime.host.pid
    assert pid != os.getpid()
    with httpx.Client(base_url=server.url) as client:
        assert client.get("/ready").status_code == 200
        os.kill(pid, signal.SIGSTOP)
        try:
            seconds_until(lambda: client.get("/ready").status_code == 503, NOTICE_SECONDS)
            assert "has not run" in client.get("/ready").json()["message"]
            assert client.get("/health").status_code == 200, "the front lives"
            assert engine.is_alive and not engine.is_ready and not engine.is_responsive
        finally:
            os.kill(pid, signal.SIGCONT)
        seconds_until(lambda: client.get("/ready").status_code == 200, NOTICE_SECONDS)
        assert engine.generate(input_ids=[1], sampling_params=ONE_TOKEN)
        os.kill(pid, signal.SIGKILL)
        seconds_until(lambda: client.get("/ready").status_code == 503, NOTICE_SECONDS)
        assert "dead" in client.get("/ready").json()["message"]
        assert client.get("/health").status_code == 503, "no other core comes: the process is of no use"


def test_a_deadlocked_and_a_stuck_scheduler_are_seen(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    real_plan = Scheduler.plan

    def plan(scheduler: Scheduler, *, admit_new: bool = True) -> StepPlan | None:
        if scheduler.num_waiting and not release.is_set():
            if scheduler.limits.page_size == 8:
                return None  # work is queued, and no step comes of it
            release.wait(30.0)
        return real_plan(scheduler, admit_new=admit_new)

    monkeypatch.setattr(Scheduler, "plan", plan)
    deadlocked, stuck = start(inprocess=True, page_size=4), start(inprocess=True, page_size=8)
    outcomes: list[object] = []
    threads = [generate_in_thread(engine, outcomes) for engine in (deadlocked, stuck)]
    began = time.monotonic()
    for engine in (deadlocked, stuck):
        seconds_until(lambda engine=engine: not engine.is_ready, NOTICE_SECONDS)  # type: ignore[misc]
    assert time.monotonic() - began < NOTICE_SECONDS
    ailments = [engine.asynchronous.runtime.client.diagnose() for engine in (deadlocked, stuck)]
    messages = [ailment.message for ailment in ailments if ailment is not None]
    assert "deadlocked" in messages[0] and "no step" in messages[1]
    release.set()
    stuck.flush_cache()  # any command wakes the loop
    for engine, thread in zip((deadlocked, stuck), threads, strict=True):
        seconds_until(lambda engine=engine: engine.is_ready, NOTICE_SECONDS)  # type: ignore[misc]
        thread.join(NOTICE_SECONDS)
    assert len(outcomes) == 2 and not any(isinstance(outcome, Exception) for outcome in outcomes)


class SlowOnce:
    """Something that takes LONG_SECONDS the first time."""

    def __init__(self) -> None:
        self.has_begun = threading.Event()
        self.has_ended = threading.Event()

    def run(self) -> None:
        if not self.has_begun.is_set():
            self.has_begun.set()
            time.sleep(LONG_SECONDS)
            self.has_ended.set()


def test_a_long_forward_and_a_long_commit_never_trip_it(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, commit = SlowOnce(), SlowOnce()
    real_collect, real_commit = FreeExecutor.collect, FreeWeights.commit

    def collect(executor: FreeExecutor) -> StepResult:
        forward.run()
        return real_collect(executor)

    def slow_commit(weights: FreeWeights) -> Ticket:
        commit.run()
        return real_commit(weights)

    monkeypatch.setattr(FreeExecutor, "collect", collect)
    monkeypatch.setattr(FreeWeights, "commit", slow_commit)
    executing, committing = start(inprocess=True), start(inprocess=True)
    outcomes: list[object] = []
    session = committing.begin_update("next", [("norm.weight", (4,), "float32")])
    committing.stage(session, [("norm.weight", np.ones(4, np.float32))])
    threads = [
        generate_in_thread(executing, outcomes),
        threading.Thread(target=lambda: outcomes.append(committing.commit(session))),
    ]
    threads[1].start()
    assert forward.has_begun.wait(10.0) and commit.has_begun.wait(10.0)
    while not (forward.has_ended.is_set() and commit.has_ended.is_set()):
        assert executing.is_responsive and committing.is_responsive
        assert executing.is_ready
        time.sleep(0.02)
    for thread in threads:
        thread.join(NOTICE_SECONDS)
    assert len(outcomes) == 2 and not any(isinstance(outcome, Exception) for outcome in outcomes)
    assert executing.is_ready and committing.is_ready


def test_work_longer_than_watchdog_timeout_ends_in_a_named_error(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    real_collect = FreeExecutor.collect

    def collect(executor: FreeExecutor) -> StepResult:
        release.wait(30.0)
        return real_collect(executor)

    monkeypatch.setattr(FreeExecutor, "collect", collect)
    engine = start(inprocess=True, watchdog_timeout=0.2)
    outcomes: list[object] = []
    thread = generate_in_thread(engine, outcomes, ENDLESS)
    thread.join(10.0)
    release.set()
    assert isinstance(outcomes[0], EngineDeadError) and "watchdog_timeout 0.2" in outcomes[0].message
    assert not engine.is_alive and not engine.is_ready
