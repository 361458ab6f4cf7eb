"""Finishing an update that names no session, again and too late: the same answer, and no label that is not its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace import DeadlineError, Engine, HeadraceError, UpdateConflictError, UpdateReport, WeightUpdateError
from headrace.engine.calls import Calls
from headrace.engine.joined_update import JoinedUpdate
from headrace.types.messages import Reply, SetVersion
from tests.engine.builders import SETTINGS, model_of, named_tensors
from tests.engine.test_joined_updates import HEAD, Tensors, buckets, kill_core, send


@pytest.fixture(scope="module")
def new() -> Tensors:
    return named_tensors(model_of(1))


@pytest.fixture(scope="module")
def shared(model_folder: Path) -> Iterator[Engine]:
    with Engine(model_folder, max_core_restarts=9, **SETTINGS) as engine:
        yield engine


@pytest.fixture
def engine(shared: Engine) -> Engine:
    """With the weights of its checkpoint."""
    shared.abort_update()
    shared.update_weights_from_tensor(named_tensors(model_of(0)), "old")
    return shared


def joined_of(engine: Engine) -> JoinedUpdate:
    return engine.asynchronous.runtime.joined


def wait(engine: Engine, call: Any) -> Any:
    return engine.asynchronous.runtime.wait(call)


def finish(engine: Engine, version: str = "") -> UpdateReport:
    report: UpdateReport = wait(engine, joined_of(engine).finish(version))
    return report


def failure(engine: Engine, version: str = "") -> tuple[type[HeadraceError], str, str]:
    with pytest.raises(HeadraceError) as caught:
        finish(engine, version)
    return type(caught.value), caught.value.field, caught.value.message


def begin(engine: Engine) -> None:
    wait(engine, joined_of(engine).begin())


def refuse(engine: Engine, bucket: Tensors, **terms: Any) -> None:
    with pytest.raises(HeadraceError):
        engine.update_weights_from_bucket(bucket, **terms)


def drop_for_a_folder(engine: Engine, new: Tensors, folder: Path) -> None:
    begin(engine)
    engine.update_weights_from_bucket(new[:3])
    engine.update_weights_from_disk(folder, "old")


def abort(engine: Engine, new: Tensors, folder: Path) -> None:
    begin(engine)
    engine.update_weights_from_bucket(new)
    engine.abort_update()


def let_time_run_out(engine: Engine, new: Tensors, folder: Path) -> None:
    begin(engine)
    engine.update_weights_from_bucket(new, timeout=0.05)
    while engine.status().updating:
        time.sleep(0.01)


def lack(engine: Engine, new: Tensors, folder: Path) -> None:
    begin(engine)
    engine.update_weights_from_bucket(new[:-1])


def lose_a_call(engine: Engine, new: Tensors, folder: Path) -> None:
    """Its client went away between two buckets of an update that was whole before."""

    async def scenario() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.asynchronous.update_weights_from_bucket(new[:2]), 0.3)

    begin(engine)
    engine.update_weights_from_bucket(new)
    stage = engine.asynchronous.runtime.updater.stage
    engine.asynchronous.runtime.updater.stage = lambda *_: asyncio.sleep(60)  # type: ignore[method-assign]
    try:
        asyncio.run(scenario())
    finally:
        engine.asynchronous.runtime.updater.stage = stage  # type: ignore[method-assign]


FAILURES: dict[str, tuple[Callable[[Engine, Tensors, Path], Any], type[HeadraceError]]] = {
    "nothing came": (lambda engine, new, folder: begin(engine), UpdateConflictError),
    "refused": (lambda engine, new, folder: refuse(engine, [("nobody's", torch.zeros(1))]), UpdateConflictError),
    "words": (lambda engine, new, folder: refuse(engine, new, mode="magic"), UpdateConflictError),
    "incomplete": (lack, WeightUpdateError),
    "another road": (drop_for_a_folder, UpdateConflictError),
    "aborted": (abort, UpdateConflictError),
    "late": (let_time_run_out, DeadlineError),
    "a client went away": (lose_a_call, UpdateConflictError),
}


@pytest.mark.parametrize("how", FAILURES)
@pytest.mark.parametrize("follows", [False, True])
def test_a_finish_that_has_failed_fails_again_until_another_update_begins(
    engine: Engine, new: Tensors, model_folder: Path, how: str, follows: bool
) -> None:
    """Also behind one that was committed by a bucket and waits for its label."""
    if follows:
        send(engine, buckets(named_tensors(model_of(0))), in_flight="keep")
    before, (fail, kind) = engine.digest(), FAILURES[how]
    fail(engine, new, model_folder)
    first = failure(engine, "7")
    assert first[0] is kind
    assert failure(engine, "7") == failure(engine) == first
    assert (engine.version, engine.digest()) == ("old", before)
    begin(engine)
    assert engine.update_weights_from_bucket(new) is None
    report = finish(engine, "8")
    assert report.version == engine.version == "8" and finish(engine, "8") == finish(engine) == report
    refuse(engine, [("nobody's", torch.zeros(1))])
    send(engine, buckets(named_tensors(model_of(0))))  # without begin: a bucket is another update, too
    assert finish(engine, "9").version == engine.version == "9"


def test_nothing_is_finished_where_nothing_was_begun(start: Callable[..., Engine]) -> None:
    engine = start()
    assert failure(engine, "7") == failure(engine) and engine.version == "default"


def test_a_late_head_that_differs_is_an_error_in_the_update(engine: Engine, new: Tensors) -> None:
    send(engine, buckets(new))
    refuse(engine, [(HEAD, dict(new)["model.embed_tokens.weight"] + 1)])
    assert failure(engine, "7")[0] is UpdateConflictError and engine.version == "old"


def test_the_first_finish_of_one_that_is_live_brings_its_label_and_no_other_does(engine: Engine, new: Tensors) -> None:
    report = send(engine, buckets(new))
    epoch = engine.status().epoch
    assert finish(engine, "7").version == "7" and (engine.version, engine.status().epoch) == ("7", epoch)
    assert finish(engine, "7") == finish(engine) and finish(engine).epoch == report.epoch
    assert failure(engine, "8")[:2] == (UpdateConflictError, "version") and engine.version == "7"


@pytest.mark.parametrize("change", ["other weights", "noise", "killed"])
def test_one_that_is_live_no_more_is_neither_finished_nor_labelled(engine: Engine, new: Tensors, change: str) -> None:
    send(engine, buckets(new))
    finish(engine)
    if change == "other weights":
        engine.update_weights_from_tensor(named_tensors(model_of(2)), "other")
    elif change == "noise":
        engine.weights_checker("reset_tensors")
    else:
        kill_core(engine)
    version = engine.version
    assert failure(engine) == failure(engine, "7") and engine.version == version
    assert failure(engine)[0] is UpdateConflictError


def test_a_label_that_names_other_weights_is_refused_by_the_core(engine: Engine) -> None:
    client, epoch = engine.asynchronous.runtime.client, engine.status().epoch
    with pytest.raises(UpdateConflictError, match="live no more"):
        wait(engine, client.change(lambda call_id: SetVersion(call_id, "x", epoch=epoch - 1), type(None)))
    wait(engine, client.change(lambda call_id: SetVersion(call_id, "y", epoch=epoch), type(None)))
    assert engine.version == "y"


@pytest.mark.parametrize("is_back", [False, True])
def test_a_core_that_died_before_the_finish_leaves_its_error(engine: Engine, new: Tensors, is_back: bool) -> None:
    begin(engine)
    assert engine.update_weights_from_bucket(new) is None
    if is_back:
        kill_core(engine)
        first = failure(engine, "7")
    else:
        engine.asynchronous.runtime.host.kill()
        first = failure(engine, "7")
        while not engine.asynchronous.runtime.client.is_alive:
            time.sleep(0.01)
    assert failure(engine, "7") == failure(engine) == first and engine.status().version == ""
    begin(engine)
    assert engine.update_weights_from_bucket(new) is None
    assert finish(engine, "8").version == engine.version == "8"


@pytest.fixture
def drained(engine: Engine, new: Tensors) -> Iterator[Callable[[], None]]:
    """An update whose commit waits for a request in flight until this is called."""
    engine.slow_down(0.02)
    params = {"max_new_tokens": 200, "ignore_eos": True}
    thread = threading.Thread(target=lambda: engine.generate(input_ids=[1], sampling_params=params))
    thread.start()
    while not engine.metrics()["num_running"]:
        time.sleep(0.01)

    def end() -> None:
        engine.abort(all=True)
        thread.join(60)

    yield end
    engine.slow_down(0.0)
    end()


def ask_to_finish(engine: Engine, version: str) -> Future[UpdateReport]:
    return commits(engine, joined_of(engine).finish(version))


def commits(engine: Engine, call: Any) -> Future[Any]:
    """A call, once an update is committed by it or by another."""
    asked = asyncio.run_coroutine_threadsafe(call, engine.asynchronous.runtime.loop)
    while not joined_of(engine)._committing.locked():
        time.sleep(0.01)
    return asked


def test_a_finish_that_comes_while_the_update_commits_waits_for_its_verdict(
    engine: Engine, new: Tensors, drained: Callable[[], None]
) -> None:
    begin(engine)
    assert engine.update_weights_from_bucket(new, in_flight="drain") is None
    first, second = ask_to_finish(engine, "7"), ask_to_finish(engine, "7")
    time.sleep(0.1)
    assert not first.done() and not second.done() and engine.version == "old"
    drained()
    assert first.result(60) == second.result(60) and engine.version == "7"


@pytest.mark.parametrize("by_name", [True, False])
def test_a_commit_that_was_given_up_fails_who_asks_again(
    engine: Engine, new: Tensors, drained: Callable[[], None], by_name: bool
) -> None:
    """A client's read timeout, and its retry: before and after the first is over. Or a bucket commits it."""
    before, runtime = engine.digest(), engine.asynchronous.runtime
    if by_name:
        begin(engine)
        assert engine.update_weights_from_bucket(new, in_flight="drain") is None
        first: Future[Any] = ask_to_finish(engine, "7")
    else:
        bucket = engine.asynchronous.update_weights_from_bucket(new, in_flight="drain")
        first = commits(engine, bucket)
    retried = ask_to_finish(engine, "7")
    first.cancel()
    with pytest.raises(UpdateConflictError, match="went away"):
        retried.result(60)
    assert failure(engine, "7")[0] is UpdateConflictError
    with pytest.raises(UpdateConflictError, match="went away"):
        wait(engine, runtime.joined.check_label())
    drained()
    assert (engine.version, engine.digest()) == ("old", before)


