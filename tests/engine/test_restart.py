"""A core that dies is started again within a budget, and serves again only under the weights that its labels name."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from headrace import (
    AsyncEngine,
    DeviceLostError,
    Engine,
    EngineDeadError,
    NeedsWeightsError,
    SamplingParams,
    ShutdownError,
    UpdateConflictError,
    WeightUpdateError,
    serve,
)
from headrace.config import Takeover
from headrace.engine.ledger import Ledger
from headrace.ipc.restarts import MAX_DELAY_SECONDS, RestartBudget
from headrace.runner import Runner
from headrace.types.messages import CommitUpdate, Pause, Reply, Resume, SetVersion, UpdateFromDisk, WeightsChecker
from headrace.types.weights import UpdateReport
from headrace.weights.files import weight_files
from tests.engine.builders import SETTINGS, model_of, named_tensors

PROMPT = [1, 2, 3]
SHORT = SamplingParams(temperature=0.0, max_new_tokens=8, ignore_eos=True)
LONG = SamplingParams(max_new_tokens=900, ignore_eos=True)


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.01)


def pid_of(engine: Engine) -> int:
    return engine.asynchronous.runtime.host.pid


def kill(engine: Engine) -> int:
    """Kill the core and wait until that is noticed; returns the dead one's id."""
    pid = pid_of(engine)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not engine.asynchronous.runtime.client.is_alive or pid_of(engine) != pid)
    return pid


def kill_and_wait(engine: Engine) -> None:
    """Kill the core and wait for the next one."""
    pid = kill(engine)
    wait_for(lambda: pid_of(engine) != pid and engine.asynchronous.runtime.client.is_alive)


def is_ready(engine: Engine) -> bool:
    return engine.is_ready


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


Start = Callable[..., Engine]


@pytest.fixture
def start_process(model_folder: Path) -> Iterator[Start]:
    """Start engines with cores of their own; their steps cost nothing unless told otherwise."""
    started: list[Engine] = []

    def start_engine(**settings: Any) -> Engine:
        asked = {"executor": "free", "skip_tokenizer_init": True, "max_core_restarts": 3, **SETTINGS, **settings}
        started.append(Engine(model_folder, **asked))
        return started[-1]

    yield start_engine
    for each in started:
        each.shutdown()


def test_a_budget_gives_restarts_within_a_window_each_later_than_the_one_before() -> None:
    budget = RestartBudget(3, 100.0)
    assert [budget.take(now) for now in (0.0, 1.0, 2.0)] == [0.0, 1.0, 2.0]
    assert budget.take(99.0) is None
    assert budget.take(100.0) == 2.0 and budget.take(100.5) is None
    assert RestartBudget(0, 100.0).take(0.0) is None
    many = RestartBudget(100, 1e9)
    assert [many.take(0.0) for _ in range(20)][-1] == MAX_DELAY_SECONDS


REPORT = msgspec.msgpack.encode(UpdateReport("v7", 7, 1, 1, "shadow", 0.0, 0))


def acknowledged(ledger: Ledger, command: Any) -> None:
    is_update = isinstance(command, (CommitUpdate, UpdateFromDisk))
    ledger.sent(command)
    ledger.answered(Reply(command.call_id, REPORT if is_update else b"\xc0"))


@pytest.mark.parametrize("command", [CommitUpdate(1, 1), UpdateFromDisk(1, "/x", "v7"), SetVersion(1, "v7")])
def test_a_ledger_believes_what_was_acknowledged_and_doubts_what_was_not(command: Any) -> None:
    done, refused, unanswered = Ledger("a"), Ledger("a"), Ledger("a")
    acknowledged(done, command)
    found = done.bury()
    assert (found.version, found.is_current) == ("v7", False)
    assert found.epoch > 7 or isinstance(command, SetVersion)
    refused.sent(command)
    refused.answered(Reply(1, error=WeightUpdateError("no").info()))
    assert refused.bury() == Takeover("a", 1, is_current=True)
    unanswered.sent(command)
    assert unanswered.bury() == Takeover("a", 2, is_current=False)
    assert unanswered.bury() == Takeover("a", 3, is_current=False)


def test_a_ledger_keeps_pauses_that_were_acknowledged() -> None:
    ledger = Ledger("a")
    ledger.sent(Pause(1, "drain"))
    pauses = [ledger.paused]
    ledger.answered(Reply(1))
    pauses.append(ledger.paused)
    ledger.sent(Resume(2))
    ledger.bury()
    pauses.append(ledger.paused)
    acknowledged(ledger, Resume(3))
    acknowledged(ledger, WeightsChecker(4, "snapshot"))
    assert [*pauses, ledger.paused] == [None, "drain", "drain", None] and ledger.bury().is_current
    acknowledged(ledger, WeightsChecker(5, "reset_tensors"))
    assert not ledger.bury().is_current


