"""Control calls given up by their callers, at every door of the Python engine, with a core process and without."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace import AsyncEngine, DeadlineError, Engine, RequestError
from headrace.engine.update_session import UpdateSession
from tests.engine.builders import SETTINGS, model_of, named_tensors, save_model

Tensors = list[tuple[str, torch.Tensor]]
LONG = {"max_new_tokens": 900, "ignore_eos": True}


@pytest.fixture(scope="module", params=[True, False], ids=["inprocess", "process"])
def shared(request: pytest.FixtureRequest, model_folder: Path) -> Iterator[Engine]:
    with Engine(model_folder, **{**SETTINGS, "inprocess": request.param}) as engine:
        yield engine


@pytest.fixture(scope="module")
def new_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("new"), seed=1)


@pytest.fixture(scope="module")
def new() -> Tensors:
    return named_tensors(model_of(1))


@contextmanager
def load(engine: Engine) -> Iterator[None]:
    """Requests that end long after the block."""
    thread = threading.Thread(
        target=lambda: engine.generate(input_ids=[[1, 2, 3]] * 4, sampling_params=LONG, request_id="load")
    )
    thread.start()
    while engine.metrics()["num_running"] < 4:
        time.sleep(0.002)
    try:
        yield
    finally:
        engine.resume()
        engine.abort("load_", prefix=True)
        thread.join(30)


def check_untouched(engine: Engine, version: str) -> None:
    """Nobody is paused, no update is open, and a request starts at once."""
    status = engine.status()
    assert (status.paused, status.updating, status.version) == ("", False, version)
    assert engine.is_ready and engine.version == version
    [found] = engine.generate(input_ids=[5], sampling_params={"max_new_tokens": 2, "ignore_eos": True})
    assert found.version_spans == [(version, 2)]


def waits_for_drain(
    engine: AsyncEngine, new: Tensors, folder: Path, session: UpdateSession | None = None
) -> dict[str, Callable[[], Coroutine[Any, Any, Any]]]:
    """Calls that wait until requests in flight have ended; `session` is one that is staged."""

    async def commit() -> None:
        assert session is not None
        await engine.commit(session)

    return {
        "pause": lambda: engine.pause("drain"),
        "tensors": lambda: engine.update_weights_from_tensor(new, "never"),
        "bucket": lambda: engine.update_weights_from_bucket(new, "never"),
        "tensors in place": lambda: engine.update_weights_from_tensor(new, "never", mode="inplace"),
        "disk": lambda: engine.update_weights_from_disk(folder, "never"),
        "disk in place": lambda: engine.update_weights_from_disk(folder, "never", mode="inplace"),
        "commit": commit,
    }


NAMES = ["pause", "tensors", "bucket", "tensors in place", "disk", "disk in place", "commit"]


@pytest.mark.parametrize(
    ("name", "where"), [*((name, "another loop") for name in NAMES), ("pause", "own loop"), ("disk", "own loop")]
)
def test_what_is_cancelled_does_not_happen_later(
    shared: Engine, new: Tensors, new_folder: Path, name: str, where: str
) -> None:
    version = shared.version
    session = staged(shared, new) if name == "commit" else None
    make = waits_for_drain(shared.asynchronous, new, new_folder, session)[name]

    async def cancelled() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(make(), 0.15)
        status = await shared.asynchronous.status()  # at once, not some time later
        assert (status.paused, status.updating) == ("", False)

    with load(shared):
        if where == "own loop":
            shared.asynchronous.runtime.wait(cancelled())
        else:
            asyncio.run(cancelled())
        check_untouched(shared, version)
    check_untouched(shared, version)


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_caller_leaves_nothing_behind(shared: Engine, new: Tensors, new_folder: Path, name: str) -> None:
    """Ctrl-C while a blocking call waits."""
    version = shared.version
    session = staged(shared, new) if name == "commit" else None
    calls: dict[str, Callable[[], Any]] = {
        "pause": lambda: shared.pause("drain"),
        "tensors": lambda: shared.update_weights_from_tensor(new, "never"),
        "bucket": lambda: shared.update_weights_from_bucket(new, "never"),
        "tensors in place": lambda: shared.update_weights_from_tensor(new, "never", mode="inplace"),
        "disk": lambda: shared.update_weights_from_disk(new_folder, "never"),
        "disk in place": lambda: shared.update_weights_from_disk(new_folder, "never", mode="inplace"),
        "commit": lambda: shared.commit(session),  # type: ignore[arg-type]
    }
    former = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with load(shared):
            signal.setitimer(signal.ITIMER_REAL, 0.15)
            with pytest.raises(KeyboardInterrupt):
                calls[name]()
            status = shared.status()
            assert (status.paused, status.updating) == ("", False)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, former)
    check_untouched(shared, version)


def staged(engine: Engine, new: Tensors) -> UpdateSession:
    session = engine.begin_update("never", [(n, t.shape, str(t.dtype)) for n, t in new])
    engine.stage(session, new)
    return session


def test_time_limits_are_kept_by_the_core(shared: Engine, new_folder: Path) -> None:
    version = shared.version
    with load(shared):
        for call in (
            lambda: shared.pause("drain", timeout=0.15),
            lambda: shared.update_weights_from_disk(new_folder, "never", timeout=0.15),
        ):
            with pytest.raises(DeadlineError):
                call()
            status = shared.status()
            assert (status.paused, status.updating) == ("", False)
        check_untouched(shared, version)


@pytest.mark.parametrize("timeout", [0, -1.0, "5", True, float("nan")])
def test_bad_time_limits_are_refused(shared: Engine, new_folder: Path, timeout: Any) -> None:
    for call in (
        lambda: shared.pause("drain", timeout=timeout),
        lambda: shared.update_weights_from_disk(new_folder, "never", timeout=timeout),
    ):
        with pytest.raises(RequestError) as caught:
            call()
        assert caught.value.field == "timeout"


def test_a_result_that_comes_when_nobody_waits_is_undone(shared: Engine, new: Tensors) -> None:
    """Cancelled at any moment, also in the one between the answer and its arrival on the caller's loop."""
    engine = shared.asynchronous
    manifest = [(name, tensor.shape, str(tensor.dtype)) for name, tensor in new]
    calls: list[Callable[[], Coroutine[Any, Any, Any]]] = [
        lambda: engine.pause("keep"),
        lambda: engine.begin_update("never", manifest, mode="shadow"),
    ]

    async def scenario() -> None:
        for turn in range(120):
            task = asyncio.ensure_future(calls[turn % 2]())
            for _ in range(turn % 7):
                await asyncio.sleep(0.0002)
            task.cancel()
            try:
                result = await task
            except asyncio.CancelledError:
                continue
            await (engine.resume() if result is None else engine.abort_update(result))

    asyncio.run(scenario())
    status = shared.status()
    assert (status.paused, status.updating) == ("", False)


def test_whoever_gives_up_may_try_again_at_once(shared: Engine, new: Tensors) -> None:
    async def scenario() -> int:
        num_given_up = 0
        for turn in range(40):
            try:
                await asyncio.wait_for(shared.asynchronous.update_weights_from_tensor(new, "next"), turn * 0.0007)
            except TimeoutError:
                num_given_up += 1
        return num_given_up

    assert asyncio.run(scenario()) > 2
    shared.update_weights_from_tensor(new, "last")
    check_untouched(shared, "last")


def test_a_call_that_is_dropped_by_its_loop_is_given_up(shared: Engine) -> None:
    async def scenario() -> None:
        call = shared.asynchronous.pause("drain")
        call.send(None)  # it runs until it waits
        while not (await shared.asynchronous.status()).paused:
            await asyncio.sleep(0.002)
        call.close()
        while (await shared.asynchronous.status()).paused:
            await asyncio.sleep(0.002)

    with load(shared):
        asyncio.run(asyncio.wait_for(scenario(), 20))
        check_untouched(shared, shared.version)