def test_a_commit_that_was_given_up_too_late_is_one(
    engine: Engine, new: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are live, whoever heard of it."""
    runtime, asking, is_live = engine.asynchronous.runtime, list[Any](), threading.Event()
    settle: Any = Calls.settle

    def settle_and_cancel(calls: Calls, reply: Reply) -> None:
        """Between the answer and whoever waits for it."""
        settle(calls, reply)
        if not is_live.is_set() and runtime.client.ledger.landed is not landed:
            is_live.set()
            asking[0].cancel()

    async def finish_in_task() -> UpdateReport | None:
        asking.append(asyncio.current_task())
        return await joined_of(engine).finish("7")

    begin(engine)
    assert engine.update_weights_from_bucket(new) is None
    landed = runtime.client.ledger.landed
    monkeypatch.setattr(Calls, "settle", settle_and_cancel)
    asked = asyncio.run_coroutine_threadsafe(finish_in_task(), runtime.loop)
    assert is_live.wait(60)
    with contextlib.suppress(CancelledError):  # who went away may have heard of it all the same
        asked.result(60)
    report = finish(engine, "7")
    assert report.version == engine.version == "7" and report.num_tensors == len(new)
    wait(engine, runtime.joined.check_label())


def test_a_label_by_itself_is_refused_behind_an_update_that_failed(
    engine: Engine, new: Tensors, model_folder: Path
) -> None:
    """Until another is begun, or weights land by whatever road."""
    check: Callable[[], None] = lambda: wait(engine, joined_of(engine).check_label())  # noqa: E731
    for go_on in (
        lambda: begin(engine),
        lambda: engine.update_weights_from_bucket(new[:2]),
        lambda: engine.update_weights_from_disk(model_folder, "x"),
        lambda: engine.update_weights_from_tensor(new, "x"),
    ):
        check()
        begin(engine)
        assert engine.update_weights_from_bucket(new[:-1]) is None
        assert failure(engine)[0] is WeightUpdateError
        for _ in range(2):
            with pytest.raises(WeightUpdateError):
                check()
        go_on()
        check()
        engine.abort_update()