def test_a_core_without_updates_comes_back_and_serves_the_same(start_process: Start) -> None:
    engine = start_process(executor="local", skip_tokenizer_init=False)
    expected = engine.generate(input_ids=PROMPT, sampling_params=SHORT)[0]
    seeds = [engine.generate(input_ids=PROMPT, sampling_params={"max_new_tokens": 1})[0].seed for _ in range(2)]
    digest = engine.digest()
    session = engine.begin_update("never", [("model.norm.weight", (32,), "float32")], partial=True)
    kill_and_wait(engine)
    assert engine.is_alive and engine.digest() == digest and engine.version == "default"
    with pytest.raises(UpdateConflictError, match="not open"):
        engine.commit(session)
    again = engine.generate(input_ids=PROMPT, sampling_params=SHORT)[0]
    assert (again.token_ids, again.version_spans) == (expected.token_ids, expected.version_spans)
    seeds += [engine.generate(input_ids=PROMPT, sampling_params={"max_new_tokens": 1})[0].seed for _ in range(2)]
    assert len(set(seeds)) == 4  # the engine's own go on, they do not begin again


def test_a_core_with_an_update_needs_weights_until_a_complete_one_lands(start_process: Start) -> None:
    engine = start_process(executor="local")
    tensors = named_tensors(model_of(1))
    before = engine.update_weights_from_tensor(tensors, "step-1")
    expected, digest = engine.generate(input_ids=PROMPT, sampling_params=SHORT)[0].token_ids, engine.digest()
    session = engine.begin_update("step-2", [(n, tuple(t.shape), "float32") for n, t in tensors])
    kill_and_wait(engine)
    status = engine.status()
    assert (status.state, status.version, status.last_version) == ("needs_weights", "", "step-1")
    assert engine.version == "" and not is_ready(engine)
    reads: list[Callable[[], object]] = [
        engine.digest,
        lambda: engine.get_weights_by_name(tensors[0][0]),
        lambda: engine.weights_checker("snapshot"),
        lambda: engine.set_weight_version("step-9"),  # a label does not make weights
    ]
    for read in reads:
        with pytest.raises(NeedsWeightsError):
            read()
    with pytest.raises(NeedsWeightsError) as refused:
        engine.generate(input_ids=PROMPT, sampling_params=SHORT)
    assert refused.value.retryable and refused.value.status == 503
    with pytest.raises(WeightUpdateError, match="only a complete update"):
        engine.update_weights_from_tensor(tensors[:1], "step-2", partial=True)
    for late in (lambda: engine.stage(session, tensors), lambda: engine.commit(session)):
        with pytest.raises(UpdateConflictError):
            late()
    report = engine.update_weights_from_tensor(tensors, "step-1")
    assert report.epoch > before.epoch + 1 and engine.digest() == digest and is_ready(engine)
    again = engine.generate(input_ids=PROMPT, sampling_params=SHORT)[0]
    assert (again.token_ids, again.version_spans) == (expected, [("step-1", 8)])


def test_a_relabelled_core_needs_weights(start_process: Start) -> None:
    engine = start_process()
    engine.set_weight_version("step-1")
    kill_and_wait(engine)
    with pytest.raises(NeedsWeightsError):
        engine.generate(input_ids=PROMPT, sampling_params=SHORT)


def test_a_core_killed_while_it_is_updated_is_ready_or_needs_weights_but_never_mixed(start_process: Start) -> None:
    engine = start_process(executor="local")
    tensors = named_tensors(model_of(1))
    digest = engine.digest()
    session = engine.begin_update("step-1", [(n, tuple(t.shape), "float32") for n, t in tensors], mode="inplace")
    engine.stage(session, tensors[:3])
    kill_and_wait(engine)
    assert engine.digest() == digest and is_ready(engine)
    assert engine.generate(input_ids=PROMPT, sampling_params=SHORT)[0].version_spans == [("default", 8)]


@pytest.mark.parametrize("mode", ["keep", "recompute", "abort", "drain"])
def test_a_paused_core_comes_back_paused(start_process: Start, mode: Any) -> None:
    engine = start_process()
    engine.pause(mode)
    kill_and_wait(engine)
    assert engine.status().paused == mode and not is_ready(engine)
    engine.resume()
    assert is_ready(engine) and len(engine.generate(input_ids=PROMPT, sampling_params=SHORT)[0].token_ids) == 8
    kill_and_wait(engine)
    assert is_ready(engine)


def test_what_runs_is_answered_at_once_and_told_what_goes_on(start_process: Start) -> None:
    engine = start_process(executor="local")

    async def run() -> list[Any]:
        calls = [engine.asynchronous.generate(input_ids=PROMPT, sampling_params=LONG) for _ in range(8)]
        tasks = [asyncio.ensure_future(call) for call in calls]
        while len(engine.asynchronous.runtime.client._sinks) < 8:
            await asyncio.sleep(0.01)
        kill(engine)
        found = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert engine.is_alive and not is_ready(engine)
        with pytest.raises(EngineDeadError):
            await engine.asynchronous.digest()
        return found

    found = asyncio.run(run())
    assert all(isinstance(each, EngineDeadError) and each.retryable and "signal 9" in str(each) for each in found)
    wait_for(lambda: is_ready(engine))
    assert len(engine.generate(input_ids=PROMPT, sampling_params=SHORT)[0].token_ids) == 8


