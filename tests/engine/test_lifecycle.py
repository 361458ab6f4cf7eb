"""Where an engine may live and how it ends: threads, loops, scripts, dropped references, killed processes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from headrace import (
    AsyncEngine,
    CheckpointError,
    ConfigError,
    DeadlineError,
    Engine,
    EngineDeadError,
    Generation,
    HeadraceError,
    RequestError,
    SamplingParams,
    ShutdownError,
    UnsupportedModelError,
    serve,
)
from headrace.config import ResolvedConfig
from headrace.core import serve_core
from headrace.engine.core_host import ExecutorKind
from headrace.ipc import CoreLink
from tests.arch.source import child_environment
from tests.engine.builders import SETTINGS, model_of, named_tensors, shared_memory
from tests.processes import children_of, runs

PROMPT = [1, 2, 3]
SHORT = SamplingParams(temperature=0.0, max_new_tokens=8, ignore_eos=True)
LONG = SamplingParams(max_new_tokens=1000, ignore_eos=True)
DEATH_SECONDS = 5.0


@pytest.fixture(scope="module")
def spawned(model_folder: Path) -> Iterator[Engine]:
    with Engine(model_folder, **SETTINGS) as shared:
        yield shared


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.005)


def core_pid(engine: Engine) -> int:
    return engine.asynchronous.runtime.host.pid


def test_a_core_process_and_a_core_thread_give_the_same_results(spawned: Engine, engine: Engine) -> None:
    assert core_pid(spawned) != os.getpid() == core_pid(engine)
    params = {"max_new_tokens": 16, "seed": 5, "n": 3, "ignore_eos": True}
    prompts = ["hello", "a longer prompt than that"]
    for one, other in zip(
        spawned.generate(prompts, sampling_params=params, top_logprobs=2, return_prompt_logprobs=True),
        engine.generate(prompts, sampling_params=params, top_logprobs=2, return_prompt_logprobs=True),
        strict=True,
    ):
        assert (one.token_ids, one.text, one.seed) == (other.token_ids, other.text, other.seed)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        assert one.prompt_logprobs[1:] == pytest.approx(other.prompt_logprobs[1:], abs=1e-5)
    assert spawned.digest() == engine.digest()


def test_many_threads_may_call_one_engine(spawned: Engine) -> None:
    expected = spawned.generate(input_ids=PROMPT, sampling_params=SHORT)[0].token_ids
    found: list[list[int]] = []

    def call() -> None:
        for _ in range(5):
            found.append(spawned.generate(input_ids=PROMPT, sampling_params=SHORT)[0].token_ids)
            found.append(
                [t for piece in spawned.stream(input_ids=PROMPT, sampling_params=SHORT) for t in piece.token_ids]
            )

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [expected] * 80


def test_blocking_calls_work_inside_a_running_loop(model_folder: Path) -> None:
    async def notebook_cell() -> list[int]:
        with Engine(model_folder, inprocess=True, **SETTINGS) as inner:
            return inner.generate(input_ids=PROMPT, sampling_params=SHORT)[0].token_ids

    assert len(asyncio.run(notebook_cell())) == 8


def test_one_async_engine_serves_loops_in_several_threads(model_folder: Path) -> None:
    engine = AsyncEngine(model_folder, inprocess=True, **SETTINGS)
    found: list[list[int]] = []

    async def call() -> None:
        for generation in await engine.generate(input_ids=[PROMPT, PROMPT], sampling_params=SHORT):
            found.append(generation.token_ids)

    threads = [threading.Thread(target=lambda: asyncio.run(call())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    engine.close()
    assert len(found) == 8 and len({tuple(ids) for ids in found}) == 1


def test_an_engine_made_on_a_loop_starts_beside_it(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The constructor returns at once, and whatever is asked waits for the start."""
    may_start = threading.Event()

    def load_later(*_: object) -> None:
        assert may_start.wait(60)

    monkeypatch.setattr("headrace.engine.starting.load_tokenizer", load_later)

    async def run() -> list[list[int]]:
        engine = AsyncEngine(model_folder, inprocess=True, executor="free", **SETTINGS)
        assert (engine.is_alive, engine.is_ready, engine.version) == (False, False, "default")
        with pytest.raises(TimeoutError):  # whoever gives up waiting does not end the start
            await asyncio.wait_for(engine.generate(input_ids=PROMPT, sampling_params=SHORT), 0.01)
        asked = [asyncio.create_task(engine.generate(input_ids=PROMPT, sampling_params=SHORT)) for _ in range(3)]
        begun = asyncio.create_task(engine.begin_update("x", [("model.norm.weight", (32,), "float32")], partial=True))
        for _ in range(20):
            await asyncio.sleep(0.01)
        assert not any(task.done() for task in (*asked, begun))
        may_start.set()
        await begun
        async with engine as same:
            assert same is engine and engine.is_alive
            return [(await task)[0].token_ids for task in asked]

    assert [len(ids) for ids in asyncio.run(run())] == [8, 8, 8]


