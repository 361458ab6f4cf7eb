"""Control calls in whose way their server ends, while the engine lives on: what was answered is what is."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import warnings
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from safetensors.torch import load_file
from starlette.requests import Request

from headrace import Client, Engine, ShutdownError, UnavailableError, serve
from headrace.engine.calls import Calls
from headrace.server.connections import CLIENT
from headrace.server.waiting import WaitingCalls
from headrace.types.messages import Reply
from tests.server.bucket_client import bodies
from tests.server.builders import SETTINGS, save_random_model

NORM = [("model.norm.weight", (32,), "float32")]


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("newer"), seed=1)


@pytest.fixture(scope="module")
def engine(model_folder: Path) -> Iterator[Engine]:
    with Engine(model_folder, inprocess=True, keep_weights_copy=True, **SETTINGS) as engine:
        yield engine


@pytest.fixture(autouse=True)
def as_new(engine: Engine) -> None:
    engine.abort_update()
    engine.resume_memory_occupation()
    engine.resume()
    engine.set_weight_version("old")


class Door:
    """A server of the engine, a client of it, and what a call needs to have been done before."""

    def __init__(self, engine: Engine, newer: Path) -> None:
        self.engine, self.newer = engine, newer
        self.handle = serve(engine, weight_roots=(str(newer),))
        self.client = Client(self.handle.url)
        self.session: Any = None

    def begin(self) -> None:
        self.session = self.client.begin_update("new", NORM, partial=True)

    def stage(self) -> None:
        self.begin()
        name = NORM[0][0]
        self.client.stage(self.session, [(name, load_file(self.newer / "model.safetensors")[name])])

    def sleep(self) -> None:
        reply = httpx.post(f"{self.handle.url}/sleep?level=1&mode=wait", timeout=60)
        if reply.status_code != 200:
            assert reply.json()["retryable"]
            raise ShutdownError(reply.json()["message"])


Step = Callable[[Door], Any]
CALLS: dict[str, tuple[Step, Step, Callable[[Engine], bool]]] = {
    # what is done before, the call, and how one sees that it was done
    "pause": (lambda _: None, lambda door: door.client.pause("keep"), lambda engine: engine.status().paused == "keep"),
    "resume": (
        lambda door: door.engine.pause("keep"),
        lambda door: door.client.resume(),
        lambda engine: not engine.status().paused,
    ),
    "release": (
        lambda _: None,
        lambda door: door.client.release_memory_occupation(["kv_cache"]),
        lambda engine: "kv_cache" in engine.status().released,
    ),
    "sleep": (lambda _: None, Door.sleep, lambda engine: "kv_cache" in engine.status().released),
    "resume memory": (
        lambda door: door.engine.release_memory_occupation(["kv_cache"]),
        lambda door: door.client.resume_memory_occupation(),
        lambda engine: not engine.status().released,
    ),
    "relabel": (
        lambda _: None,
        lambda door: door.client.set_weight_version("new"),
        lambda engine: engine.version == "new",
    ),
    "disk": (
        lambda _: None,
        lambda door: door.client.update_weights_from_disk(door.newer, "new"),
        lambda engine: engine.version == "new",
    ),
    "begin": (lambda _: None, Door.begin, lambda engine: engine.status().updating),
    "commit": (Door.stage, lambda door: door.client.commit(door.session), lambda engine: engine.version == "new"),
}
UNDONE = ("pause", "begin", "sleep")
"""What is undone where the core has done it, or only begun with it, when it is given up."""


def end_in_last_step(patch: pytest.MonkeyPatch) -> None:
    end_after_call(patch, lambda calls: calls.end())


def end_before_callback(patch: pytest.MonkeyPatch) -> None:
    end_after_call(patch, lambda calls: asyncio.get_running_loop().call_soon(calls.end))


def end_after_call(patch: pytest.MonkeyPatch, end: Callable[[WaitingCalls], object]) -> None:
    real: Any = WaitingCalls.run

    async def run(calls: WaitingCalls, request: Request, call: Coroutine[Any, Any, Any], *regret: Any) -> Any:
        async def then_end() -> Any:
            value = await call
            end(calls)
            return value

        return await real(calls, request, then_end(), *regret)

    patch.setattr(WaitingCalls, "run", run)


def end_once_the_core_has_done_it(patch: pytest.MonkeyPatch) -> None:
    """Before the front has seen to what follows."""
    real_run: Any = WaitingCalls.run
    real_settle: Any = Calls.settle
    ending: list[WaitingCalls] = []

    async def run(calls: WaitingCalls, *arguments: Any) -> Any:
        ending.append(calls)
        return await real_run(calls, *arguments)

    def settle(calls: Calls, reply: Reply) -> None:
        real_settle(calls, reply)
        if reply.status:
            for each in ending:
                each.end()
            ending.clear()

    patch.setattr(WaitingCalls, "run", run)
    patch.setattr(Calls, "settle", settle)


TURNS = (end_in_last_step, end_before_callback, end_once_the_core_has_done_it)


@pytest.mark.parametrize("turn", TURNS, ids=lambda turn: turn.__name__)
@pytest.mark.parametrize("name", CALLS)
def test_what_is_answered_is_what_is(
    engine: Engine, newer: Path, monkeypatch: pytest.MonkeyPatch, name: str, turn: Callable[[pytest.MonkeyPatch], None]
) -> None:
    prepare, call, is_done = CALLS[name]
    door = Door(engine, newer)
    prepare(door)
    turn(monkeypatch)
    if turn is end_once_the_core_has_done_it and name in UNDONE:
        with pytest.raises(ShutdownError, match="given up"):
            call(door)
        door.handle.stop()
        assert not is_done(engine)
    else:
        call(door)
        assert is_done(engine)
        door.handle.stop()
    door.client.close()


def test_a_commit_that_may_yet_be_done_is_not_said_to_be_given_up(
    engine: Engine, newer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    door = Door(engine, newer)
    door.stage()
    commit, is_begun, is_answered = engine.asynchronous.commit, threading.Event(), threading.Event()

    async def slow(session: Any) -> Any:
        is_begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            while not is_answered.is_set():
                await asyncio.sleep(0.01)
        return await commit(session)

    monkeypatch.setattr(engine.asynchronous, "commit", slow)

    def stop() -> None:
        is_begun.wait()
        door.handle.stop(0.0)

    stopping = threading.Thread(target=stop)
    stopping.start()
    with pytest.raises(UnavailableError, match="may have been done") as caught:
        door.client.commit(door.session)
    is_answered.set()
    stopping.join()
    assert not caught.value.retryable
    assert engine.version == "new"  # before the stop was over
    door.client.close()


def bucket_of(door: Door) -> None:
    """The first of an update of several, and no call in progress."""
    body = next(bodies("slime", load_file(door.newer / "model.safetensors"), "new"))
    assert httpx.post(f"{door.handle.url}/update_weights_from_tensor", json=body, timeout=60).status_code == 200


@pytest.mark.parametrize("begin", [Door.begin, Door.stage, bucket_of], ids=["begun", "staged", "bucket"])
def test_a_server_that_stops_drops_what_was_begun_at_it(engine: Engine, newer: Path, begin: Step) -> None:
    door, other = Door(engine, newer), Door(engine, newer)
    begin(door)
    other.handle.stop()
    assert engine.status().updating
    door.handle.stop()
    assert not engine.status().updating
    engine.resume()
    engine.abort_update(engine.begin_update("next", NORM, partial=True))
    for each in (door, other):
        each.client.close()


def test_a_server_that_stops_leaves_the_update_of_somebody_else(engine: Engine, newer: Path) -> None:
    door = Door(engine, newer)
    door.begin()
    door.client.abort_update(door.session)
    session = engine.begin_update("new", NORM, partial=True)
    door.handle.stop()
    assert engine.status().updating
    engine.abort_update(session)
    door.client.close()


def test_a_call_to_a_server_that_has_ended_leaves_no_coroutine(
    engine: Engine, newer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    door = Door(engine, newer)
    seen: list[WaitingCalls] = []
    real: Any = WaitingCalls.run

    async def run(calls: WaitingCalls, *arguments: Any) -> Any:
        if not seen:
            seen.append(calls)
            calls.end()
        return await real(calls, *arguments)

    monkeypatch.setattr(WaitingCalls, "run", run)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in (door.sleep, door.begin, lambda: door.client.pause("drain"), door.client.digest):
            with pytest.raises(ShutdownError):
                call()
        gc.collect()
    door.handle.stop()
    door.client.close()
    assert not [str(each.message) for each in caught if "never awaited" in str(each.message)]


class _Client:
    """A connection whose client is there until it is told to be gone."""

    def __init__(self) -> None:
        self.is_gone = False
        self.on_lost: Callable[[], None] | None = None

    async def verdict(self) -> None:
        """It takes a moment to know of one that sends nothing more."""
        await asyncio.sleep(0)


@pytest.mark.parametrize("num_turns", range(1, 5))
@pytest.mark.parametrize("way", ["cancelled", "gone", "ended"])
def test_nothing_is_left_of_a_call_of_which_nobody_hears(way: str, num_turns: int) -> None:
    """Whichever turn of the loop it is in which that becomes known."""

    async def scenario() -> tuple[bool, int]:
        client, calls, done = _Client(), WaitingCalls(lambda: None), itertools.count()
        held = 0

        async def call() -> int:
            nonlocal held
            await asyncio.sleep(0)
            held += 1
            return next(done)

        async def regret(_: int) -> None:
            nonlocal held
            held -= 1

        request = cast(Request, type("Asked", (), {"scope": {"state": {CLIENT: client}}}))
        handler = asyncio.ensure_future(calls.run(request, call(), regret))
        for _ in range(num_turns):
            await asyncio.sleep(0)
        if way == "cancelled":
            handler.cancel()
        elif way == "ended":
            calls.end()
        else:
            client.is_gone = True
            if client.on_lost is not None:
                client.on_lost()
        await asyncio.wait([handler])
        await calls.settle(1.0)
        is_told = not handler.cancelled() and handler.exception() is None
        return is_told, held

    is_told, held = asyncio.run(scenario())
    assert held == is_told
