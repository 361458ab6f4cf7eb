"""OpenRLHF's own rollout actor and its own agent executors over Headrace, on a CPU: generation, both ways of weights,
pause and sleep. What it has to be told is only a path (`shadow`) on which its actor finds a package named vllm."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch.multiprocessing.reductions import reduce_tensor

from headrace import Engine
from tests.arch.source import ROOT
from tests.engine.builders import SETTINGS, byte_tokenizer, model_of, named_tensors, save_model
from tests.free_ports import free_port
from tests.server.vllm_client import stateless_group

pytestmark = pytest.mark.timeout(600)
SHADOW = Path(__file__).with_name("shadow")
WAIT_SECONDS = 240.0
AGENT = """
from openrlhf.utils.agent import AgentInstanceBase, MultiTurnAgentExecutor
import torch

class Agent(AgentInstanceBase):
    def __init__(self, *args, **kwargs):
        self.num_steps = 0

    async def step(self, state_dict, **kwargs):
        self.num_steps += 1
        done = self.num_steps == 2
        feedback = "" if done else " again: "
        return {"rewards": torch.tensor(float(len(state_dict["action_text"]))), "environment_feedback": feedback,
                "done": done}

class AgentExecutor(MultiTurnAgentExecutor):
    def __init__(self):
        super().__init__(Agent)
"""


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    path = f"{SHADOW}:{ROOT}"
    sys.path.insert(0, str(SHADOW))
    options: Any = {"include_dashboard": False, "log_to_driver": False}
    ray.init(num_cpus=4, runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}}, **options)
    yield
    ray.shutdown()
    sys.path.remove(str(SHADOW))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), seed=1)


@pytest.fixture(scope="module")
def actor(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What `create_vllm_engines` makes, without a GPU."""
    from openrlhf.trainer.ray.vllm_engine import RolloutRayActor

    agent = tmp_path_factory.mktemp("agent") / "agent.py"
    agent.write_text(AGENT)
    settings = {name: SETTINGS[name] for name in ("num_threads", "page_size", "kv_pool_tokens")}
    return RolloutRayActor.options(num_cpus=1).remote(
        model=str(folder),
        enforce_eager=True,
        worker_extension_cls="openrlhf.trainer.ray.vllm_worker_wrap.WorkerWrap",
        tensor_parallel_size=1,
        seed=0,
        distributed_executor_backend="uni",
        max_model_len=512,
        enable_prefix_caching=True,
        dtype="float32",
        trust_remote_code=True,
        full_determinism=False,
        gpu_memory_utilization=None,
        bundle_indices=None,
        num_gpus=0,
        enable_sleep_mode=True,
        agent_func_path=str(agent),
        remote_rm_url=None,
        mm_pad_token_ids=set(),
        logprobs_mode="processed_logprobs",
        max_logprobs=1,
        **settings,
    )


def call(actor: Any, method: str, *args: Any, **named: Any) -> Any:
    return ray.get(getattr(actor, method).remote(*args, **named), timeout=WAIT_SECONDS)


def drawn(actor: Any, **changes: Any) -> Any:
    from vllm import SamplingParams

    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, "min_tokens": 1, "logprobs": 1, **changes})
    return call(actor, "generate", [1, 2, 3, 4], params).outputs[0]


@pytest.fixture(scope="module")
def expected(folder: Path) -> Iterator[Any]:
    """What an engine draws with the weights of a seed."""
    with Engine(str(folder), **SETTINGS) as engine:

        def of_seed(seed: int) -> list[int]:
            engine.update_weights_from_tensor(named_tensors(model_of(seed)), str(seed))
            params = {"temperature": 0.0, "max_new_tokens": 8}
            return list(engine.generate(input_ids=[1, 2, 3, 4], sampling_params=params)[0].token_ids)

        yield of_seed


