"""Every sampling feature on the device against the engine on the CPU with the same float32 weights; long contexts; fp8
keys and values; what may happen to running requests."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from headrace import Engine, Generation, SamplingParams
from headrace.types.sampling_params import LogprobMode
from headrace.types.weights import PauseMode
from tests.gpu.builders import (
    VOCAB_SIZE,
    Background,
    Checkpoint,
    Checkpoints,
    Starter,
    check_aligned,
    check_greedy,
    check_samples_agree,
    greedy,
    num_same,
    random_ids,
    start_engine,
    wait_for,
)

TOLERANCE = 1e-3
"""Of float32 log-probabilities on the device and on the CPU."""
FP8_TOLERANCE = 0.05
"""Mean |difference| of log-probabilities with fp8 keys and values to those with bfloat16 ones: e4m3 rounds to 1/16 of a
value at worst, which on such models comes to about 0.03 (an emulation in torch gives 0.013 to 0.027)."""

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 2.5},
    "top-k 1": {"top_k": 1},
    "top-k": {"top_k": 50},
    "top-k over the vocabulary": {"top_k": VOCAB_SIZE + 7},
    "top-p": {"top_p": 0.9},
    "top-p tiny": {"top_p": 1e-6},
    "min-p": {"min_p": 0.1},
    "all thresholds": {"temperature": 1.5, "top_k": 200, "top_p": 0.8, "min_p": 0.01},
    "repetition": {"repetition_penalty": 1.3},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.7},
    "all penalties, greedy": {
        "temperature": 0.0,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
    },
    "negative penalties": {"repetition_penalty": 0.8, "presence_penalty": -1.0, "top_k": 20},
    "bias": {"logit_bias": {5: 9.0, 77: 8.5, 4999: 8.0, 6: -100.0}},
    "bias, greedy": {"temperature": 0.0, "logit_bias": {i: -5.0 for i in range(0, VOCAB_SIZE, 2)}},
    "minimum": {"min_new_tokens": 12, "stop_token_ids": tuple(range(0, VOCAB_SIZE, 5))},
    "everything": {
        "temperature": 0.9,
        "top_k": 100,
        "top_p": 0.95,
        "min_p": 0.001,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.1,
        "logit_bias": {9: 2.0},
        "min_new_tokens": 3,
        "stop_token_ids": (10, 11),
        "seed": (1 << 64) - 1,
    },
}
ASKED = [0, 17, 4096, VOCAB_SIZE - 1]


@pytest.fixture(scope="module")
def checkpoint(checkpoints: Checkpoints) -> Checkpoint:
    return checkpoints.get()


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoint) -> Iterator[Engine]:
    """On the device; left as it was by every test that takes it."""
    with start_engine(checkpoint.folder, dtype="float32") as shared:
        yield shared


@pytest.fixture(scope="module")
def cpu_engine(checkpoint: Checkpoint) -> Iterator[Engine]:
    with start_engine(checkpoint.folder, dtype="float32", device="cpu") as shared:
        yield shared


def requests(num_tokens: int = 24) -> tuple[list[list[int]], list[SamplingParams]]:
    """Each kind for a short prompt and for a longer one that repeats its tokens."""
    choose = random.Random(8)
    prompts, params = [], []
    for index, kind in enumerate(KINDS.values()):
        settings = {"seed": index, "max_new_tokens": num_tokens, "ignore_eos": True, **kind}
        for prompt in (random_ids(choose, 4), random_ids(choose, 30) * 3):
            prompts.append(prompt)
            params.append(SamplingParams(**settings))
    return prompts, params


@pytest.mark.parametrize("mode", ["raw", "temperature", "sampled"])
def test_every_kind_of_sampling_and_logprob(
    checkpoint: Checkpoint, engine: Engine, cpu_engine: Engine, mode: LogprobMode
) -> None:
    prompts, params = requests()
    options: dict[str, Any] = {
        "logprob_mode": mode,
        "prompt_logprob_mode": mode,
        "return_prompt_logprobs": True,
        "top_logprobs": 5,
        "logprob_token_ids": ASKED,
    }
    found, expected = (
        each.generate(input_ids=prompts, sampling_params=params, **options) for each in (engine, cpu_engine)
    )
    check_samples_agree(checkpoint, prompts, params, found, expected, TOLERANCE)
    for one, other in zip(found, expected, strict=True):
        check_prompt_scores(one, other)
        same = num_same(one.token_ids, other.token_ids)
        check_tables(one.top_logprobs[:same], other.top_logprobs[:same])
        check_tables(one.token_ids_logprobs[:same], other.token_ids_logprobs[:same])


def check_prompt_scores(one: Generation, other: Generation) -> None:
    assert one.prompt_logprobs[0] is None and other.prompt_logprobs[0] is None
    torch.testing.assert_close(
        torch.tensor(one.prompt_logprobs[1:]), torch.tensor(other.prompt_logprobs[1:]), atol=TOLERANCE, rtol=0
    )
    check_tables(one.prompt_top_logprobs, other.prompt_top_logprobs)
    check_tables(one.prompt_token_ids_logprobs, other.prompt_token_ids_logprobs)


def check_tables(found: Any, expected: Any) -> None:
    """Per position the same values in order; ids may differ only where another value is as great."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if one is None or other is None:
            assert one is None and other is None
            continue
        values = sorted(other.values(), reverse=True)
        torch.testing.assert_close(
            torch.tensor(sorted(one.values(), reverse=True)), torch.tensor(values), atol=TOLERANCE, rtol=0
        )
        for token in other.keys() - one.keys():
            assert abs(other[token] - values[-1]) < TOLERANCE or other[token] == values[-1], "a tie at the end"


