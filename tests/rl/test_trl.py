"""What TRL's trainers call, without TRL: a stand-in has what is read of one. tests/frameworks/trl has the real ones."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen3ForCausalLM

from headrace import Engine, RequestError, UnavailableError, WeightUpdateError
from headrace.rl.demo import POLICY
from headrace.rl.trl import WeightTransfer, attach, make_rollout_func

PROMPT = [10, 20, 30]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    settings: dict[str, Any] = {"inprocess": True, "num_threads": 1, "dtype": "float32", "context_length": 64}
    with Engine(str(POLICY), **settings) as engine:
        yield engine


@pytest.fixture(scope="module")
def model() -> Any:
    return Qwen3ForCausalLM.from_pretrained(POLICY, dtype=torch.float32)


def trainer_of(model: Any, **more: Any) -> Any:
    """What a trainer has before it is attached."""
    accelerator = SimpleNamespace(num_processes=1, state=SimpleNamespace(), unwrap_model=lambda model: model)
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
    counts = {"max_completion_length": 6, "num_generations": 2, "num_generations_eval": 1}
    args = SimpleNamespace(generation_kwargs=more.pop("generation_kwargs", None), vllm_structured_outputs_regex=None)
    own = {"accelerator": accelerator, "args": args, "model": model, "processing_class": encode, "use_vllm": False}
    return SimpleNamespace(**{**own, **sampling, **counts, "state": SimpleNamespace(global_step=3), **more})


def encode(text: str) -> dict[str, list[int]]:
    return {"input_ids": [int(word) for word in text.split()]}


def test_equal_prompts_are_samples_of_one(engine: Engine, model: Any) -> None:
    trainer = trainer_of(model, generation_kwargs={"max_tokens": 4, "ignore_eos": True, "seed": 1})
    attached = attach(trainer, engine, verify=True)
    assert (trainer.use_vllm, trainer.vllm_mode, trainer.vllm_generation) == (True, "server", attached)
    attached.sync_weights()
    assert engine.version == "3" and attached.policy.reports[0].is_verified
    other = [40, 50]
    prompts, ids, logprobs, tokens = attached.generate([PROMPT, PROMPT, other, other, PROMPT], None, 2)
    assert prompts == [PROMPT, PROMPT, other, other, PROMPT]
    assert [len(each) for each in ids] == [4] * 5 and ids[0] != ids[1], "two samples of one prompt"
    assert ids[0] == ids[4], "of the same seed the first of another"
    assert tokens == [[[token] for token in each] for each in ids]
    assert attached.generate([], None, 2)[1] == []
    (again,) = engine.generate(input_ids=[PROMPT], sampling_params={"max_new_tokens": 4, "ignore_eos": True, "seed": 1})
    assert ids[0] == again.token_ids
    assert [value for (value,) in logprobs[0]] == pytest.approx(again.logprobs, abs=1e-5)


def test_log_probabilities_are_of_what_was_drawn_from(engine: Engine, model: Any) -> None:
    trainer = trainer_of(model, top_k=1, temperature=2.0)
    _, (ids,), (values,), _ = attach(trainer, engine).generate([PROMPT], None, 1)
    assert values == [[0.0]] * len(ids), "of one token that is left"


def test_a_rollout_func_pushes_when_the_step_has_moved(engine: Engine, model: Any) -> None:
    trainer, rollouts = trainer_of(model.train()), make_rollout_func(engine)
    epoch = engine.status().epoch
    for step, num_pushes in ((5, 1), (5, 1), (6, 2)):
        trainer.state.global_step = step
        found = rollouts(["10 20 30", "10 20 30"], trainer)
        assert engine.status().epoch == epoch + num_pushes
        assert found["prompt_ids"] == [PROMPT, PROMPT] and found["weight_version"] == [str(step)] * 2
        assert [len(each) for each in found["logprobs"]] == [len(each) for each in found["completion_ids"]]


class Adapted:
    """As PEFT wraps a model."""

    prefix = "lora_"

    def __init__(self, model: Any) -> None:
        self.model, self.is_merged, self.calls = model, False, 0

    def merge_adapter(self) -> None:
        self.is_merged = True
        self.calls += 1

    def unmerge_adapter(self) -> None:
        self.is_merged = False

    def get_base_model(self) -> Any:
        assert self.is_merged
        state = {}
        for name, tensor in self.model.state_dict().items():
            head, _, tail = name.rpartition(".")
            state[f"{head}.base_layer.{tail}" if "q_proj" in name else name] = tensor
            if "q_proj" in name:
                state[f"{head}.lora_A.default.{tail}"] = torch.zeros(1)
        state["model.norm.original_module.weight"] = torch.zeros(1)
        state["model.norm.modules_to_save.default.weight"] = state.pop("model.norm.weight")
        return SimpleNamespace(state_dict=lambda: state)


def test_adapters_are_merged_while_weights_are_pushed(engine: Engine, model: Any) -> None:
    adapted = Adapted(model)
    trainer = trainer_of(adapted)
    attach(trainer, engine, verify=True).sync_weights()
    assert adapted.calls == 1 and not adapted.is_merged
    adapted.model = Qwen3ForCausalLM(model.config).to(torch.bfloat16).half()
    adapted.model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(WeightUpdateError, match=r"model\.norm\.weight"):
        trainer.vllm_generation.sync_weights()
    assert adapted.calls == 2 and not adapted.is_merged, "also when the engine refuses them"
    trainer.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=2)
    with pytest.raises(RequestError, match="adapters"):
        attach(trainer, engine)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda trainer: delattr(trainer, "accelerator"), "trainer"),
        (lambda trainer: setattr(trainer, "use_vllm", True), "trainer"),
        (lambda trainer: setattr(trainer.args, "vllm_structured_outputs_regex", "a+"), "vllm_structured_outputs_regex"),
        (lambda trainer: setattr(trainer.accelerator.state, "fsdp_plugin", SimpleNamespace(fsdp_version=1)), "trainer"),
        (
            lambda trainer: setattr(trainer.accelerator.state, "deepspeed_plugin", SimpleNamespace(zero_stage=3)),
            "trainer",
        ),
    ],
)
def test_what_cannot_be_attached_is_named(engine: Engine, model: Any, change: Any, field: str) -> None:
    trainer = trainer_of(model)
    change(trainer)
    with pytest.raises(RequestError) as caught:
        attach(trainer, engine)
    assert caught.value.field == field


def test_what_cannot_be_sampled_is_named(engine: Engine, model: Any) -> None:
    attached = attach(trainer_of(model, generation_kwargs={"num_beams": 2}), engine)
    with pytest.raises(RequestError) as caught:
        attached.generate([PROMPT], None, 1)
    assert caught.value.field == "generation_kwargs.num_beams"
    with pytest.raises(RequestError) as caught:
        attached.generate([PROMPT], [["an image"]], 1)
    assert caught.value.field == "images"


def test_a_completion_that_somebody_aborts_is_an_error(engine: Engine, model: Any) -> None:
    attached = attach(trainer_of(model), engine)
    engine.pause("keep")
    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(attached.generate, [PROMPT], None, 1)
        while not engine.status().num_waiting:
            pass
        engine.abort(all=True)
        with pytest.raises(UnavailableError, match="prompt 0 was aborted"):
            drawing.result(60)
    engine.resume()


def test_a_transfer_pauses_sends_and_resumes(engine: Engine, model: Any) -> None:
    transfer = WeightTransfer(engine, verify=True)
    transfer.init_weight_transfer()
    for number in (1, 2):
        transfer.pause()
        assert engine.status().paused == "keep"
        transfer.send_weights(iter(model.named_parameters()))
        transfer.resume()
        assert engine.version == str(number) == transfer.reports[-1].update.version
    transfer.destroy()
    transfer.pause()
    with pytest.raises(WeightUpdateError):
        transfer.send_weights(iter([("nope", torch.zeros(1))]))
    transfer.destroy()
    assert not engine.status().paused and engine.version == "2"