def test_its_actor_generates_with_logprobs(actor: Any, expected: Any) -> None:
    output = drawn(actor)
    assert output.token_ids == expected(1) and output.finish_reason in ("stop", "length")
    assert all(token in row for token, row in zip(output.token_ids, output.logprobs, strict=True))
    assert drawn(actor, logprobs=None).logprobs is None
    assert call(actor, "get_num_unfinished_requests") == 0


def test_its_agent_executor_runs_turns(actor: Any) -> None:
    from vllm import SamplingParams

    params = SamplingParams(temperature=1.0, top_k=-1, max_tokens=8, min_tokens=1, logprobs=1)
    found = call(actor, "generate_responses", "tell me", "", params, 500, byte_tokenizer(), num_samples=4)
    assert {len(each["action_ranges"]) for each in found} >= {2}, "a turn ends with a token that a model of noise draws"
    for each in found:
        ends = [end for _, end in each["action_ranges"]]
        assert len(each["observation_tokens"]) == len(each["rollout_log_probs"])
        behind = len(each["observation_tokens"]) - ends[-1]  # feedback, where the length ends it in its first turn
        assert behind == 0 or (behind == len(" again: ") and each["truncated"] and len(ends) == 1)
        for start, end in each["action_ranges"]:
            assert all(value < 0 for value in each["rollout_log_probs"][start:end])


def test_weights_come_by_broadcast_one_by_one_while_it_is_paused(actor: Any, expected: Any) -> None:
    port = free_port()
    joined = actor.init_process_group.remote("127.0.0.1", port, 1, 2, "openrlhf", backend="gloo", use_ray=False)
    group = stateless_group(port, 2)
    ray.get(joined, timeout=WAIT_SECONDS)
    call(actor, "pause_generation")
    _broadcast(actor, group, named_tensors(model_of(2)))
    call(actor, "reset_prefix_cache")
    call(actor, "resume_generation")
    assert drawn(actor).token_ids == expected(2)
    (name, _), *rest = named_tensors(model_of(3))
    with pytest.raises(ray.exceptions.RayTaskError, match=re.escape(name)):
        _broadcast(actor, group, rest)  # OpenRLHF says it was all: it was not
    assert drawn(actor).token_ids == expected(2)
    _broadcast(actor, group, named_tensors(model_of(3)))
    assert drawn(actor).token_ids == expected(3)


def _broadcast(actor: Any, group: Any, tensors: list[tuple[str, torch.Tensor]]) -> None:
    """In the steps of `broadcast_to_vllm`."""
    for count, (name, tensor) in enumerate(tensors, 1):
        ended = actor.update_weight.remote(name, tensor.dtype, tensor.shape, empty_cache=count == len(tensors))
        group.broadcast([tensor]).wait()
        ray.get(ended, timeout=WAIT_SECONDS)


def test_weights_come_by_handles_while_it_sleeps(actor: Any, expected: Any) -> None:
    before = drawn(actor).token_ids
    call(actor, "sleep")
    call(actor, "wake_up")
    assert drawn(actor).token_ids == before
    call(actor, "sleep")
    call(actor, "wake_up", ["weights"])
    tensors = named_tensors(model_of(4))
    for count, (name, tensor) in enumerate(tensors, 1):
        handles = {"cpu": reduce_tensor(tensor.clone())}
        is_last = count == len(tensors)
        call(actor, "update_weight_cuda_ipc", name, tensor.dtype, tensor.shape, handles, empty_cache=is_last)
    call(actor, "wake_up", ["kv_cache"])
    assert drawn(actor).token_ids == expected(4)


def test_what_is_wrong_is_named(actor: Any) -> None:
    with pytest.raises(ray.exceptions.RayTaskError, match="sync_with_ray"):
        call(actor, "init_process_group", "127.0.0.1", 1, 1, 2, "g", backend="gloo", use_ray=True)
    handles = {"cpu": (print, ("called",))}
    with pytest.raises(ray.exceptions.RayTaskError, match="not that of a cpu tensor"):
        call(actor, "update_weight_cuda_ipc", "model.norm.weight", torch.float32, [32], handles, empty_cache=True)