def test_a_start_on_a_loop_that_fails_is_told_to_whoever_waits(tmp_path: Path) -> None:
    async def run() -> None:
        engine = AsyncEngine(tmp_path, **SETTINGS)
        calls: list[Callable[[], Any]] = [engine.start, engine.metrics, engine.wait_ended, lambda: engine.commit(None)]  # type: ignore[arg-type]
        for call in calls:
            with pytest.raises(CheckpointError, match="config.json"):
                await call()
        assert not engine.is_alive and not engine.is_ready
        with pytest.raises(CheckpointError):
            async with engine:
                pass
        with pytest.raises(ConfigError):
            AsyncEngine(tmp_path, page_size=0)

    asyncio.run(run())


def test_an_engine_may_be_shut_down_while_it_starts(model_folder: Path) -> None:
    before = threading.active_count()

    async def run() -> None:
        for delay in (0.0, 0.05, 0.3):
            engine = AsyncEngine(model_folder, **SETTINGS)
            await asyncio.sleep(delay)
            await engine.shutdown()
            with pytest.raises(ShutdownError):
                await engine.generate(input_ids=PROMPT)

    asyncio.run(run())
    wait_for(lambda: threading.active_count() <= before)


def test_two_engines_in_one_process(spawned: Engine, model_folder: Path) -> None:
    with Engine(model_folder, inprocess=True, **SETTINGS) as other:
        other.set_weight_version("other")
        one = spawned.generate(input_ids=PROMPT, sampling_params=SHORT)[0]
        two = other.generate(input_ids=PROMPT, sampling_params=SHORT)[0]
    assert one.token_ids == two.token_ids
    assert [one.version_spans, two.version_spans] == [[("default", 8)], [("other", 8)]]
    assert spawned.generate(input_ids=PROMPT, sampling_params=SHORT)


SCRIPT = """
import signal, threading
before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
from headrace import Engine
engine = Engine({folder!r}, skip_tokenizer_init=True, **{settings!r})
engine.generate(input_ids=[1, 2, 3], sampling_params={{"max_new_tokens": 4, "ignore_eos": True}})
assert before == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)], "signal handlers were installed"
print("core", engine.asynchronous.runtime.host.pid, flush=True)
{end}
"""


