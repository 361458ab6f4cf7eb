"""Callers that are interrupted or cancelled at any moment: what they had begun is undone, and nothing is logged."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace import Engine, serve
from headrace.engine.calls import run_here
from headrace.engine.runtime import EngineLoop, _Errand, _look_out
from headrace.types.errors import InternalError
from tests.engine.builders import SETTINGS, model_of, named_tensors
from tests.engine.lines import BeforeLine
from tests.free_ports import free_port

LONG = {"max_new_tokens": 900, "ignore_eos": True}
TENSORS = named_tensors(model_of(1))
MANIFEST = [(name, tensor.shape, str(tensor.dtype)) for name, tensor in TENSORS]
WATCHED = {each.__code__ for each in (EngineLoop.wait, _Errand.start, _look_out, run_here)}


@pytest.fixture(scope="module", params=[True, False], ids=["inprocess", "process"])
def engine(request: pytest.FixtureRequest, model_folder: Path) -> Iterator[Engine]:
    with Engine(model_folder, **{**SETTINGS, "inprocess": request.param}) as engine:
        yield engine


def check_nothing_left(engine: Engine) -> None:
    status = engine.status()
    assert (status.paused, status.updating) == ("", False)
    assert not engine.asynchronous.runtime.client._sinks
    deadline = time.monotonic() + 20
    while engine.metrics()["num_running"]:
        assert time.monotonic() < deadline, "a sequence runs on for nobody"


def interrupt() -> None:
    raise KeyboardInterrupt


def calls_of(engine: Engine) -> dict[str, Callable[[], Any]]:
    return {
        "pause": lambda: engine.pause("keep"),
        "begin": lambda: engine.begin_update("never", MANIFEST, mode="shadow"),
        "tensors": lambda: engine.update_weights_from_tensor(TENSORS, "never", mode="shadow"),
        "bucket": lambda: engine.update_weights_from_bucket(TENSORS, "never", mode="shadow"),
        "generate": lambda: engine.generate(input_ids=[[1, 2]], sampling_params={"max_new_tokens": 3}, request_id="a"),
        "stream": lambda: next(engine.stream(input_ids=[[1, 2]], sampling_params=LONG, request_id="a")),
    }


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.parametrize("name", ["pause", "begin", "tensors", "bucket", "generate", "stream"])
def test_an_interrupt_at_any_line_leaves_nothing(engine: Engine, name: str) -> None:
    call = calls_of(engine)[name]
    for number in range(400):
        interrupts = BeforeLine(number, WATCHED, interrupt)
        try:
            with interrupts.tracing():
                call()
        except KeyboardInterrupt:
            check_nothing_left(engine)
        if not interrupts.has_come:
            break
    engine.resume()
    engine.abort_update()
    assert 3 < number < 400
    gc.collect()  # here, where coroutines that an interrupt kept from being awaited are ignored


@pytest.mark.parametrize("name", ["pause", "begin", "stream", "serve"])
def test_a_result_that_came_before_the_interrupt_is_undone(
    engine: Engine, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coroutine is over, and its caller has not seen that yet."""
    port = free_port()

    def interrupted(_: object) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    call = {**calls_of(engine), "serve": lambda: serve(engine, port)}[name]
    monkeypatch.setattr(_Errand, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call()
    check_nothing_left(engine)
    serve(engine, port).stop(0.0)


def test_a_cancelled_stream_leaves_no_sequence(engine: Engine) -> None:
    async def read(name: str) -> None:
        async for _ in engine.asynchronous.stream(input_ids=[[1, 2]], sampling_params=LONG, request_id=name):
            pass

    async def scenario() -> None:
        for turn in range(60):
            task = asyncio.create_task(read(f"r{turn % 2}"))
            await asyncio.sleep(0.0001 * (turn % 30))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await engine.asynchronous.status()  # what a stream posts as it ends has been done by then

    asyncio.run(scenario())
    check_nothing_left(engine)


@pytest.mark.parametrize("name", ["generate", "pause", "update"])
def test_a_cancelled_call_is_not_in_the_log(engine: Engine, name: str, caplog: pytest.LogCaptureFixture) -> None:
    ours = engine.asynchronous

    async def scenario() -> None:
        calls: dict[str, Callable[[], Any]] = {
            "generate": lambda: ours.generate(input_ids=[[1, 2]], sampling_params=LONG),
            "pause": lambda: ours.pause("drain"),
            "update": lambda: ours.update_weights_from_tensor(TENSORS, "never"),
        }
        busy = asyncio.create_task(ours.generate(input_ids=[[1, 2]], sampling_params=LONG))
        while not (await ours.metrics())["num_running"]:
            pass
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(calls[name](), 0.02)
        busy.cancel()
        await asyncio.wait([busy])

    with caplog.at_level(logging.WARNING, "asyncio"):
        asyncio.run(scenario())
        gc.collect()
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []
    check_nothing_left(engine)


def test_what_waits_is_not_stepped_without_a_loop() -> None:
    async def waits() -> None:
        await asyncio.sleep(0)

    async def returns() -> int:
        return 5

    assert run_here(returns()) == 5
    with pytest.raises(InternalError, match="waits"):
        run_here(waits())
