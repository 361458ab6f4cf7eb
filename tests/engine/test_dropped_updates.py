"""Updates whose callers stand still or are dropped: neither their buffers nor their sessions stay with them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace import AsyncEngine, DeadlineError, Engine, ShutdownError, UpdateConflictError
from headrace.engine.memory_copy import CopyingThreads
from headrace.engine.update_session import UpdateSession
from headrace.engine.upload_buffers import BufferPool, Filling, HostMemory, UploadBuffer
from tests.engine.builders import SETTINGS, model_of, named_tensors, save_model

TENSORS = named_tensors(model_of(1))
MANIFEST = [(name, tensor.shape, str(tensor.dtype)) for name, tensor in TENSORS]
HANG_SECONDS = 60.0


class Stuck:
    """A caller whose iterator stands still after its first tensor, until it is let go."""

    def __init__(self, engine: Engine, session: UpdateSession, rest: list[Any]) -> None:
        self.outcome: BaseException | None = None
        self.has_begun = threading.Event()
        self._go_on = threading.Event()
        self._rest = rest
        self._thread = threading.Thread(target=self._run, args=(engine, session), daemon=True)
        self._thread.start()
        assert self.has_begun.wait(HANG_SECONDS)

    def go_on(self) -> None:
        """Let it go, and wait for its end."""
        self._go_on.set()
        self._thread.join(HANG_SECONDS)
        assert not self._thread.is_alive()

    def _run(self, engine: Engine, session: UpdateSession) -> None:
        try:
            engine.stage(session, self._pairs())
        except Exception as error:
            self.outcome = error

    def _pairs(self) -> Iterator[Any]:
        yield TENSORS[0]
        self.has_begun.set()
        self._go_on.wait(10 * HANG_SECONDS)
        yield from self._rest


def in_time(call: Callable[[], Any]) -> Any:
    """What a call that may hang returns or raises."""
    outcomes: list[Any] = []

    def run() -> None:
        try:
            outcomes.append(call())
        except Exception as error:
            outcomes.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(HANG_SECONDS)
    assert outcomes, "it hangs"
    return outcomes[0]


def check_buffers(engine: Engine) -> None:
    updater = engine.asynchronous.runtime.updater
    deadline = time.monotonic() + HANG_SECONDS
    while len(updater._host._free) != updater._host._num_buffers or updater._fillings or updater._tasks:
        assert time.monotonic() < deadline, "a buffer is lost"
        time.sleep(0.005)
    assert updater._host._num_buffers <= 2


@pytest.fixture(scope="module", params=[True, False], ids=["inprocess", "process"])
def engine(request: pytest.FixtureRequest, model_folder: Path) -> Iterator[Engine]:
    with Engine(model_folder, **{**SETTINGS, "inprocess": request.param}) as engine:
        yield engine


def test_sessions_that_are_over_hold_no_buffer(engine: Engine) -> None:
    """Their callers learn it when they go on, also those that have nothing more to send."""
    stuck = []
    for rest in (TENSORS[1:], []):
        stuck.append(Stuck(engine, engine.begin_update("never", MANIFEST, mode="shadow"), rest))
        engine.abort_update()
    report = in_time(lambda: engine.update_weights_from_tensor(TENSORS, "third", timeout=20.0))
    assert getattr(report, "version", report) == "third"
    for each in stuck:
        each.go_on()
        assert isinstance(each.outcome, UpdateConflictError), each.outcome
    check_buffers(engine)
    assert engine.update_weights_from_tensor(TENSORS, "fourth").version == "fourth"


def test_a_wait_for_a_buffer_has_a_deadline(engine: Engine) -> None:
    session = engine.begin_update("never", MANIFEST, mode="shadow", timeout=1.0)
    stuck = [Stuck(engine, session, []) for _ in range(2)]
    error = in_time(lambda: engine.stage(session, TENSORS[1:]))
    assert isinstance(error, DeadlineError) and error.field == "timeout", error
    engine.abort_update()
    for each in stuck:
        each.go_on()
        assert isinstance(each.outcome, (DeadlineError, UpdateConflictError)), each.outcome
    check_buffers(engine)


def test_a_script_that_waits_for_a_buffer_learns_that_its_session_is_over(engine: Engine) -> None:
    """At once, not when the buffer comes."""
    session = engine.begin_update("never", MANIFEST, mode="shadow", timeout=500.0)
    stuck = [Stuck(engine, session, []) for _ in range(2)]
    outcomes: list[Any] = []
    waits = threading.Thread(target=lambda: outcomes.append(in_time(lambda: engine.stage(session, TENSORS[1:]))))
    waits.start()
    updater = engine.asynchronous.runtime.updater
    while len(updater._fillings) < 3:
        time.sleep(0.005)
    engine.abort_update()
    assert engine.update_weights_from_tensor(TENSORS, "next").version == "next"
    waits.join()
    assert isinstance(outcomes[0], UpdateConflictError), outcomes
    for each in stuck:
        each.go_on()
    check_buffers(engine)


def test_a_script_that_outlives_its_engine_leaves_no_buffer(model_folder: Path) -> None:
    engine = Engine(model_folder, inprocess=True, **SETTINGS)
    stuck = Stuck(engine, engine.begin_update("never", MANIFEST, mode="shadow"), TENSORS[1:])
    engine.shutdown()
    stuck.go_on()
    assert isinstance(stuck.outcome, ShutdownError), stuck.outcome
    assert not engine.asynchronous.runtime.updater._fillings


def test_a_buffer_is_not_taken_from_whoever_writes_to_it() -> None:
    """He finds out after that, and the buffer can be taken then."""
    filling = Filling(1, CopyingThreads())
    pool = BufferPool(HostMemory, 64)
    filling.put(UploadBuffer(HostMemory(64), pool))

    class Data(bytes):
        def copy_into(self, *_: object) -> None:
            filling.is_over = True
            assert filling.take() is None

    with pytest.raises(UpdateConflictError):
        filling.write(pool, 0, 0, Data(8), replaces=False)  # type: ignore[arg-type]
    buffer = filling.take()
    assert buffer is not None
    buffer.memory.close()


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", ["update", "inplace", "bucket", "begin", "pause", "stage"])
def test_a_coroutine_that_is_closed_leaves_nothing(engine: Engine, name: str, num_steps: int) -> None:
    """Nobody throws `CancelledError` into it, and it cannot wait: whoever ran it is gone."""
    ours = engine.asynchronous

    async def scenario() -> None:
        session = await ours.begin_update("never", MANIFEST, mode="shadow") if name == "stage" else None
        calls: dict[str, Callable[[], Any]] = {
            "update": lambda: ours.update_weights_from_tensor(TENSORS, "never", mode="shadow"),
            "inplace": lambda: ours.update_weights_from_tensor(TENSORS, "never", mode="inplace"),
            "bucket": lambda: ours.update_weights_from_bucket(TENSORS, "never", mode="shadow"),
            "begin": lambda: ours.begin_update("never", MANIFEST, mode="shadow"),
            "pause": lambda: ours.pause("keep"),
            "stage": lambda: ours.stage(session, TENSORS),  # type: ignore[arg-type]
        }
        call = calls[name]()
        with contextlib.suppress(StopIteration):
            waits_for = call.send(None)
            for _ in range(num_steps):
                while not waits_for.done():
                    await asyncio.sleep(0.001)
                waits_for = call.send(None)
            call.close()
            await check_nothing_left(session)

    async def check_nothing_left(session: UpdateSession | None) -> None:
        while (await ours.status()).paused:
            await asyncio.sleep(0.002)
        while session is None and (await ours.status()).updating:
            await asyncio.sleep(0.002)

    try:
        asyncio.run(asyncio.wait_for(scenario(), HANG_SECONDS))
    finally:
        engine.resume()
        engine.abort_update()
    check_buffers(engine)
    assert engine.update_weights_from_tensor(TENSORS, "whole").version == "whole"


@pytest.mark.parametrize("is_started", [True, False])
def test_an_engine_whose_block_is_closed_ends(model_folder: Path, is_started: bool) -> None:
    """Also while the block waits for its start."""
    engines: list[AsyncEngine] = []

    async def block() -> None:
        engines.append(AsyncEngine(model_folder, inprocess=True, **SETTINGS))
        async with engines[0]:
            await asyncio.Event().wait()

    async def scenario() -> None:
        running = block()
        waits_for: Any = running.send(None)
        if is_started:
            while not waits_for.done():
                await asyncio.sleep(0.002)
            running.send(None)
        running.close()

    asyncio.run(scenario())
    assert not engines[0].is_alive


def test_an_engine_is_ready_unless_the_open_update_is_in_place(engine: Engine, tmp_path: Path) -> None:
    """Whatever updates were before, and through whatever door it came."""
    folder = save_model(tmp_path, seed=2)
    engine.update_weights_from_tensor(TENSORS, "before", mode="inplace")
    for mode in ("shadow", "inplace"):
        params = {"max_new_tokens": 900, "ignore_eos": True}
        load = threading.Thread(target=lambda: engine.generate(input_ids=[[1, 2]], sampling_params=params))  # noqa: B023
        load.start()
        while not engine.metrics()["num_running"]:
            time.sleep(0.002)
        update = engine.update_weights_from_disk
        updating = threading.Thread(target=lambda: update(folder, "disk", mode=mode, in_flight="drain"))  # noqa: B023
        updating.start()
        client = engine.asynchronous.runtime.client
        while (status := client.status) is None or not status.updating:
            assert updating.is_alive(), "the update was over before it was seen"
            time.sleep(0.002)
        assert engine.is_ready == (mode == "shadow")
        engine.abort(all=True)
        load.join()
        updating.join()
        assert engine.is_ready and engine.version == "disk"
