"""The whole path of the device, through Triton's interpreter: the same engine as on a CPU, and transformers.

Slot records, step buffers, work items, layer kernels, sampling and result copies of the device build, on a model of
very few numbers. What only a device can show (graphs, streams, speed) is in `tests/gpu`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from transformers import PreTrainedModel

from headrace import Engine, Generation, InternalError, SamplingParams
from headrace.config import EngineConfig, resolve
from headrace.core.canary import check_device
from headrace.core.executor import LocalExecutor
from headrace.core.faults import DeviceLost, StepError
from headrace.runner import build_runner
from headrace.runner.device_step import DeviceStep
from headrace.runner.step_runner import StepRunner
from headrace.types.plan import StepPlan, StepResult
from tests.parity.models import VOCAB_SIZE, make_model, reference_logits, save_model
from tests.runner.plans import PlanBuilder

TOLERANCE = 1e-4
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
SETTINGS: dict[str, Any] = {
    "device": "cuda" if torch.cuda.is_available() else "cpu",  # without a device, in the interpreter
    "inprocess": True,
    "skip_tokenizer_init": True,
    "seed": 0,
    "num_threads": 1,
    "dtype": "float32",
    "page_size": 8,
    "kv_pool_tokens": 1024,
    "max_running_requests": 5,
    "max_num_batched_tokens": 16,
}
Checkpoint = tuple[PreTrainedModel, Path]
Starter = Callable[..., Engine]

# Rows that pad a step compute something from whatever memory held; numpy, which interprets them, says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    model = make_model("qwen3", attention_bias=True, num_hidden_layers=1, **SIZES)
    return model, save_model(model, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def begin(checkpoint: Checkpoint) -> Iterator[Starter]:
    """Start engines, each once per set of settings, that end with the module."""
    started: dict[str, Engine] = {}

    def start(**settings: Any) -> Engine:
        key = repr(sorted(settings.items()))
        if key not in started:
            started[key] = Engine(checkpoint[1], **{**SETTINGS, **settings})
        return started[key]

    yield start
    for engine in started.values():
        engine.shutdown()


@pytest.fixture
def device(begin: Starter) -> Engine:
    return begin(attention_backend="triton", overlap_depth=1)


@pytest.fixture
def plain(begin: Starter) -> Engine:
    """The CPU backend."""
    return begin()


def random_ids(seed: int, length: int) -> list[int]:
    choose = random.Random(seed)
    return [choose.randrange(3, VOCAB_SIZE) for _ in range(length)]


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_new_tokens=num_tokens, ignore_eos=True)


def check_equal(found: list[Generation], expected: list[Generation]) -> None:
    """The same tokens, ends and versions, and values within rounding."""
    for one, other in zip(found, expected, strict=True):
        assert (one.token_ids, one.finish_reason, one.matched) == (other.token_ids, other.finish_reason, other.matched)
        assert one.version_spans == other.version_spans
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=TOLERANCE, rtol=0)
        check_values(one.prompt_logprobs, other.prompt_logprobs)
        for name in ("top_logprobs", "token_ids_logprobs", "prompt_top_logprobs"):
            for table, wanted in zip(getattr(one, name), getattr(other, name), strict=True):
                assert (table is None) == (wanted is None)
                if table is not None:
                    assert table.keys() == wanted.keys()
                    check_values([table[token] for token in wanted], list(wanted.values()))


def check_values(found: list[Any], expected: list[Any]) -> None:
    assert [value is None for value in found] == [value is None for value in expected]
    pairs = [(one, other) for one, other in zip(found, expected, strict=True) if one is not None]
    np.testing.assert_allclose([one for one, _ in pairs], [other for _, other in pairs], atol=TOLERANCE, rtol=0)


def test_prefill_in_chunks_beside_decode_equals_transformers(
    checkpoint: Checkpoint, device: Engine, plain: Engine
) -> None:
    """27 prompt tokens do not fit into a step of 16: short ones decode while the long one is still being read."""
    prompts = [random_ids(1, 1), random_ids(2, 5), random_ids(0, 27)]
    found = device.generate(input_ids=prompts, sampling_params=greedy(2))
    check_equal(found, plain.generate(input_ids=prompts, sampling_params=greedy(2)))
    assert device.metrics()["num_chunked_prompts"] > 0
    for prompt, piece in zip(prompts, found, strict=True):
        check_transformers(checkpoint[0], prompt, piece)


def check_transformers(model: PreTrainedModel, prompt: list[int], piece: Generation) -> None:
    logits = reference_logits(model, prompt + piece.token_ids)[len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == piece.token_ids
    expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(piece.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(piece.logprobs), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("numerics", ["fast", "invariant"])
def test_biases_everywhere_and_tied_embeddings(tmp_path: Path, numerics: str) -> None:
    model = make_model("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True, **SIZES)
    prompts = [random_ids(5, 6), random_ids(6, 1)]
    with Engine(save_model(model, tmp_path), **SETTINGS, attention_backend="triton", numerics=numerics) as engine:
        for prompt, piece in zip(prompts, engine.generate(input_ids=prompts, sampling_params=greedy(3)), strict=True):
            check_transformers(model, prompt, piece)


def test_a_group_shares_its_prefix(device: Engine, plain: Engine) -> None:
    """Samples of one prompt read its pages once; they differ from one another and not from those of the CPU."""
    params = SamplingParams(max_new_tokens=2, ignore_eos=True, seed=3, n=4)
    found, expected = (each.generate(input_ids=random_ids(4, 25), sampling_params=params) for each in (device, plain))
    check_equal(found, expected)
    assert len({tuple(piece.token_ids) for piece in found}) == 4
    assert device.metrics()["num_shared_prefills"] > 0


def test_every_processor_and_every_extra(device: Engine, plain: Engine) -> None:
    kinds: list[dict[str, Any]] = [
        {"top_k": 5, "temperature": 1.5},
        {"min_p": 0.05, "top_p": 0.8},
        {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.4},
        {"logit_bias": {5: 6.0, 6: -50.0}, "temperature": 0.0},
        {"min_new_tokens": 1, "stop_token_ids": tuple(range(3, 80)), "max_new_tokens": 9},
    ]
    params = [
        SamplingParams(**{"max_new_tokens": 2, "ignore_eos": True, "seed": seed, **kind})
        for seed, kind in enumerate(kinds)
    ]
    prompts = [random_ids(10 + seed, 3) for seed in range(len(kinds))]
    options: dict[str, Any] = {
        "return_prompt_logprobs": True,
        "top_logprobs": 3,
        "logprob_token_ids": [0, 50],
        "logprob_mode": "sampled",
    }
    kept = (
        each.generate(input_ids=prompts[:2], sampling_params=params[:2], return_kept_token_ids=True)
        for each in (device, plain)
    )
    of_device, of_cpu = ([piece.kept_token_ids for piece in pieces] for pieces in kept)
    assert of_device == of_cpu and len(of_cpu[0]) == 2
    found, expected = (each.generate(input_ids=prompts, sampling_params=params, **options) for each in (device, plain))
    check_equal(found, expected)
    assert found[-1].finish_reason == "stop" and found[-1].token_ids[0] >= 80 > found[-1].token_ids[-1]


def test_a_resumed_generation_counts_its_output_as_before(device: Engine, plain: Engine) -> None:
    """The last ids of the prompt are output: presence and frequency penalties go on where they were."""
    penalties: dict[str, Any] = {
        "repetition_penalty": 1.2,
        "presence_penalty": -4.0,
        "frequency_penalty": -2.0,
        "seed": 4,
    }
    prompt = random_ids(90, 4)
    [whole] = device.generate(
        input_ids=prompt, sampling_params=SamplingParams(max_new_tokens=4, ignore_eos=True, **penalties)
    )
    rest = SamplingParams(max_new_tokens=2, ignore_eos=True, **penalties)
    resumed = prompt + whole.token_ids[:2]
    found, expected = (
        each.generate(input_ids=[resumed, resumed], sampling_params=rest, num_output_ids_in_prompt=[2, 0])
        for each in (device, plain)
    )
    check_equal(found, expected)
    assert whole.token_ids[2:] == found[0].token_ids != found[1].token_ids


def test_a_slot_and_its_pages_are_used_again(device: Engine, plain: Engine) -> None:
    """More requests than slots, of all lengths."""
    prompts = [random_ids(30 + seed, 1 + seed) for seed in range(7)]
    params = [SamplingParams(max_new_tokens=1 + seed % 2, ignore_eos=True, seed=seed) for seed in range(7)]
    found, expected = (each.generate(input_ids=prompts, sampling_params=params) for each in (device, plain))
    check_equal(found, expected)
    assert device.metrics()["num_used_tokens"] == 0


def test_overlap_changes_nothing(begin: Starter, device: Engine) -> None:
    prompts = [random_ids(50 + seed, 2 + seed) for seed in range(3)]
    stops = tuple(range(3, VOCAB_SIZE, 4))
    params = [SamplingParams(max_new_tokens=5, seed=seed, stop_token_ids=stops, ignore_eos=True) for seed in range(3)]
    in_turn = begin(attention_backend="triton", overlap_depth=0)
    found, expected = (each.generate(input_ids=prompts, sampling_params=params) for each in (device, in_turn))
    check_equal(found, expected)
    assert device.metrics()["num_overshoot_tokens"] > 0 == in_turn.metrics()["num_overshoot_tokens"]


def test_new_weights_are_used_at_once(checkpoint: Checkpoint, device: Engine, plain: Engine) -> None:
    old = [(name, parameter.detach()) for name, parameter in checkpoint[0].named_parameters()]
    new = [(name, tensor.roll(1, 0) if tensor.ndim > 1 else tensor) for name, tensor in old]
    before = device.generate(input_ids=random_ids(60, 9), sampling_params=greedy(2))
    for version, tensors in (("new", new), ("default", old)):
        for engine in (device, plain):
            engine.update_weights_from_tensor(tensors, version=version)
        found, expected = (
            each.generate(input_ids=random_ids(60, 9), sampling_params=greedy(2)) for each in (device, plain)
        )
        check_equal(found, expected)
        assert device.digest() == plain.digest()
        assert (found[0].token_ids == before[0].token_ids) == (version == "default")


@pytest.mark.usefixtures("dot_by_rows")
def test_invariant_numerics_are_the_same_bits_among_other_mates(begin: Starter) -> None:
    """Alone in one piece; then beside others, in chunks, behind a cached prefix."""
    engine = begin(attention_backend="triton", numerics="invariant", overlap_depth=1)
    prompts = [random_ids(70, 18), random_ids(71, 2)]
    params = [SamplingParams(max_new_tokens=2, ignore_eos=True, seed=seed, temperature=0.8) for seed in range(2)]
    alone = [
        engine.generate(input_ids=prompt, sampling_params=each)[0] for prompt, each in zip(prompts, params, strict=True)
    ]
    mates = [random_ids(80 + seed, 9 * seed + 1) for seed in range(2)]
    together = engine.generate(input_ids=[*mates, *reversed(prompts)], sampling_params=[greedy(2)] * 2 + params[::-1])[
        :1:-1
    ]
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        assert np.asarray(one.logprobs).tobytes() == np.asarray(other.logprobs).tobytes()
    assert together[0].num_cached_tokens > 0 == alone[0].num_cached_tokens


def test_the_canary_tells_a_guilty_request_from_a_lost_device(
    checkpoint: Checkpoint, begin: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that any device can execute is one that this path executes, and nobody's tokens suffer from it."""
    engine, real = begin(attention_backend="triton", overlap_depth=1), StepRunner.launch
    params: dict[str, Any] = {"max_new_tokens": 3, "ignore_eos": True, "seed": 3}
    expected = engine.generate(input_ids=[5, 6, 7], sampling_params=params)[0].token_ids

    def launch(runner: StepRunner, plan: StepPlan) -> DeviceStep:
        if any(9 in init.token_ids for init in plan.new_slots):
            raise RuntimeError("a poisoned prompt")
        return real(runner, plan)

    monkeypatch.setattr(StepRunner, "launch", launch)

    async def both() -> list[Any]:
        calls = [engine.asynchronous.generate(input_ids=ids, sampling_params=params) for ids in ([9, 9], [5, 6, 7])]
        return await asyncio.gather(*calls, return_exceptions=True)

    guilty, innocent = asyncio.run(both())
    assert isinstance(guilty, InternalError) and "a poisoned prompt" in guilty.message
    assert innocent[0].token_ids == expected and engine.is_alive
    runner = build_runner(resolve(EngineConfig(model=str(checkpoint[1]), **_device_settings()), checkpoint[1]))
    check_device(LocalExecutor(runner), StepError(1, RuntimeError("x")), 0)
    monkeypatch.setattr(StepRunner, "launch", lambda *_: (_ for _ in ()).throw(RuntimeError("nothing works")))
    with pytest.raises(DeviceLost, match="nothing works"):
        check_device(LocalExecutor(runner), StepError(1, RuntimeError("x")), 0)


