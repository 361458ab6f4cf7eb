"""The device runner's steps by themselves: what a start runs, and what a launch that fails leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from headrace.attention.base import Bucket
from headrace.config import EngineConfig, resolve
from headrace.runner import build_runner
from headrace.runner.device_runner import DeviceRunner
from headrace.runner.graphs import Graphs
from tests.parity.models import make_model, save_model
from tests.runner.plans import PlanBuilder

# Rows that pad a step compute something from whatever memory held; numpy, which interprets them, says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> DeviceRunner:
    return built(tmp_path_factory.mktemp("tiny"))


def built(folder: Path) -> DeviceRunner:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    save_model(make_model("qwen3", head_dim=16, **sizes), folder)
    config = EngineConfig(
        model=str(folder),
        device="cuda" if torch.cuda.is_available() else "cpu",
        attention_backend="triton",
        dtype="float32",
        page_size=8,
        kv_pool_tokens=256,
        max_running_requests=2,
        max_num_batched_tokens=4,
        cuda_graphs=False,
    )
    found = build_runner(resolve(config, folder))
    assert isinstance(found, DeviceRunner)
    return found


def test_what_a_start_runs_leaves_the_next_step_as_it_is(runner: DeviceRunner) -> None:
    plans = PlanBuilder(page_size=8, num_pages=20)
    plans.enter(0, [5, 6, 7, 8])
    expected = runner.launch(plans.step([(0, 4)])).wait()
    runner._steps.run_greatest()
    told: list[tuple[str, int, int]] = []
    runner._steps.capture([Bucket(4, 2, False), Bucket(2, 2, True)], [2, 1], lambda *told_now: told.append(told_now))
    assert told == [("graphs", done, 6) for done in range(1, 7)]  # two ways to sample of each number of rows
    again = PlanBuilder(page_size=8, num_pages=20)
    again.enter(1, [5, 6, 7, 8])
    found = runner.launch(again.step([(1, 4)])).wait()
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    assert found.logprobs.tolist() == expected.logprobs.tolist()


def test_a_launch_that_fails_gives_its_copy_back(runner: DeviceRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object) -> None:
        raise MemoryError("no room")

    steps = runner._steps
    plans = PlanBuilder(page_size=8, num_pages=20)
    plans.enter(0, [1, 2, 3])
    with monkeypatch.context() as patched:
        patched.setattr(steps._attention, "fill", no_room)
        for _ in range(5):  # more often than there are copies
            with pytest.raises(MemoryError):
                steps.launch(plans.step([(0, 1)]))
            plans.enter(0, [1, 2, 3])
    assert runner.launch(plans.step([(0, 3)])).wait().token_ids.shape == (1, 1)


def test_graphs_are_captured_again_one_by_one_once_there_is_room(
    runner: DeviceRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes on between two of them is not in inference mode."""
    done: list[object] = []

    class Graphs:
        dropped: tuple[str, ...] = ("first", "second")

        def check_room(self) -> None:
            done.append("room")

        def capture_again(self, key: str) -> None:
            done.append((key, torch.is_inference_mode_enabled()))

    monkeypatch.setattr(runner._steps, "_graphs", Graphs())
    for _ in runner._steps.capture_again():
        done.append(torch.is_inference_mode_enabled())
    assert done == ["room", ("first", True), False, ("second", True), False]
    monkeypatch.setattr(Graphs, "dropped", ())
    assert not list(runner._steps.capture_again()) and len(done) == 5


def test_a_runner_that_is_closed_has_no_graphs_though_a_step_of_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group of ranks ends only once no graph is left that could run it."""
    runner, plans = built(tmp_path), PlanBuilder(page_size=8, num_pages=20)
    plans.enter(0, [1, 2, 3])
    kept = runner.launch(plans.step([(0, 3)]))
    done: list[str] = []
    monkeypatch.setattr(Graphs, "drop", lambda _: done.append("dropped"))
    runner.close()
    assert done == ["dropped"] and kept.wait().token_ids.shape == (1, 1)
