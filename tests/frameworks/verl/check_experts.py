"""The experts of a response's tokens, as a replica of a model of experts answers them and as verl's agent loop takes
them up for its routing replay."""

from __future__ import annotations

import asyncio
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedModel

from tests.engine.test_routed_experts import PROMPT, routed_by
from tests.frameworks.verl import check_server
from tests.frameworks.verl.check_server import SECONDS, Replica, Worker
from tests.parity.models import make_model

with warnings.catch_warnings(action="ignore"):  # verl's and Ray's own
    import ray
    from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput
    from verl.workers.config import RolloutConfig

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("qwen3_moe", seed=3)


@pytest.fixture(scope="module")
def replica(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    folder: Path = tmp_path_factory.mktemp("experts")
    model.save_pretrained(folder)
    ray.cloudpickle.register_pickle_by_value(check_server)  # Ray's workers do not find this module
    ray.init(**({} if "RAY_ADDRESS" in os.environ else {"num_cpus": 2, "include_dashboard": False}))
    config = RolloutConfig(
        name="headrace",
        dtype="float32",
        tensor_model_parallel_size=1,
        prompt_length=64,
        response_length=32,
        skip_tokenizer_init=True,
        load_format="auto",
        enable_rollout_routing_replay=True,
        engine_kwargs={"headrace": {"num_threads": 1, "kv_pool_tokens": 1 << 12}},
    )
    found = Replica(config, SimpleNamespace(path=str(folder)))
    found.workers = [ray.remote(Worker).options(num_cpus=0).remote()]
    asyncio.run(found.launch_servers())
    yield found
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[check_server.__name__])


def test_experts_of_prompt_and_response_are_those_of_the_model(replica: Replica, model: PreTrainedModel) -> None:
    params = {"max_tokens": 7, "ignore_eos": True, "logprobs": True, "seed": 1}
    sample: Any = ray.get(check_server.ask(replica, params, PROMPT), timeout=SECONDS)
    expected = routed_by(model, PROMPT + sample.token_ids)
    assert sample.routed_experts.tolist() == expected.tolist()
    taken = AgentLoopOutput(
        prompt_ids=PROMPT,
        response_ids=sample.token_ids,
        response_mask=[1] * len(sample.token_ids),
        response_logprobs=sample.log_probs,
        routed_experts=sample.routed_experts,
        metrics=AgentLoopMetrics(),
    ).as_dict()
    assert taken["routed_experts"][:-1].tolist() == expected.tolist()  # the last token was never computed
    assert len(taken["routed_experts"]) == len(PROMPT) + 7