def script(folder: Path, end: str) -> subprocess.Popen[str]:
    code = SCRIPT.format(folder=str(folder), settings=SETTINGS, end=end)
    environment = child_environment()
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def read_core_pid(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("core "):
            return int(line.split()[1])
    raise AssertionError(process.stderr.read() if process.stderr else "")


def test_a_script_without_a_main_guard_ends_by_itself_and_quietly(model_folder: Path) -> None:
    """Neither `shutdown` nor a context manager: the interpreter's end is enough."""
    with script(model_folder, "print('done')") as process:
        pid = read_core_pid(process)
        assert process.stdout is not None and process.stderr is not None
        output, errors = process.stdout.read(), process.stderr.read()
    assert process.returncode == 0 and "done" in output
    assert "Traceback" not in errors and "Error" not in errors and "Warning" not in errors
    wait_for(lambda: not runs(pid), DEATH_SECONDS)


def test_a_killed_parent_leaves_nothing(model_folder: Path) -> None:
    """With requests running and buffers of an update open."""
    before = shared_memory()
    end = """
threading.Thread(target=lambda: engine.generate(input_ids=[[1]] * 8, sampling_params={"max_new_tokens": 1000})).start()
import numpy
session = engine.begin_update("x", [("model.norm.weight", (32,), "float32")], partial=True)
engine.stage(session, [("model.norm.weight", numpy.ones(32, numpy.float32))])
print("core", engine.asynchronous.runtime.host.pid, flush=True)
import time; time.sleep(60)
"""
    with script(model_folder, end) as process:
        pid = read_core_pid(process)
        assert read_core_pid(process) == pid and runs(pid)
        process.kill()
        wait_for(lambda: not runs(pid), DEATH_SECONDS)
    assert shared_memory() <= before


def _num_asked(engine: Engine) -> int:
    metrics = engine.metrics()
    return int(metrics["num_running"] + metrics["num_waiting"])


def test_a_killed_core_answers_everybody_in_seconds(model_folder: Path) -> None:
    engine = Engine(model_folder, **SETTINGS)
    outcomes: list[Exception | list[Generation]] = []

    def call(number: int) -> None:
        try:
            outcomes.append(engine.generate(input_ids=[number + 1], sampling_params=LONG))
        except HeadraceError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    wait_for(lambda: _num_asked(engine) == 64)  # not all of which have room to their ends
    os.kill(core_pid(engine), signal.SIGKILL)
    killed_at = time.monotonic()
    for thread in threads:
        thread.join(DEATH_SECONDS)
    assert time.monotonic() - killed_at < DEATH_SECONDS
    assert len(outcomes) == 64 and all(isinstance(outcome, EngineDeadError) for outcome in outcomes)
    assert all("signal 9" in str(outcome) for outcome in outcomes)
    assert not engine.is_alive and not engine.is_ready
    for dead_call in (engine.metrics, engine.digest, lambda: engine.generate(input_ids=[1])):
        with pytest.raises(EngineDeadError):
            dead_call()
    engine.shutdown()


def test_shutdown_answers_what_runs_and_can_be_repeated(model_folder: Path) -> None:
    engine = Engine(model_folder, **SETTINGS)
    pid, num_before = core_pid(engine), len(os.listdir("/proc/self/fd"))
    found: list[Generation] = []
    thread = threading.Thread(
        target=lambda: found.extend(engine.generate(input_ids=[PROMPT] * 4, sampling_params=LONG))
    )
    thread.start()
    wait_for(lambda: engine.metrics()["num_running"] == 4)
    closers = [threading.Thread(target=engine.shutdown) for _ in range(3)]
    for closer in closers:
        closer.start()
    for waiting in (thread, *closers):
        waiting.join(20)
        assert not waiting.is_alive()
    assert [each.finish_reason for each in found] == ["abort"] * 4
    assert all(len(each.token_ids) == len(each.logprobs) for each in found)
    assert not runs(pid) and len(os.listdir("/proc/self/fd")) < num_before
    engine.shutdown()
    calls: list[Callable[[], object]] = [
        lambda: engine.generate(input_ids=PROMPT),
        lambda: list(engine.stream(input_ids=PROMPT)),
        lambda: engine.score(input_ids=PROMPT),
        lambda: engine.update_weights_from_tensor([], version="x"),
        engine.pause,
        engine.resume,
        engine.release_memory_occupation,
        engine.resume_memory_occupation,
        engine.flush_cache,
        engine.metrics,
        engine.digest,
        lambda: engine.abort(all=True),
        lambda: serve(engine),
    ]
    for call in calls:
        with pytest.raises(ShutdownError):
            call()


@pytest.mark.parametrize("inprocess", [False, True])
def test_shutdown_answers_streams_whose_readers_are_slower(model_folder: Path, inprocess: bool) -> None:
    engine = Engine(model_folder, inprocess=inprocess, **SETTINGS)
    streams = [engine.stream(input_ids=[PROMPT] * 2, sampling_params=LONG) for _ in range(3)]
    pieces = [[next(stream)] for stream in streams]
    closer = threading.Thread(target=engine.shutdown)
    closer.start()
    wait_for(lambda: engine.asynchronous.runtime.is_closing)
    for found, stream in zip(pieces, streams, strict=True):
        found.extend(stream)  # the first while the engine ends, the last certainly after
        closer.join(20)
        assert sorted(each.prompt_index for each in found if each.finish_reason == "abort") == [0, 1]


def test_shutdown_answers_streams_of_an_event_loop(model_folder: Path) -> None:
    async def run() -> list[Generation]:
        engine = AsyncEngine(model_folder, **SETTINGS)
        stream = engine.stream(input_ids=PROMPT, sampling_params=LONG)
        found = [await anext(stream)]
        ending = asyncio.create_task(engine.shutdown())
        while not engine.runtime.is_closing:
            await asyncio.sleep(0.001)
        found += [piece async for piece in stream]
        await ending
        return found

    assert asyncio.run(run())[-1].finish_reason == "abort"


def test_a_fork_does_not_touch_the_engine(spawned: Engine) -> None:
    """A forked child ends at once, with all exit handlers, and leaves its parent's engine alone."""
    code = """
import asyncio, os, sys
from headrace import Engine, ShutdownError
engine = Engine({folder!r}, executor="free", skip_tokenizer_init=True, **{settings!r})
child = os.fork()
if child == 0:
    assert not (engine.is_alive or engine.is_ready or engine.is_responsive)
    assert isinstance(engine.wait_ended(), ShutdownError)
    assert isinstance(asyncio.run(engine.asynchronous.wait_ended()), ShutdownError)
    try:
        engine.generate(input_ids=[1])
    except ShutdownError as error:
        sys.exit(7 if "fork" in str(error) else 1)
status = os.waitpid(child, 0)[1]
generated = engine.generate(input_ids=[1], sampling_params=dict(max_new_tokens=2))
print(os.waitstatus_to_exitcode(status), len(generated[0].token_ids))
"""
    code = code.format(folder=spawned.config.model, settings=SETTINGS)
    environment = child_environment()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout.split() == ["7", "2"], done.stderr


def test_a_dropped_engine_ends(model_folder: Path) -> None:
    for inprocess in (True, False):
        engine = Engine(model_folder, inprocess=inprocess, executor="free", **SETTINGS)
        engine.generate(input_ids=PROMPT, sampling_params=SHORT)
        host, thread = engine.asynchronous.runtime.host, engine.asynchronous.runtime._thread
        del engine
        gc.collect()
        thread.join(10)
        assert not thread.is_alive()
        assert inprocess or not runs(host.pid)


def held() -> set[object]:
    """This process's threads and open files, each by what it is: not by count, which others' garbage changes."""
    gc.collect()
    found: set[object] = set(threading.enumerate())
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return found


@pytest.mark.parametrize("inprocess", [True, False])
def test_an_engine_leaves_no_thread_or_descriptor(model_folder: Path, inprocess: bool) -> None:
    """The second engine, that is: with the first, libraries make what they keep for good."""
    before: set[object] = set()
    for _ in range(2):
        before = held()
        with Engine(model_folder, inprocess=inprocess, executor="free", **SETTINGS) as engine:
            engine.generate(input_ids=PROMPT, sampling_params=SHORT)
            assert len(held() - before) >= 3
    wait_for(lambda: held() <= before)


def test_an_engine_without_a_core_leaves_no_descriptor(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EAGAIN, "no more processes")

    before = held()
    monkeypatch.setattr("headrace.engine.runtime.start_core", fails)
    with pytest.raises(OSError, match="no more processes") as caught:
        Engine(model_folder, executor="free", **SETTINGS)
    wait_for(lambda: held() <= before)
    assert caught.value.errno == errno.EAGAIN


@pytest.mark.parametrize(
    ("thread", "inprocess"), [("headrace-core-watch", False), ("headrace-engine", False), ("headrace-engine", True)]
)
def test_an_engine_whose_thread_cannot_be_started_leaves_nothing(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, thread: str, inprocess: bool
) -> None:
    """Its core has been started already."""
    start = threading.Thread.start

    def fail(self: threading.Thread) -> None:
        if self.name.startswith(thread):
            raise RuntimeError("no more threads")
        start(self)

    children, before = children_of(os.getpid()), held()
    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(RuntimeError, match="no more threads"):
        Engine(model_folder, inprocess=inprocess, executor="free", **SETTINGS)
    assert children_of(os.getpid()) == children
    wait_for(lambda: held() <= before)


def test_an_engine_that_ends_while_a_caller_sends_tensors_leaves_no_descriptor(model_folder: Path) -> None:
    tensors = named_tensors(model_of(1))

    def ending() -> Iterator[tuple[str, torch.Tensor]]:
        yield tensors[0]
        engine.shutdown()
        yield tensors[1]

    before = held()
    engine = Engine(model_folder, inprocess=True, **SETTINGS)
    session = engine.begin_update("never", [(name, each.shape, str(each.dtype)) for name, each in tensors])
    with pytest.raises(ShutdownError):
        engine.stage(session, ending())
    wait_for(lambda: held() <= before)


@pytest.mark.parametrize(
    ("settings", "error", "named"),
    [
        ({"page_size": 0}, ConfigError, "page_size"),
        ({"page_size": "4"}, ConfigError, "page_size"),
        ({"paeg_size": 4}, ConfigError, "paeg_size"),
        ({"device": "cuda"}, ConfigError, "device"),
        ({"context_length": 1 << 20}, ConfigError, "context_length"),
        ({"tokenizer": "/nowhere"}, ConfigError, "tokenizer"),
    ],
)
def test_a_wrong_setting_is_named(
    model_folder: Path,
    settings: dict[str, object],
    error: type[Exception],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(error) as caught:
        Engine(model_folder, inprocess=True, **{**SETTINGS, **settings})
    assert isinstance(caught.value, HeadraceError) and caught.value.field == named


def test_settings_that_are_refused_leave_no_core(model_folder: Path) -> None:
    """Its process began before they were looked at."""
    before = children_of(os.getpid())
    with pytest.raises(ConfigError):
        Engine(model_folder, **{**SETTINGS, "context_length": 1 << 20})
    assert children_of(os.getpid()) == before


@pytest.mark.parametrize("model", ["/nowhere", "./nowhere", "a/b/c", "nobody-here/no-such-model", ""])
def test_a_model_that_is_nowhere_is_an_error_of_that_name(model: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Engine(model, inprocess=True, **SETTINGS)
    assert caught.value.field == "model" and model in caught.value.message


def broken_copy(model_folder: Path, folder: Path) -> Path:
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_a_broken_checkpoint_is_told_from_the_core(model_folder: Path, tmp_path: Path) -> None:
    folder = broken_copy(model_folder, tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for inprocess in (True, False):
        with pytest.raises(CheckpointError, match="model.safetensors"):
            Engine(folder, inprocess=inprocess, **SETTINGS)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))
    with pytest.raises(UnsupportedModelError, match="Mamba"):
        Engine(folder, **SETTINGS)


def test_a_core_that_starts_too_slowly_is_killed(model_folder: Path) -> None:
    before = threading.active_count()
    with pytest.raises(DeadlineError, match="start_timeout"):
        Engine(model_folder, **SETTINGS, start_timeout=1e-6)
    wait_for(lambda: threading.active_count() <= before, 120.0)  # as long as the start takes that nobody waits for


def test_random_weights_need_no_weight_file(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    settings = {**SETTINGS, "load_format": "dummy", "skip_tokenizer_init": True, "inprocess": True}
    digests = []
    for seed in (1, 1, 2):
        with Engine(tmp_path, **{**settings, "seed": seed}) as engine:
            assert engine.tokenizer is None
            assert engine.generate(input_ids=PROMPT, sampling_params=SHORT)[0].text == ""
            digests.append(engine.digest())
    assert digests[0] == digests[1] != digests[2]


def test_a_blocking_call_on_the_engine_s_own_loop_is_refused(engine: Engine) -> None:
    async def wrong() -> None:
        engine.flush_cache()

    with pytest.raises(HeadraceError, match="own loop"):
        engine.asynchronous.runtime.wait(wrong())


def test_the_executor_may_be_replaced_by_one_that_costs_nothing(model_folder: Path) -> None:
    with contextlib.closing(AsyncEngine(model_folder, executor="free", **SETTINGS)) as engine:
        found = asyncio.run(engine.generate(input_ids=[PROMPT] * 32, sampling_params=LONG))
        assert [len(each.token_ids) for each in found] == [1000] * 32


def test_an_executor_without_a_device_is_on_the_cpu(model_folder: Path) -> None:
    with Engine(model_folder, inprocess=True, executor="free", device="cuda", **SETTINGS) as engine:
        assert engine.resolved.device == "cpu" and engine.resolved.max_total_num_tokens == SETTINGS["kv_pool_tokens"]


def test_a_pool_that_the_core_measures_bounds_requests(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The core here finds room for less than the front was told; only the core can know on a device."""
    measured = (("kv_pool_tokens", "64", "measured"),)

    def serve_measured(resolved: ResolvedConfig, link: CoreLink, executor: ExecutorKind, **more: Any) -> int:
        return serve_core(resolved.with_pool(64, measured), link, executor, **more)

    monkeypatch.setattr("headrace.core.serve_core", serve_measured)
    with Engine(model_folder, inprocess=True, executor="free", **SETTINGS) as engine:
        assert (engine.resolved.max_total_num_tokens, engine.resolved.explanations) == (64, measured)
        assert engine.config.kv_pool_tokens == SETTINGS["kv_pool_tokens"]
        assert len(engine.generate(input_ids=[PROMPT], sampling_params={"max_new_tokens": 62})[0].token_ids) == 62
        with pytest.raises(RequestError, match="64 tokens of the KV pool"):
            engine.generate(input_ids=[PROMPT], sampling_params={"max_new_tokens": 63})


def test_a_server_comes_and_goes_on_a_running_engine(model_folder: Path) -> None:
    with Engine(model_folder, inprocess=True, **SETTINGS) as engine:
        servers = [serve(engine), serve(engine, 0, "127.0.0.1")]
        body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}}
        expected = engine.generate(input_ids=PROMPT, sampling_params=SHORT)[0].token_ids
        for server in servers:
            assert server.url == f"http://127.0.0.1:{server.port}"
            assert httpx.post(f"{server.url}/generate", json=body).json()["output_ids"] == expected
        servers[0].stop()
        servers[0].stop()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{servers[0].url}/health")
        assert httpx.get(f"{servers[1].url}/health").status_code == 200
        assert engine.generate(input_ids=PROMPT, sampling_params=SHORT)[0].token_ids == expected
    servers[1].stop()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{servers[1].url}/health")


def test_a_number_that_only_looks_like_one_travels_as_its_value(spawned: Engine) -> None:
    """Requests of one loop turn leave in one message, which would hold no subclass of int."""

    class Number(int):
        pass

    async def together() -> list[Any]:
        calls = [
            spawned.asynchronous.generate(
                input_ids=PROMPT, sampling_params={"max_new_tokens": Number(2) if index == 3 else 2, "ignore_eos": True}
            )
            for index in range(6)
        ]
        return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)

    found = asyncio.run(together())
    assert [len(generations[0].token_ids) for generations in found] == [2] * 6
    assert not spawned.asynchronous.runtime.client._sinks