def test_features_do_not_touch_their_neighbours(checkpoint: Checkpoint, engine: Engine) -> None:
    """Greedy requests among every other kind, on the pages and slots that those used before."""
    prompts, params = requests()
    plain = [random_ids(random.Random(100 + i), 50) for i in range(len(prompts))]
    for _ in range(2):
        found = engine.generate(
            input_ids=[each for pair in zip(prompts, plain, strict=True) for each in pair],
            sampling_params=[each for one in params for each in (one, greedy(24))],
        )
        for prompt, piece in zip(plain, found[1::2], strict=True):
            check_greedy(checkpoint, prompt, piece, 1e-4)


def test_score_equals_generate(checkpoint: Checkpoint, engine: Engine) -> None:
    prompts = [random_ids(random.Random(i), length) for i, length in enumerate((1, 2, 40, 1300))]
    pieces = engine.score(input_ids=prompts, top_logprobs=2)
    generated = engine.generate(
        input_ids=prompts, sampling_params=greedy(4), return_prompt_logprobs=True, top_logprobs=2
    )
    for piece, other, prompt in zip(pieces, generated, prompts, strict=True):
        assert piece.token_ids == [] and piece.finish_reason == "length"
        assert len(piece.prompt_logprobs) == len(prompt) == len(piece.prompt_top_logprobs)
        check_prompt_scores(piece, other)


def test_a_long_context(checkpoint: Checkpoint, engine: Engine) -> None:
    """6,000 tokens in many chunks, then decode over them."""
    prompt = random_ids(random.Random(9), 6000)
    [piece] = engine.generate(input_ids=[prompt], sampling_params=greedy(32), return_prompt_logprobs=True)
    check_greedy(checkpoint, prompt, piece, 1e-4)
    expected = torch.log_softmax(checkpoint.logits(prompt)[:-1], -1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(piece.prompt_logprobs[1:]), expected, atol=1e-4, rtol=0)
    short = [random_ids(random.Random(20 + i), 10) for i in range(30)]
    for text, each in zip(
        [*short, prompt], engine.generate(input_ids=[*short, prompt], sampling_params=greedy(16)), strict=True
    ):
        check_greedy(checkpoint, text, each, 1e-4)


