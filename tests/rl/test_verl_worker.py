"""The worker for code written against verl's older ones, with a stand-in for `DataProto`, of which only what is named
here is used. tests/frameworks/verl runs the same with verl's own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from headrace.rl.demo import POLICY
from headrace.rl.verl_worker import HeadraceRolloutWorker
from headrace.types.errors import ConfigError, NeedsWeightsError, RequestError
from tests.arch.source import ROOT

ENGINE: dict[str, Any] = {"num_threads": 1, "kv_pool_tokens": 1 << 13, "numerics": "invariant", "context_length": 96}
ROLLOUT: dict[str, Any] = {
    **{"prompt_length": 8, "response_length": 6, "dtype": "float32", "temperature": 0.7, "seed": 3},
    **{"engine_kwargs": {"headrace": ENGINE}, "load_format": "dummy_dtensor", "ignore_eos": True},
    **{"val_kwargs": {"do_sample": False}},
}
PROMPTS = [[72, 101, 108, 108, 111], [49, 43, 50, 61], [49, 43, 50, 61, 32, 33, 34, 35]]
PAD = 7


class Data:
    """Stands in for a `DataProto`."""

    def __init__(self, batch: dict[str, Any], non_tensor_batch: dict[str, Any], meta_info: dict[str, Any]) -> None:
        self.batch, self.non_tensor_batch, self.meta_info = batch, non_tensor_batch, meta_info

    @classmethod
    def from_dict(
        cls, tensors: Any = None, non_tensors: dict[str, Any] | None = None, meta_info: dict[str, Any] | None = None
    ) -> Data:
        return cls(tensors, non_tensors or {}, meta_info or {})


@pytest.fixture(scope="module")
def proto() -> type[Any]:
    return Data


@pytest.fixture(scope="module")
def model() -> Any:
    return Qwen3ForCausalLM.from_pretrained(POLICY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def worker(model: Any) -> Iterator[HeadraceRolloutWorker]:
    worker = HeadraceRolloutWorker({"model": {"path": str(POLICY)}, "rollout": ROLLOUT})
    with pytest.raises(ConfigError, match="init_model"):
        worker.engine.flush_cache()
    worker.init_model()
    worker.init_model()
    with pytest.raises(NeedsWeightsError):  # a dummy load format waits for the trainer's
        worker.engine.generate(input_ids=[PROMPTS[0]], sampling_params={"max_new_tokens": 1})
    assert worker.update_weights(model.state_dict(), 4).version == "4"
    yield worker
    worker.shutdown()
    worker.shutdown()


def rows_of(proto: Any, prompts: list[list[int]], **meta_info: Any) -> Any:
    """As verl's datasets make them: padded on the left."""
    ids, mask = torch.full((len(prompts), 8), PAD), torch.zeros(len(prompts), 8, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, 8 - len(prompt) :], mask[row, 8 - len(prompt) :] = torch.tensor(prompt), 1
    positions = (mask.cumsum(1) - 1).clip(min=0)
    tensors = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return proto.from_dict(tensors=tensors, meta_info={"pad_token_id": PAD, **meta_info})


