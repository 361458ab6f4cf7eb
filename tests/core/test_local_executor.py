"""The executor over a real runner: a tiny dummy model, failed steps, a real process."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from headrace.config import EngineConfig, ResolvedConfig, resolve
from headrace.core import LocalExecutor, serve_core
from headrace.ipc import make_pair
from headrace.runner import Runner
from headrace.runner.runner import RunnerStep
from headrace.types.messages import (
    CoreReady,
    CoreStatus,
    Deltas,
    Digest,
    GetStatus,
    Output,
    Reply,
    Shutdown,
    Submit,
    UpdateFromDisk,
)
from headrace.types.plan import StepPlan
from headrace.types.request import TokenSampling
from headrace.types.weights import UpdateReport
from headrace.weights.store import WeightStore
from tests.core.harness import TINY, Core, request

GREEDY = TokenSampling(temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    (path / "config.json").write_bytes(msgspec.json.encode(TINY))
    return path


def resolved_for(folder: Path, **settings: Any) -> ResolvedConfig:
    base = {
        "model": str(folder),
        "load_format": "dummy",
        "page_size": 4,
        "kv_pool_tokens": 2048,
        "num_threads": 1,
        "seed": 0,
    }
    return resolve(EngineConfig(**{**base, **settings}), folder)


def generate(folder: Path, overlap_depth: int) -> list[list[int]]:
    core = Core(LocalExecutor(Runner(resolved_for(folder))), overlap_depth=overlap_depth)
    core.submit(*(request(handle, range(1, handle + 3), 12, sampling=GREEDY) for handle in range(1, 6)))
    core.settle()
    assert core.finish_types(1, 2, 3, 4, 5) == ["length"] * 5
    return [core.tokens(handle) for handle in range(1, 6)]


def test_a_model_gives_the_same_tokens_at_any_overlap(folder: Path) -> None:
    tokens = generate(folder, 0)
    assert all(len(found) == 12 for found in tokens)
    assert generate(folder, 1) == tokens
    assert generate(folder, 3) == tokens


class FaultyRunner(Runner):
    """Runs out of memory at one step, before it has looked at the plan. Keeps what it was given after that."""

    broken_step = 3

    def launch(self, plan: StepPlan) -> RunnerStep:
        if plan.step_id == self.broken_step:
            self.next_steps: list[int] = []
            torch.empty(1 << 60)
        if plan.step_id > self.broken_step:
            self.next_steps.append(plan.step_id)
        return super().launch(plan)


@pytest.mark.parametrize("overlap_depth", [0, 1, 3])
def test_a_failed_allocation_costs_nobody_anything(folder: Path, overlap_depth: int) -> None:
    expected = generate(folder, overlap_depth)
    runner = FaultyRunner(resolved_for(folder))
    core = Core(LocalExecutor(runner), overlap_depth=overlap_depth, max_running_requests=2)
    core.submit(*(request(handle, range(1, handle + 3), 12, sampling=GREEDY) for handle in range(1, 6)))
    core.settle()
    assert core.finish_types(1, 2, 3, 4, 5) == ["length"] * 5
    assert [core.tokens(handle) for handle in range(1, 6)] == expected
    assert core.status().metrics["num_failed_steps"] == 1 and core.status().num_used_tokens == 0
    assert runner.next_steps[0] == 4 + overlap_depth, "a plan was executed that built on the failed one"


class OfACompiler(Exception):
    """As a kernel compiler's own errors, of no kind that Python has."""


@pytest.mark.parametrize("moment", ["launch", "wait"])
@pytest.mark.parametrize("kind", [UserWarning, TypeError, AttributeError, BufferError, StopIteration, OfACompiler])
def test_no_exception_of_a_step_ends_the_core(
    folder: Path, kind: type[Exception], moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        monkeypatch.undo()
        raise kind("by chance")

    core = Core(LocalExecutor(Runner(resolved_for(folder))))
    owner, name = (RunnerStep, "wait") if moment == "wait" else (Runner, moment)
    monkeypatch.setattr(owner, name, fail)
    core.submit(request(1, range(1, 5), 4, sampling=GREEDY))
    core.settle()
    assert core.finish_types(1) == ["length"] and core.status().metrics["num_failed_steps"] == 1


def test_no_exception_of_a_call_ends_the_core(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise OfACompiler("by chance")

    core = Core(LocalExecutor(Runner(resolved_for(folder))))
    monkeypatch.setattr(WeightStore, "digest_in_slices", fail)
    assert "OfACompiler: by chance" in core.refused(Digest).message
    assert core.status().state == "ready"


def test_a_whole_core_runs_in_a_thread(folder: Path, tmp_path: Path) -> None:
    resolved = resolved_for(folder, seed=3)
    runner = Runner(resolved_for(folder, seed=4))
    other = {name: runner.weights.read(name).clone() for name in runner.weights.weight_map.rules_by_name}
    save_file(other, tmp_path / "model.safetensors")
    front, core_link = make_pair()
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(serve_core(resolved, core_link)))
    thread.start()

    async def run() -> list[Output]:
        outputs: list[Output] = []
        closed = asyncio.get_running_loop().create_future()
        await front.start(outputs.append, closed.set_result)

        async def answered(call_id: int) -> None:
            while not any(isinstance(output, Reply) and output.call_id == call_id for output in outputs):
                await asyncio.sleep(0.01)

        front.send(Submit((request(1, max_new_tokens=8),)))
        front.send(UpdateFromDisk(1, str(tmp_path), "v1"))
        front.send(Digest(2))
        front.send(GetStatus(3))
        await answered(1)
        front.send(Digest(4))
        await answered(4)
        front.send(Shutdown(5))
        await asyncio.wait_for(closed, 30.0)
        return outputs

    outputs = asyncio.run(run())
    thread.join(10.0)
    assert codes == [0]
    replies = {output.call_id: output for output in outputs if isinstance(output, Reply)}
    assert isinstance(outputs[0], CoreReady) and outputs[0].error is None
    assert msgspec.msgpack.decode(replies[1].payload, type=UpdateReport).version == "v1"
    assert msgspec.msgpack.decode(replies[4].payload, type=dict[str, str]) == runner.weights.digest()
    assert msgspec.msgpack.decode(replies[3].payload, type=CoreStatus).version in ("default", "v1")
    (delta,) = [delta for output in outputs if isinstance(output, Deltas) for delta in output.deltas]
    assert delta.finish is not None and delta.finish.type == "length"


def test_a_missing_checkpoint_is_told_in_the_first_message(folder: Path) -> None:
    front, core_link = make_pair()
    assert serve_core(resolved_for(folder, load_format="auto"), core_link) == 1

    async def run() -> list[Output]:
        outputs: list[Output] = []
        await front.start(outputs.append, lambda reason: None)
        await asyncio.sleep(0.01)
        return outputs

    (ready,) = asyncio.run(run())
    assert isinstance(ready, CoreReady) and ready.error is not None
    assert ready.error.code == "CheckpointError"