def test_killed_again_while_it_starts_it_is_started_once_more(start_process: Start) -> None:
    engine = start_process()
    first = kill(engine)
    wait_for(lambda: pid_of(engine) != first)
    second = pid_of(engine)
    os.kill(second, signal.SIGKILL)  # it cannot be ready yet
    wait_for(lambda: pid_of(engine) not in (first, second) and is_ready(engine))
    assert is_gone(first) and is_gone(second)
    assert len(engine.generate(input_ids=PROMPT, sampling_params=SHORT)[0].token_ids) == 8


def test_a_spent_budget_is_the_end(start_process: Start) -> None:
    engine = start_process(max_core_restarts=1)
    kill_and_wait(engine)
    kill(engine)
    reason = engine.wait_ended()
    assert isinstance(reason, EngineDeadError) and "max_core_restarts 1" in reason.message
    assert not engine.is_alive and not is_ready(engine)
    for call in (engine.metrics, lambda: engine.generate(input_ids=PROMPT)):
        with pytest.raises(EngineDeadError, match="max_core_restarts 1"):
            call()


def test_in_python_a_core_is_not_restarted_unless_asked(start_process: Start) -> None:
    engine = start_process(max_core_restarts=None)
    assert engine.asynchronous.runtime.supervisor.ended.done() is False
    kill(engine)
    assert isinstance(engine.wait_ended(), EngineDeadError) and not engine.is_alive


def test_the_end_can_be_awaited(model_folder: Path) -> None:
    async def run() -> Any:
        engine = AsyncEngine(model_folder, executor="free", **SETTINGS)
        given_up = asyncio.create_task(engine.wait_ended())
        await engine.start()
        await asyncio.sleep(0)
        given_up.cancel()
        waiting = asyncio.create_task(engine.wait_ended())
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await engine.shutdown()
        return await asyncio.wait_for(waiting, 10)

    assert isinstance(asyncio.run(run()), ShutdownError)


def test_shutdown_while_a_core_is_started_again_leaves_none(start_process: Start) -> None:
    for wait_for_the_next in (False, True):
        engine = start_process()
        first = kill(engine)
        if wait_for_the_next:
            wait_for(lambda each=engine, pid=first: pid_of(each) != pid)  # type: ignore[misc]
        engine.shutdown()
        assert is_gone(first) and is_gone(pid_of(engine))
        with pytest.raises(ShutdownError):
            engine.generate(input_ids=PROMPT)


@pytest.fixture
def copied(model_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint that the test may spoil."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_a_checkpoint_that_was_written_meanwhile_is_not_taken_for_the_old_one(copied: Path) -> None:
    """A trainer saves its next step where the engine began."""
    with Engine(copied, max_core_restarts=2, skip_tokenizer_init=True, **SETTINGS) as engine:
        model_of(1).save_pretrained(copied)
        kill_and_wait(engine)
        with pytest.raises(NeedsWeightsError):
            engine.generate(input_ids=PROMPT)


def test_a_checkpoint_that_is_gone_ends_it(copied: Path) -> None:
    with Engine(copied, max_core_restarts=2, skip_tokenizer_init=True, **SETTINGS) as engine:
        (copied / "model.safetensors").unlink()
        kill(engine)
        reason = engine.wait_ended()
        assert "did not start again" in reason.message and "safetensors" in reason.message
        assert reason.message.count("did not start again") == 1


def test_a_lost_device_of_the_caller_s_process_is_the_end(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model_folder, inprocess=True, max_core_restarts=3, **SETTINGS)
    server = serve(engine)
    assert httpx.get(f"{server.url}/health").status_code == 200

    def launch(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Runner, "launch", launch)
    for _ in range(2):
        with pytest.raises(DeviceLostError, match="illegal memory access") as lost:
            engine.generate(input_ids=[PROMPT] * 4, sampling_params=SHORT)
        assert isinstance(lost.value, EngineDeadError) and lost.value.retryable
    monkeypatch.undo()
    assert isinstance(engine.wait_ended(), DeviceLostError) and not engine.is_alive
    reply = httpx.post(f"{server.url}/generate", json={"input_ids": PROMPT})
    assert (reply.status_code, reply.json()["retryable"]) == (503, True)
    assert {httpx.get(server.url + path).status_code for path in ("/health", "/ready", "/health_generate")} == {503}
    engine.shutdown()


def test_a_name_that_leads_nowhere_is_no_weight_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    for name, target in (("a.bin", "/nonexistent"), ("b.bin", "b.bin")):
        (tmp_path / name).symlink_to(target)
    assert [name for name, *_ in weight_files(str(tmp_path))] == ["model.safetensors"]
