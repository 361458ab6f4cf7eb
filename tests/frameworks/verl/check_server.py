"""A replica's server as a Ray actor, and the adapter that sends weights to it, without a trainer: aborts, sleeps,
scores, and what becomes of both when the engine's core is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
import warnings
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headrace.types.errors import NeedsWeightsError, RequestError, WeightUpdateError
from tests.processes import children_of

with warnings.catch_warnings(action="ignore"):  # verl's and Ray's own
    import ray
    from verl.workers.config import RolloutConfig
    from verl.workers.rollout.replica import RolloutMode

    from headrace.rl.verl_plugin.adapter import ServerAdapter, buckets_of
    from headrace.rl.verl_plugin.replica import HeadraceReplica

POLICY = Path(__file__).resolve().parents[3] / "headrace" / "rl" / "policy"
PROMPT = [72, 101, 108, 108, 111]
LONG = {"max_tokens": 1500, "ignore_eos": True, "logprobs": True}
SECONDS = 120

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(900)]


class Worker:
    """Stands where a trainer's rank stands: its host is the server's."""


class Replica(HeadraceReplica):
    """A replica whose configs are plain values."""

    def __init__(self, config: Any, model_config: Any) -> None:
        self.config, self.model_config, self.name_suffix = config, model_config, ""
        self.replica_rank, self.world_size, self.nnodes, self.gpus_per_node = 0, 1, 1, 1
        self.is_reward_model = self.is_teacher_model = False
        self.rollout_mode = RolloutMode.HYBRID


def rollout_config() -> Any:
    settings = {"num_threads": 1, "kv_pool_tokens": 1 << 14, "numerics": "invariant"}
    return RolloutConfig(
        name="headrace",
        dtype="float32",
        tensor_model_parallel_size=1,
        prompt_length=64,
        response_length=32,
        engine_kwargs={"headrace": settings},
    )


@pytest.fixture(scope="module")
def replica() -> Iterator[Replica]:
    """Launched, with no weights yet; on a cluster that runs (RAY_ADDRESS) or on one of its own."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers do not find this module
    ray.init(**({} if "RAY_ADDRESS" in os.environ else {"num_cpus": 2, "include_dashboard": False}))
    found = Replica(rollout_config(), SimpleNamespace(path=str(POLICY)))
    found.workers = [ray.remote(Worker).options(num_cpus=0).remote()]
    asyncio.run(found.launch_servers())
    yield found
    ray.shutdown()


@pytest.fixture
def adapter(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> ServerAdapter:
    monkeypatch.setenv("RANK", "0")
    found = object.__new__(ServerAdapter)
    found.config, found.replica_rank, found.is_leader_rank = replica.config, 0, True
    return found


def weights(scale: float = 1.0) -> dict[str, torch.Tensor]:
    tensors = load_file(POLICY / "model.safetensors")
    return {name: tensor * scale for name, tensor in tensors.items()}


async def from_one_buffer(tensors: dict[str, torch.Tensor]) -> AsyncIterator[tuple[str, torch.Tensor]]:
    """As a checkpoint engine brings them: each overwrites the one before."""
    buffer = torch.empty(max(tensor.numel() for tensor in tensors.values()))
    for name, tensor in tensors.items():
        buffer.fill_(float("nan"))
        view = buffer[: tensor.numel()].view(tensor.shape)
        view.copy_(tensor)
        yield name, view


def ask(replica: Replica, params: dict[str, Any], prompt: list[int] = PROMPT) -> Any:
    return replica.server_handle.generate.remote(
        request_id=os.urandom(8).hex(), prompt_ids=prompt, sampling_params=params
    )


def update(adapter: ServerAdapter, step: int, scale: float = 1.0) -> None:
    asyncio.run(adapter.update_weights(from_one_buffer(weights(scale)), global_steps=step))


def test_a_server_from_its_first_weights_to_its_second_life(replica: Replica, adapter: ServerAdapter) -> None:
    check_first_weights(replica, adapter)
    check_an_abort(replica, adapter)
    check_sleep(replica, adapter)
    check_scores(replica)
    check_refusals(replica, adapter)
    check_a_killed_core(replica, adapter)


def check_first_weights(replica: Replica, adapter: ServerAdapter) -> None:
    with pytest.raises(NeedsWeightsError):
        ray.get(ask(replica, {"temperature": 0}), timeout=SECONDS)
    update(adapter, 0)
    output = ray.get(ask(replica, {"temperature": 0, "logprobs": True}), timeout=SECONDS)
    assert output.stop_reason == "completed" and len(output.token_ids) == len(output.log_probs) > 0
    assert output.extra_fields["global_steps"] == 0


def check_an_abort(replica: Replica, adapter: ServerAdapter) -> None:
    """Partial ids are kept; what comes meanwhile waits, or is answered at once; the rest is of the new weights."""
    running = ask(replica, LONG)
    time.sleep(0.3)
    asyncio.run(replica.abort_all_requests())
    partial = ray.get(running, timeout=SECONDS)
    assert partial.stop_reason == "aborted" and len(partial.token_ids) == len(partial.log_probs) < 1500
    waiting = ask(replica, {"max_tokens": 4, "ignore_eos": True})
    asyncio.run(replica.release_kv_cache())
    update(adapter, 1, 1.01)
    asyncio.run(replica.resume_kv_cache())
    assert ray.wait([waiting], timeout=0.3)[0] == []
    asyncio.run(replica.resume_generation())
    assert ray.get(waiting, timeout=SECONDS).extra_fields["global_steps"] == 1
    asyncio.run(replica.abort_all_requests(reject_request=True))
    rejected = ray.get(ask(replica, {}), timeout=SECONDS)
    assert (rejected.stop_reason, rejected.token_ids) == ("aborted", [])
    asyncio.run(replica.resume_generation())


def check_sleep(replica: Replica, adapter: ServerAdapter) -> None:
    greedy = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "logprobs": True}
    update(adapter, 2)
    before = ray.get(ask(replica, greedy), timeout=SECONDS)
    asyncio.run(replica.sleep())
    asyncio.run(adapter.resume(["weights"]))
    update(adapter, 3)
    asyncio.run(adapter.resume(["kv_cache"]))
    after = ray.get(ask(replica, greedy), timeout=SECONDS)
    assert (before.token_ids, before.log_probs) == (after.token_ids, after.log_probs)
    assert (before.extra_fields["global_steps"], after.extra_fields["global_steps"]) == (2, 3)