def logprobs_of(model: Any, ids: list[int], temperature: float) -> torch.Tensor:
    """Of each token after the first, by transformers."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1] / temperature
    found: torch.Tensor = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return found


def test_rows_come_back_with_their_responses(worker: HeadraceRolloutWorker, proto: Any, model: Any) -> None:
    given = rows_of(proto, PROMPTS, do_sample=True, mark="kept")
    found = worker.generate_sequences(given)
    assert type(found) is proto and found.meta_info["mark"] == "kept"
    batch = found.batch
    assert torch.equal(batch["prompts"], given.batch["input_ids"])
    assert {name: tuple(batch[name].shape) for name in ("responses", "response_mask", "rollout_log_probs")} == {
        **dict.fromkeys(("responses", "response_mask", "rollout_log_probs"), (3, 6))
    }
    assert batch["response_mask"].all() and batch["responses"].dtype == torch.int64
    assert torch.equal(batch["input_ids"], torch.cat([batch["prompts"], batch["responses"]], 1))
    assert torch.equal(batch["attention_mask"][:, :8], given.batch["attention_mask"])
    for row, prompt in enumerate(PROMPTS):
        assert batch["position_ids"][row, 8 - len(prompt) :].tolist() == list(range(len(prompt) + 6))
        expected = logprobs_of(model, [*prompt, *batch["responses"][row].tolist()], 0.7)[-6:]
        torch.testing.assert_close(batch["rollout_log_probs"][row], expected, atol=1e-4, rtol=0)
    for label in ("min_global_steps", "max_global_steps"):
        assert isinstance(found.non_tensor_batch[label], np.ndarray)
        assert found.non_tensor_batch[label].tolist() == ["4", "4", "4"]


def test_log_probs_are_those_that_were_drawn_with(worker: HeadraceRolloutWorker, proto: Any) -> None:
    found = worker.generate_sequences(rows_of(proto, PROMPTS), response_length=4, temperature=0.5)
    assert found.batch["responses"].shape == (3, 4)
    again = worker.compute_log_prob(proto.from_dict(tensors=dict(found.batch), meta_info={"temperature": 0.5}))
    torch.testing.assert_close(again.batch["old_log_probs"], found.batch["rollout_log_probs"], atol=1e-5, rtol=0)
    hot = worker.compute_log_prob(proto.from_dict(tensors=dict(found.batch), meta_info={}))
    assert (hot.batch["old_log_probs"] - found.batch["rollout_log_probs"]).abs().max() > 1e-2


@pytest.mark.parametrize("meta", [{"do_sample": False}, {"validate": True}], ids=["greedy", "validation"])
def test_what_ends_early_is_padded(worker: HeadraceRolloutWorker, proto: Any, model: Any, meta: dict[str, Any]) -> None:
    expected = model.generate(torch.tensor([PROMPTS[0]]), do_sample=False, max_new_tokens=6, eos_token_id=None)[0, 5:]
    last = expected[2].item()
    length = expected.tolist().index(last) + 1
    batch = worker.generate_sequences(rows_of(proto, PROMPTS[:1], eos_token_id=[last, 5], **meta)).batch
    assert batch["responses"].tolist() == [[*expected.tolist()[:length], *[PAD] * (6 - length)]]
    assert batch["response_mask"].tolist() == [[1] * length + [0] * (6 - length)]
    assert batch["attention_mask"][0, 8:].tolist() == batch["response_mask"][0].tolist()
    assert (batch["rollout_log_probs"][0, length:] == 0).all()
    scored = worker.compute_log_prob(proto.from_dict(tensors=dict(batch), meta_info={})).batch["old_log_probs"]
    assert (scored[0, :length] < 0).all() and (scored[0, length:] == 0).all()


def test_what_is_wrong_is_named(worker: HeadraceRolloutWorker, proto: Any) -> None:
    with pytest.raises(RequestError, match="n is not an argument of generate_sequences"):
        worker.generate_sequences(rows_of(proto, PROMPTS), n=4)
    with pytest.raises(RequestError, match="; temperature is$"):
        worker.generate_sequences(rows_of(proto, PROMPTS), temprature=0.5)
    rows = rows_of(proto, PROMPTS)
    with pytest.raises(RequestError) as refused:
        worker.generate_sequences(rows, temperature=-1.0)
    assert refused.value.field == "sampling_params.temperature"
    rows.batch["attention_mask"] = rows.batch["attention_mask"][:, 1:]
    with pytest.raises(RequestError) as refused:
        worker.generate_sequences(rows)
    assert refused.value.field == "attention_mask"


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("role", {"role": "actor_rollout"}),
        ("model.path", {"model": {}}),
        ("rollout", {"rollout": None}),
        ("rollout.response_length", {"rollout": {"prompt_length": 8}}),
        ("quantization", {"rollout": {**ROLLOUT, "quantization": "fp8"}}),
        ("enable_rollout_routing_replay", {"rollout": {**ROLLOUT, "enable_rollout_routing_replay": True}}),
    ],
)
def test_a_config_that_asks_for_what_is_not_there_is_refused(field: str, change: dict[str, Any]) -> None:
    role = change.pop("role", "rollout")
    with pytest.raises(ConfigError) as refused:
        HeadraceRolloutWorker({"model": {"path": str(POLICY)}, "rollout": ROLLOUT, **change}, role)
    assert refused.value.field == field


def test_what_the_page_shows_runs(proto: Any, model: Any) -> None:
    text = (ROOT / "docs" / "verl.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    config = {"model": {"path": str(POLICY)}, "rollout": ROLLOUT}
    scope: dict[str, Any] = {"config": config, "model": model, "prompts": rows_of(proto, PROMPTS)}
    exec(compile(block, "docs/verl.md", "exec"), scope)
    assert scope["scored"].batch["old_log_probs"].shape == (3, 6)