def test_layers_of_several_kv_groups(tmp_path: Path) -> None:
    """A layer that is rotated in another way has a pool, and a part of the metadata, of its own."""
    folder = save_model(make_model("qwen3", attention_bias=True, **SIZES), tmp_path)
    found: list[list[StepResult]] = []
    for backend in ("triton", "cpu"):
        settings = {**_device_settings(), "attention_backend": backend}
        resolved = resolve(EngineConfig(model=str(folder), **settings), folder)
        first, *others = resolved.model.layers
        attention = replace(first.attention, rope=replace(first.attention.rope, theta=50.0))
        model = replace(resolved.model, layers=(replace(first, attention=attention), *others))
        assert len(model.kv_groups) == 2
        runner, plans = build_runner(replace(resolved, model=model)), PlanBuilder(page_size=8, num_pages=30)
        for slot in range(2):
            plans.enter(slot, random_ids(slot, 13 - 8 * slot))
        found.append([runner.launch(plans.step([(0, 9), (1, 5)])).wait()])
        for rows in ([(1, 1), (0, 4)], [(0, 1), (1, 1)]):
            for slot in (slot for slot, length in rows if length == 1):
                plans.append(slot)
            found[-1].append(runner.launch(plans.step(rows)).wait())
        runner.close()
    for on_device, on_cpu in zip(*found, strict=True):
        np.testing.assert_array_equal(on_device.token_ids, on_cpu.token_ids)
        np.testing.assert_allclose(on_device.logprobs, on_cpu.logprobs, atol=TOLERANCE, rtol=0)


def _device_settings() -> dict[str, Any]:
    return {**{k: v for k, v in SETTINGS.items() if k != "inprocess"}, "attention_backend": "triton"}
