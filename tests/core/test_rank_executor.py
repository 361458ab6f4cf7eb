"""Two ranks that hold a model together are one executor: the same tokens, updates and digests as one alone, under
random events too, and the loss of one is the loss of the device."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headrace.config import EngineConfig, resolve
from headrace.core import rank_start
from headrace.core.executor import Executor, LocalExecutor
from headrace.core.faults import DeviceLost, StepError
from headrace.core.rank_executor import RankExecutor
from headrace.core.rank_start import start_ranks
from headrace.core.service import DEVICE_LOST_EXIT_CODE, run_core
from headrace.ipc import SharedBuffer
from headrace.parallel import Mesh
from headrace.runner import Runner, build_runner
from headrace.types.errors import DeviceLostError
from headrace.types.messages import (
    Abort,
    AbortUpdate,
    BeginUpdate,
    CommitUpdate,
    CoreFailed,
    Digest,
    GetWeight,
    Pause,
    ReleaseMemory,
    Resume,
    ResumeMemory,
    WeightPart,
)
from headrace.types.plan_words import encode
from headrace.types.request import TokenSampling
from headrace.types.sampling_params import LogprobOptions
from headrace.types.weights import TensorInfo, UpdateBegun, UpdateMode, UpdateReport
from headrace.weights.position_sum import PositionKeys, position_digest
from tests.core.faulty_rank import FAULT, first_time
from tests.core.harness import Core, request
from tests.core.ranks import STAGES, begun_ranks, start_two
from tests.parity.models import make_model, save_model
from tests.runner.plans import PlanBuilder

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "page_size": 4,
    "kv_pool_tokens": 256,
    "max_running_requests": 4,
    "max_num_batched_tokens": 16,
    "num_threads": 1,
    "seed": 0,
}
CORE = {"page_size": 4, "kv_pool_tokens": 256, "max_running_requests": 4, "max_num_batched_tokens": 16}
POLICIES = ["keep", "recompute", "abort", "drain"]
Tensors = dict[str, torch.Tensor]


def tensors_of(seed: int) -> Tensors:
    """All tensors of a model by their names in a checkpoint."""
    model = make_model("qwen3", seed=seed, attention_bias=True, **SIZES)
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def digests_of(tensors: Tensors) -> dict[str, str]:
    keys = PositionKeys(torch.device("cpu"))
    return {name: position_digest(tensor.reshape(-1), keys) for name, tensor in tensors.items()}


OLD, NEW = tensors_of(0), tensors_of(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_model("qwen3", attention_bias=True, **SIZES), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=[{}, STAGES], ids=["shares", "stages"])
def layout(request: pytest.FixtureRequest) -> dict[str, int]:
    """How two ranks hold a model: each a share of every layer, or each some of the layers."""
    found: dict[str, int] = request.param
    return found


@pytest.fixture(scope="module")
def ranks(folder: Path, layout: dict[str, int]) -> Iterator[RankExecutor]:
    executor = start_two(folder, SETTINGS | layout)
    yield executor
    executor.close()


@pytest.fixture(scope="module")
def alone(folder: Path) -> LocalExecutor:
    return LocalExecutor(Runner(resolve(EngineConfig(model=str(folder), **SETTINGS), folder)))


def update(core: Core, tensors: Tensors, version: str, **fields: Any) -> UpdateReport:
    session = core.begin(tensors, version, **fields)
    core.stage(session, tensors)
    report = core.call(CommitUpdate, session, kind=UpdateReport)
    assert isinstance(report, UpdateReport)
    return report


class Driver:
    """A core under random events, the same for every executor. What takes as many turns as it takes time, updates and
    digests, it does while no step runs."""

    def __init__(self, executor: Executor, seed: int, layout: dict[str, int]) -> None:
        self.chance = random.Random(seed)
        settings = {"overlap_depth": seed % 3, "pause_timeout": 1e6, "keep_weights_copy": True, **CORE, **layout}
        self.core = Core(executor, **settings)
        self.num_requests = 0
        self.digests: list[dict[str, str]] = []
        self.reset(OLD)

    def play(self, num_events: int) -> None:
        actions = [self.submit] * 4 + [self.turn] * 8 + [self.abort, self.pause, self.resume, self.update, self.digest]
        actions += [self.memory, self.parts]
        for _ in range(num_events):
            self.chance.choice(actions)()
        self.resume()
        self.core.settle()
        self.digest()

    def reset(self, tensors: Tensors) -> None:
        update(self.core, tensors, f"v{self.core.status().epoch + 1}", in_flight=self.chance.choice(POLICIES))

    def submit(self) -> None:
        chance = self.chance
        for _ in range(chance.choice((1, 1, 3))):
            self.num_requests += 1
            prompt = [chance.randrange(1, 100) for _ in range(chance.choice((1, 4, 23)))]
            bias = ((7, 2.0),) if chance.random() < 0.2 else ()
            sampling = TokenSampling(chance.choice((0.0, 1.0)), chance.choice((0, 5)), 0.9, logit_bias=bias)
            top, kept = chance.choice((0, 2)), chance.choice((0, 99))
            options = LogprobOptions(prompt_start=chance.choice((None, 0)), num_top=top, max_kept=kept)
            self.core.submit(
                request(self.num_requests, prompt, chance.randint(1, 9), sampling=sampling, logprobs=options)
            )

    def turn(self) -> None:
        self.core.turn(self.chance.randint(1, 4))

    def abort(self) -> None:
        if self.num_requests:
            self.core.send(Abort((self.chance.randint(1, self.num_requests),)))

    def pause(self) -> None:
        self.core.start(Pause, self.chance.choice(["keep", "recompute", "abort"]))

    def resume(self) -> None:
        self.core.call(Resume)

    def update(self) -> None:
        self.core.call(Pause, "keep")
        mode = self.chance.choice(["shadow", "inplace"])
        version = f"v{self.core.status().epoch + 1}"
        tensors, policy = self.chance.choice([OLD, NEW]), self.chance.choice(POLICIES)
        update(self.core, tensors, version, mode=mode, in_flight=policy)
        self.resume()

    def parts(self) -> None:
        """An update in parts, the first of which may be given up."""
        self.core.call(Pause, "keep")
        tensors, cut = self.chance.choice([OLD, NEW]), self.chance.randint(1, len(OLD) - 1)
        names = list(tensors)
        self.chance.shuffle(names)
        for is_whole in self.chance.choice([(True,), (False, True)]):
            session = self.core.begin_open(self.chance.choice(["shadow", "inplace"] if is_whole else ["shadow"]))
            self.core.stage_part(session, {name: tensors[name] for name in names[:cut]})
            if is_whole:
                self.core.stage_part(session, {name: tensors[name] for name in names[cut:]})
                self.core.call(CommitUpdate, session, kind=UpdateReport)
            else:
                self.core.call(AbortUpdate, session)
        self.resume()

    def memory(self) -> None:
        tags = self.chance.choice([("weights",), ("kv_cache",), ("weights", "kv_cache")])
        self.core.call(ReleaseMemory, tags, self.chance.choice(["abort", "recompute"]))
        self.core.call(ResumeMemory, tags, "copy")

    def digest(self) -> None:
        self.core.call(Pause, "keep")
        self.digests.append(self.core.call(Digest, kind=dict[str, str]))
        self.resume()


def test_random_events_over_two_ranks_give_what_they_give_alone(
    ranks: RankExecutor, alone: LocalExecutor, layout: dict[str, int]
) -> None:
    """Sums are rounded otherwise, so a draw may tip, in one of many thousand; whatever comes before that is close."""
    num_requests, num_equal, num_tokens, num_updates = 0, 0, 0, 0
    for seed in range(2):
        first, second = Driver(alone, seed, layout), Driver(ranks, seed, layout)
        for driver in (first, second):
            driver.play(50)
        assert first.digests == second.digests and first.num_requests == second.num_requests
        assert first.core.status().epoch == second.core.status().epoch
        num_updates += first.core.status().epoch
        num_requests += first.num_requests
        for handle in range(1, first.num_requests + 1):
            assert first.core.finish_types(handle) == second.core.finish_types(handle)
            found, expected = second.core.tokens(handle), first.core.tokens(handle)
            num_equal += found == expected
            num_tokens += len(expected)
            if found == expected:
                assert first.core.spans(handle) == second.core.spans(handle)
                found_logprobs, expected_logprobs = second.core.logprobs(handle), first.core.logprobs(handle)
                np.testing.assert_allclose(found_logprobs, expected_logprobs, atol=1e-4, rtol=0)
    assert num_tokens > 100 and num_updates > 4 and num_equal >= 0.98 * num_requests


@pytest.mark.parametrize("mode", ["shadow", "inplace"])
def test_an_update_lands_on_both_ranks_and_is_read_back_from_both(ranks: RankExecutor, mode: str) -> None:
    core = Core(ranks, **CORE)
    for version, tensors in (("a", NEW), ("b", OLD)):
        assert update(core, tensors, version, mode=mode).num_tensors == len(tensors)
        assert core.call(Digest, kind=dict[str, str]) == digests_of(tensors)
        for name in ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"):
            with SharedBuffer.create(tensors[name].nbytes) as buffer:
                core.call(GetWeight, name, buffer.ref, kind=WeightPart)
                assert bytes(buffer.view) == tensors[name].numpy().tobytes()


@pytest.mark.parametrize("mode", ["shadow", "inplace"])
def test_an_update_in_parts_lands_on_both_ranks(ranks: RankExecutor, mode: str) -> None:
    core = Core(ranks, **CORE)
    for tensors in (NEW, OLD):
        session, names = core.begin_open(mode), list(tensors)
        random.Random(1).shuffle(names)
        for start in range(0, len(names), 5):
            core.stage_part(session, {name: tensors[name] for name in names[start : start + 5]})
        assert core.extend(session, {}).num_missing == 0
        core.call(CommitUpdate, session, kind=UpdateReport)
        assert core.call(Digest, kind=dict[str, str]) == digests_of(tensors)


Faulty = Callable[..., RankExecutor]


@pytest.fixture
def faulty(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    """Executors in whose second rank something goes wrong."""
    started: list[RankExecutor] = []

    def start(fault: str, **settings: Any) -> RankExecutor:
        monkeypatch.setenv(FAULT, fault)
        monkeypatch.setattr("headrace.ipc.rank_spawn.RANK_MODULE", "tests.core.faulty_rank")
        started.append(start_two(folder, SETTINGS | settings))
        return started[-1]

    yield start
    for executor in started:
        executor.close()


def check_lost(executor: RankExecutor, message: str) -> None:
    """Some steps end with the loss of the device, told to everybody."""
    core = Core(executor, **CORE)
    core.submit(request(1, max_new_tokens=100))
    assert run_core(core.loop, core.link) == DEVICE_LOST_EXIT_CODE
    last = core.link.outputs[-1]
    assert isinstance(last, CoreFailed) and last.error.code == "DeviceLostError"
    assert message in last.error.message


def test_a_commit_that_fails_on_one_rank_poisons_and_a_full_update_heals(faulty: Faulty) -> None:
    core = Core(faulty("commit"), **CORE)
    session = core.begin(NEW, "v1")
    core.stage(session, NEW)
    assert "on rank 1" in core.refused(CommitUpdate, session).message
    assert core.status().state == "poisoned"
    update(core, OLD, "v2")
    assert core.call(Digest, kind=dict[str, str]) == digests_of(OLD)


@pytest.mark.parametrize("mode", ["auto", "shadow"])
def test_where_one_rank_has_no_room_for_a_shadow_none_makes_one(faulty: Faulty, mode: UpdateMode) -> None:
    core = Core(faulty("begin"), **CORE)
    if mode == "shadow":
        manifest = tuple(TensorInfo(name, tuple(tensor.shape), "float32") for name, tensor in NEW.items())
        refusal = core.refused(BeginUpdate, "v1", manifest, mode)
        assert (refusal.code, refusal.field) == ("WeightUpdateError", "mode") and "on rank 1" in refusal.message
        assert core.status().state == "ready"
    report = update(core, NEW, "v1", mode=mode)
    assert report.mode == ("inplace" if mode == "auto" else "shadow")
    assert core.call(Digest, kind=dict[str, str]) == digests_of(NEW)


def test_a_resume_that_one_rank_cannot_do_is_undone_on_all(faulty: Faulty) -> None:
    core = Core(faulty("resume"), **CORE, keep_weights_copy=True)
    digests = core.call(Digest, kind=dict[str, str])
    core.call(ReleaseMemory)
    refusal = core.refused(ResumeMemory, (), "copy")
    assert refusal.code == "UnavailableError" and "on rank 1" in refusal.message
    core.call(ResumeMemory, (), "copy")
    assert core.call(Digest, kind=dict[str, str]) == digests


MOMENTS = ["begin", "begin_open", "extend", "stage", "commit", "abort", "digest_in_slices", "copy_in_slices"]


@pytest.mark.parametrize("moment", [*MOMENTS, "keep_copy", "release", "resume"])
def test_a_rank_that_dies_over_a_message_is_the_loss_of_all(faulty: Faulty, moment: str) -> None:
    core = Core(faulty(f"die:{moment}"), **CORE, keep_weights_copy=True)
    lost = pytest.raises(DeviceLost, match=r"rank 1 \(process \d+\) was killed by signal 9")
    with lost, SharedBuffer.create(64) as buffer:
        session = core.begin_open("shadow")
        core.stage_part(session, NEW)
        core.call(CommitUpdate, session, kind=UpdateReport)
        core.begin(NEW, "v2")
        core.call(AbortUpdate, None)
        core.call(Digest, kind=dict[str, str])
        core.call(GetWeight, "lm_head.weight", buffer.ref, kind=WeightPart)
        core.call(ReleaseMemory)
        core.call(ResumeMemory, (), "copy")


def test_a_step_that_fails_on_one_rank_alone_is_the_loss_of_all(faulty: Faulty) -> None:
    check_lost(faulty("step"), "failed in a step, and not all ranks did: OutOfMemoryError: no memory")


def test_a_step_that_fails_on_rank_0_alone_is_the_loss_of_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = start_two(folder, SETTINGS)
    monkeypatch.setattr("headrace.runner.runner.Runner.launch", first_time(MemoryError("none left"), Runner.launch))
    check_lost(executor, "rank 0 failed in a step, and not all ranks did: MemoryError: none left")


def check_tokens(executor: Executor, alone: Executor) -> None:
    """A step fails; nobody is lost, and everybody gets the tokens that he gets alone."""
    found, expected = (Core(each, **CORE, **STAGES, overlap_depth=1) for each in (executor, alone))
    for core in (found, expected):
        core.submit(*(request(number, range(1, 3 + number), 8) for number in range(1, 5)))
        core.settle()
    assert found.status().metrics["num_failed_steps"] == 1
    for number in range(1, 5):
        assert found.tokens(number) == expected.tokens(number) and len(expected.tokens(number)) == 8
        assert found.finish_types(number) == ["length"]


def test_a_step_that_fails_on_one_stage_is_a_failed_step(faulty: Faulty, alone: LocalExecutor) -> None:
    check_tokens(faulty("step", **STAGES), alone)


def test_so_is_one_that_fails_on_the_first_stage(
    folder: Path, alone: LocalExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = start_two(folder, SETTINGS | STAGES)
    try:
        with monkeypatch.context() as patches:
            here = first_time(MemoryError("none left"), Runner._run)
            patches.setattr("headrace.runner.runner.Runner._run", here)
            check_tokens(executor, alone)
    finally:
        executor.close()


def test_a_plan_with_a_token_that_the_first_stage_does_not_know_is_refused(ranks: RankExecutor) -> None:
    if ranks.resolved.engine.pp_size == 1:
        return
    plans = PlanBuilder(page_size=4, num_pages=60)
    plans.enter(0, [1, 2])
    ranks.submit(plans.step([(0, 2)]))
    plans.append(0)
    ranks.submit(plans.step([(0, 1)]))
    ranks.collect()
    with pytest.raises(StepError, match="does not know") as failure:
        ranks.collect()
    assert failure.value.is_refusal


def test_results_that_differ_are_found(faulty: Faulty) -> None:
    check_lost(faulty("result"), "has another result of a step than rank 0")


def test_a_plan_that_a_rank_cannot_read_is_the_loss_of_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = start_two(folder, SETTINGS)
    monkeypatch.setattr("headrace.core.rank_executor.encode", lambda plan: encode(plan)[:-1])
    check_lost(executor, "ended with exit code 1: PlanRefused")


def test_digests_of_a_manifest_count_what_both_ranks_hold_once(tmp_path: Path) -> None:
    """One key-value head, of which each rank has a copy."""
    sizes = {**SIZES, "num_key_value_heads": 1}
    executor = start_two(save_model(make_model("qwen3", **sizes), tmp_path), SETTINGS)
    try:
        core = Core(executor, **CORE)
        for seed, mode in ((1, "shadow"), (2, "inplace")):
            model = make_model("qwen3", seed=seed, **sizes)
            tensors = {name: each.contiguous() for name, each in model.state_dict().items()}
            digests = digests_of(tensors)
            manifest = tuple(
                TensorInfo(name, tuple(each.shape), "float32", digests[name]) for name, each in tensors.items()
            )
            session = core.call(BeginUpdate, "v", manifest, mode, kind=UpdateBegun).session_id
            core.stage(session, tensors)
            core.call(CommitUpdate, session, kind=UpdateReport)
            assert core.call(Digest, kind=dict[str, str]) == digests
    finally:
        executor.close()


def test_a_start_that_fails_tells_why_whatever_its_device_says_then(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is lost cannot be closed either."""
    resolved = resolve(EngineConfig(model=str(folder), **(SETTINGS | {"tp_size": 2})), folder)

    def build(mesh: Mesh) -> Any:
        runner = build_runner(resolved, mesh=mesh)
        monkeypatch.setattr(runner, "close", lambda: 1 / 0)
        return runner

    def lose(*_: Any) -> None:
        raise DeviceLost("rank 1 is gone")

    monkeypatch.setattr(rank_start, "_await_ready", lose)
    with pytest.raises(DeviceLostError, match="rank 1 is gone"):
        start_ranks(resolved, build, begun_ranks(resolved), shares_process=True)