def check_scores(replica: Replica) -> None:
    params = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 3, "detokenize": False}
    extra = ray.get(ask(replica, params), timeout=SECONDS).extra_fields
    assert [len(row) for row in extra["prompt_ids"]] == [3] * len(PROMPT)
    assert [len(row) for row in extra["prompt_logprobs"]] == [3] * len(PROMPT)


def check_refusals(replica: Replica, adapter: ServerAdapter) -> None:
    with pytest.raises(RequestError, match="top_p"):
        ray.get(ask(replica, {"top_p": 2}), timeout=SECONDS)
    with pytest.raises(RequestError, match="image_data"):
        ray.get(replica.server_handle.generate.remote(PROMPT, {}, "with an image", image_data=[b"x"]), timeout=SECONDS)
    read = list[str]()

    async def strange() -> AsyncIterator[tuple[str, torch.Tensor]]:
        for name, tensor in {"nobody": torch.ones(3), **weights()}.items():
            read.append(name)
            yield name, tensor

    with pytest.raises(WeightUpdateError, match="nobody"):
        asyncio.run(adapter.update_weights(strange(), global_steps=9))
    assert len(read) == 1 + len(weights()), "others wait for what this rank has not read"
    assert ray.get(ask(replica, {}), timeout=SECONDS).extra_fields["global_steps"] == 3


def check_a_killed_core(replica: Replica, adapter: ServerAdapter) -> None:
    server = replica.server_handle
    pid = ray.get(server.__ray_call__.remote(lambda _: os.getpid()), timeout=SECONDS)
    running = ask(replica, LONG)
    (core,) = children_of(pid, word="headrace.core.process")
    os.kill(core, signal.SIGKILL)
    with pytest.raises(Exception, match="EngineDeadError|died|unavailable"):
        ray.get(running, timeout=SECONDS)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        try:
            second = ray.get(server.__ray_call__.remote(lambda _: os.getpid()), timeout=SECONDS)
            if second != pid:
                break
        except ray.exceptions.ActorUnavailableError:
            time.sleep(0.2)
    assert second != pid
    with pytest.raises(NeedsWeightsError):
        ray.get(ask(replica, {}), timeout=SECONDS)
    update(adapter, 4)
    assert ray.get(ask(replica, {}), timeout=SECONDS).extra_fields["global_steps"] == 4


def test_a_bucket_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.rl.verl_plugin.adapter.BUCKET_BYTES", 1 << 10)
    tensors = {str(index): torch.full((100,), float(index)) for index in range(9)} | {"large": torch.ones(10_000)}

    async def collect() -> list[list[tuple[str, torch.Tensor]]]:
        return [bucket async for bucket in buckets_of(from_one_buffer(tensors), torch.bfloat16)]

    buckets = asyncio.run(collect())
    assert [[name for name, _ in bucket] for bucket in buckets] == [list("01234"), list("5678"), ["large"]]
    for bucket in buckets:
        for name, tensor in bucket:
            assert tensor.dtype == torch.bfloat16 and tensor.equal(tensors[name].bfloat16())
