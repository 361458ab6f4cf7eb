"""Models of experts in a whole engine: updates in both name worlds, pushes that prove themselves, products per step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from headrace import Engine, SamplingParams
from headrace.rl import hf_named_tensors, push_weights
from headrace.types.errors import WeightUpdateError
from headrace.types.weights import UpdateMode
from tests.parity.models import VOCAB_SIZE, make_model

SETTINGS: dict[str, Any] = {"inprocess": True, "skip_tokenizer_init": True, "num_threads": 1, "kv_pool_tokens": 4096}
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=6, ignore_eos=True)
PROMPTS = [[7, 8, 9, 10, 11, 12, 13, 14, 15], [30, 31, 32, 33, 34, 35, 36, 37], [5]]
Tensors = dict[str, torch.Tensor]


class Weights(NamedTuple):
    """One model, as a folder, as the tensors of its files and as those of its modules."""

    folder: Path
    files: Tensors
    modules: Tensors


@pytest.fixture(scope="module", params=["qwen3_moe", "mixtral"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Weights]:
    """Two models of one shape."""
    made = []
    for seed in (0, 1):
        model, folder = make_model(request.param, seed=seed), tmp_path_factory.mktemp(request.param)
        model.save_pretrained(folder)
        modules = {name: tensor.detach() for name, tensor in model.named_parameters()}
        made.append(Weights(folder, load_file(folder / "model.safetensors"), modules))
    return made


@pytest.fixture
def engine(pair: list[Weights]) -> Iterator[Engine]:
    with Engine(model=str(pair[0].folder), **SETTINGS) as started:
        yield started


def outputs(engine: Engine) -> list[tuple[list[int], list[float]]]:
    """Bit for bit: each prompt alone and all of it computed, since the steps that prompts share depend on time."""
    engine.flush_cache()
    found = [engine.generate(input_ids=prompt, sampling_params=GREEDY)[0] for prompt in PROMPTS]
    return [(piece.token_ids, piece.logprobs) for piece in found]


def cold(weights: Weights, **settings: Any) -> tuple[dict[str, str], list[tuple[list[int], list[float]]]]:
    with Engine(model=str(weights.folder), **SETTINGS, **settings) as started:
        return started.digest(), outputs(started)


@pytest.mark.parametrize(("mode", "dtype"), [("shadow", "float32"), ("inplace", "bfloat16")])
def test_updates_there_and_back_in_either_world_equal_cold_loads(
    pair: list[Weights], mode: UpdateMode, dtype: str
) -> None:
    """B, A, B, A, by files, by modules, and by a module whose tensors are of another dtype."""
    expected = [cold(weights, dtype=dtype) for weights in pair]
    assert expected[0] != expected[1] and expected[0][0].keys() == pair[0].files.keys()
    with Engine(model=str(pair[0].folder), dtype=dtype, **SETTINGS) as engine:
        for step, world in enumerate(("files", "modules", "modules", "files"), 1):
            weights = pair[step % 2]
            engine.update_weights_from_tensor(getattr(weights, world), str(step), mode=mode)
            assert (engine.digest(), outputs(engine)) == expected[step % 2], (step, world)
            for name, tensor in itertools.chain(weights.files.items(), weights.modules.items()):
                assert torch.equal(engine.get_weights_by_name(name), tensor.to(getattr(torch, dtype))), name
        engine.update_weights_from_disk(pair[1].folder, "disk", mode=mode)
        assert (engine.digest(), outputs(engine)) == expected[1]
        part = {name: tensor for name, tensor in pair[0].modules.items() if "experts.down_proj" in name}
        engine.update_weights_from_tensor(part, "part", mode=mode, partial=True)
        changed = {name for name, digest in engine.digest().items() if digest != expected[1][0][name]}
        assert changed == {name for name in pair[0].files if ".experts." in name and ("down" in name or "w2" in name)}


def test_a_push_of_either_world_is_verified(pair: list[Weights], engine: Engine) -> None:
    for number, (weights, world) in enumerate(itertools.product(pair[::-1], ("files", "modules"))):
        assert push_weights(engine, getattr(weights, world), number, verify=True).is_verified
        assert engine.digest() == cold(weights)[0]
    with Engine(model=str(pair[1].folder), dtype="bfloat16", **SETTINGS) as narrow:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(pair[0].folder, dtype=torch.float32)
        assert push_weights(narrow, model, "module", verify=True).is_verified
        assert push_weights(narrow, pair[1].files, "files", verify=True).is_verified


def test_verification_names_the_experts_that_are_not_what_was_sent(pair: list[Weights]) -> None:
    """A module's tensor of experts has no digest of its own: it is read back."""
    name = next(name for name, _ in hf_named_tensors(pair[1].modules) if "experts" in name)

    class Forgetful(Engine):
        """An engine that takes an update and keeps one old expert."""

        def get_weights_by_name(self, asked: str) -> torch.Tensor:
            found = super().get_weights_by_name(asked)
            if asked == name:
                found[3] = 0.0
            return found

    with Forgetful(model=str(pair[0].folder), **SETTINGS) as engine:
        with pytest.raises(WeightUpdateError, match="1 tensors") as caught:
            push_weights(engine, pair[1].modules, "tuned", verify=True)
        assert caught.value.field == name


def test_a_wrong_update_of_experts_names_the_tensor_and_touches_nothing(pair: list[Weights], engine: Engine) -> None:
    before, tensors = engine.digest(), hf_named_tensors(pair[1].modules)
    whole = next(name for name, _ in tensors if name.endswith("experts.down_proj"))
    single = next(name for name in pair[1].files if ".experts.0." in name and ("down" in name or "w2" in name))
    broken: list[tuple[Tensors, str]] = [
        ({**dict(tensors), whole: dict(tensors)[whole][:-1]}, whole),
        ({**dict(tensors), single: pair[1].files[single]}, single),
        ({name: tensor for name, tensor in tensors if name != whole}, single),
        ({name: tensor for name, tensor in pair[1].files.items() if name != single}, single),
    ]
    for sent, named in broken:
        with pytest.raises(WeightUpdateError) as caught:
            engine.update_weights_from_tensor(sent, "broken")
        assert caught.value.field == named and engine.digest() == before


def test_products_of_a_step_do_not_grow_with_the_number_of_sequences(engine: Engine) -> None:
    """The products of a layer's experts count as two: how many of them run is bounded by the number of experts."""
    counts = []
    for num_sequences in (1, 5, 30):
        before = engine.metrics()
        prompts = [[3 + (7 * number + at) % (VOCAB_SIZE - 3) for at in range(9)] for number in range(num_sequences)]
        engine.generate(input_ids=prompts, sampling_params=GREEDY)
        after = engine.metrics()
        num_calls, num_steps = (after[name] - before[name] for name in ("num_gemm_calls", "num_steps"))
        counts.append(num_calls / num_steps)
    assert len(set(counts)) == 1