@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_keys_and_values_in_fp8(checkpoints: Checkpoints, start: Starter, variant: str) -> None:
    narrow = checkpoints.get(variant, dtype=torch.bfloat16)
    texts = [random_ids(random.Random(i), 500) for i in range(4)]
    values = []
    for kv_dtype in ("auto", "fp8_e4m3"):
        engine = start(narrow, kv_dtype=kv_dtype, cuda_graphs=kv_dtype != "auto")
        values.append(torch.tensor([piece.prompt_logprobs[1:] for piece in engine.score(input_ids=texts)]))
        pieces = engine.generate(input_ids=[text[:100] for text in texts], sampling_params=greedy(50))
        assert all(len(piece.token_ids) == 50 for piece in pieces)
    difference = float((values[0] - values[1]).abs().mean())
    assert 0 < difference < FP8_TOLERANCE


def outputs(engine: Engine, checkpoint: Checkpoint) -> None:
    """Greedy tokens and values are those of these weights."""
    prompts = [random_ids(random.Random(50 + i), 20 + 30 * i) for i in range(6)]
    for prompt, piece in zip(prompts, engine.generate(input_ids=prompts, sampling_params=greedy(24)), strict=True):
        check_greedy(checkpoint, prompt, piece, 1e-4)


@pytest.mark.parametrize("mode", ["shadow", "inplace", "disk"])
def test_an_update_equals_a_cold_load(checkpoints: Checkpoints, start: Starter, mode: Any) -> None:
    """There and back, under captured graphs: the addresses of live weights do not change."""
    old, new = checkpoints.get(), checkpoints.get(seed=1)
    engine = start(old, dtype="float32", cuda_graphs=True)
    digests = {}
    for version, target in (("old", None), ("new", new), ("old again", old)):
        if target is not None and mode == "disk":
            engine.update_weights_from_disk(target.folder, version=version)
        elif target is not None:
            report = engine.update_weights_from_tensor(target.named_tensors(), version=version, mode=mode)
            assert report.mode == mode and report.version == version
        outputs(engine, target or old)
        digests[version] = engine.digest()
    engine.shutdown()
    cold = start(new, dtype="float32", cuda_graphs=False)
    assert digests["new"] == cold.digest() != digests["old"] == digests["old again"]


def test_wide_tensors_into_narrow_weights(checkpoints: Checkpoints, start: Starter) -> None:
    """A float32 trainer pushes to a bfloat16 engine: what a cold load of the bfloat16 checkpoint has."""
    old, new = (checkpoints.get(seed=seed, dtype=torch.bfloat16) for seed in (0, 1))
    engine = start(old, cuda_graphs=False)
    engine.update_weights_from_tensor(new.named_tensors(), version="new")
    found = engine.digest()
    name, tensor = new.named_tensors()[3]
    assert torch.equal(engine.get_weights_by_name(name).float(), tensor.cpu())
    assert found == start(new, cuda_graphs=False).digest()


@pytest.mark.parametrize("mode", ["shadow", "inplace"])
def test_an_update_of_the_head_alone_keeps_the_rest(checkpoints: Checkpoints, start: Starter, mode: Any) -> None:
    old, new = checkpoints.get(), checkpoints.get(seed=1)
    engine = start(old, dtype="float32", cuda_graphs=True)
    before = engine.digest()
    engine.update_weights_from_tensor(head_of(new), version="head", mode=mode, partial=True)
    mixed = engine.digest()
    engine.update_weights_from_tensor(head_of(old), version="old again", mode=mode, partial=True)
    outputs(engine, old)
    assert engine.digest() == before != mixed
    engine.shutdown()
    cold = start(new, dtype="float32", cuda_graphs=False)
    rest = [(name, tensor) for name, tensor in old.named_tensors() if name != "lm_head.weight"]
    cold.update_weights_from_tensor(rest, version="mixed", partial=True)
    assert cold.digest() == mixed


