"""Two ranks that hold a model together are one executor: the same tokens, updates and digests as one alone, under
random events too, and the loss of one is the loss of the device."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headrace.config import EngineConfig, resolve
from headrace.core.executor import Executor, LocalExecutor
from headrace.core.rank_executor import RankExecutor
from headrace.ipc import SharedBuffer
from headrace.runner import Runner
from headrace.types.messages import Abort, CommitUpdate, Digest, GetWeight, Pause, Resume, WeightPart
from headrace.types.request import TokenSampling
from headrace.types.sampling_params import LogprobOptions
from headrace.types.weights import UpdateReport
from headrace.weights.position_sum import PositionKeys, position_digest
from tests.core.harness import Core, request
from tests.core.ranks import start_two
from tests.parity.models import make_model, save_model

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


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Iterator[RankExecutor]:
    executor = start_two(folder, SETTINGS)
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

    def __init__(self, executor: Executor, seed: int) -> None:
        self.chance = random.Random(seed)
        self.core = Core(executor, overlap_depth=seed % 3, pause_timeout=1e6, **CORE)
        self.num_requests = 0
        self.digests: list[dict[str, str]] = []
        self.reset(OLD)

    def play(self, num_events: int) -> None:
        actions = [self.submit] * 4 + [self.turn] * 8 + [self.abort, self.pause, self.resume, self.update, self.digest]
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
            options = LogprobOptions(prompt_start=chance.choice((None, 0)), num_top=chance.choice((0, 2)))
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

    def digest(self) -> None:
        self.core.call(Pause, "keep")
        self.digests.append(self.core.call(Digest, kind=dict[str, str]))
        self.resume()


def test_random_events_over_two_ranks_give_what_they_give_alone(ranks: RankExecutor, alone: LocalExecutor) -> None:
    """Sums are rounded otherwise, so a draw may tip, in one of many thousand; whatever comes before that is close."""
    num_requests, num_equal, num_tokens, num_updates = 0, 0, 0, 0
    for seed in range(3):
        first, second = Driver(alone, seed), Driver(ranks, seed)
        for driver in (first, second):
            driver.play(60)
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
    assert num_tokens > 100 and num_updates > 6 and num_equal >= 0.98 * num_requests


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