def head_of(checkpoint: Checkpoint) -> list[tuple[str, torch.Tensor]]:
    """The tensor of the head, by itself."""
    return [(name, tensor) for name, tensor in checkpoint.named_tensors() if name == "lm_head.weight"]


@pytest.mark.parametrize("in_flight", ["keep", "recompute", "abort", "drain"])
def test_requests_in_flight_across_an_update(checkpoints: Checkpoints, start: Starter, in_flight: Any) -> None:
    old, new = checkpoints.get(), checkpoints.get(seed=1)
    engine = start(old, dtype="float32", cuda_graphs=True)
    num_tokens = 800 if in_flight == "drain" else 4000
    call = long_call(engine, num_tokens)
    report = engine.update_weights_from_tensor(new.named_tensors(), version="new", in_flight=in_flight)
    outputs(engine, new)
    seen = engine.metrics()["num_generated_tokens"]
    if in_flight in ("keep", "recompute"):
        wait_for(lambda: engine.metrics()["num_generated_tokens"] > seen + 40)
        engine.abort("long_", prefix=True)
    assert report.num_aborted == (4 if in_flight == "abort" else 0)
    for piece in call.answer():
        check_aligned(piece)
        versions = [version for version, _ in piece.version_spans]
        assert versions == (["default", "new"] if in_flight in ("keep", "recompute") else ["default"])
        assert piece.finish_reason == ("length" if in_flight == "drain" else "abort")
    outputs(engine, new)


LONG_PROMPTS = [[10 + i] * 9 for i in range(4)]


def long_call(engine: Engine, num_tokens: int = 4000) -> Background:
    """Four greedy requests, some tokens into their answers."""
    before = engine.metrics()["num_generated_tokens"]
    call = Background(engine, input_ids=LONG_PROMPTS, sampling_params=greedy(num_tokens), request_id="long")
    wait_for(lambda: engine.metrics()["num_generated_tokens"] > before + 40)
    return call


@pytest.mark.parametrize("mode", ["keep", "recompute", "abort", "drain"])
def test_pause_and_resume(checkpoint: Checkpoint, engine: Engine, mode: PauseMode) -> None:
    num_tokens = 1200
    call = long_call(engine, num_tokens)
    engine.pause(mode)
    held = engine.metrics()["num_generated_tokens"]
    late = Background(engine, input_ids=[[5, 6, 7]], sampling_params=greedy(4))
    wait_for(lambda: engine.metrics()["num_waiting"] > 0)
    assert engine.metrics()["num_generated_tokens"] == held and late.is_running
    assert call.is_running == (mode in ("keep", "recompute"))
    engine.resume()
    assert len(late.answer()[0].token_ids) == 4
    for prompt, piece in zip(LONG_PROMPTS, call.answer(), strict=True):
        check_aligned(piece)
        if mode == "abort":
            assert piece.finish_reason == "abort" and len(piece.token_ids) < num_tokens
        else:
            assert piece.finish_reason == "length" and len(piece.token_ids) == num_tokens
        check_greedy(checkpoint, prompt, piece, 1e-4)
    assert engine.metrics()["num_used_tokens"] == 0


def test_an_abort_returns_what_there_is(checkpoint: Checkpoint, engine: Engine) -> None:
    call = long_call(engine)
    assert engine.abort("long_2") == 1
    assert engine.abort("long_2") in (0, 1), "the end of the first may still be under way"
    engine.abort("long_", prefix=True)
    for prompt, piece in zip(LONG_PROMPTS, call.answer(), strict=True):
        check_aligned(piece)
        assert piece.finish_reason == "abort" and piece.token_ids
        check_greedy(checkpoint, prompt, piece, 1e-4)
    wait_for(lambda: engine.metrics()["num_used_tokens"] == 0)
