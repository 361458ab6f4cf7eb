"""The engine on a device against transformers on the same device: greedy tokens and every log-probability."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from headrace import Engine
from tests.gpu.builders import (
    DEVICE,
    VARIANTS,
    Checkpoint,
    Checkpoints,
    Starter,
    check_greedy,
    greedy,
    load_reference,
    random_ids,
)

FLOAT32_TOLERANCE = 1e-4
"""Of logits and log-probabilities in float32, without TF32: ten times what different orders of summation come to."""
BFLOAT16_TOLERANCE = 0.02
"""Mean of |difference| of bfloat16 log-probabilities to those of the float32 model with the same weights."""
WITH_GRAPHS = ("llama", "qwen3")


def prompts() -> list[list[int]]:
    """Different lengths, one of several steps of prefill; the last three share 160 tokens."""
    choose = random.Random(5)
    made = [random_ids(choose, length) for length in (1, 2, 9, 30, 61, 130, 1500)]
    shared = random_ids(choose, 160)
    return made + [shared + random_ids(choose, length) for length in (1, 1, 40)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_and_logprobs_of_every_family(checkpoints: Checkpoints, start: Starter, variant: str) -> None:
    checkpoint = checkpoints.get(variant)
    engine = start(checkpoint, dtype="float32", cuda_graphs=variant in WITH_GRAPHS)
    for _ in range(2):
        found = engine.generate(input_ids=prompts(), sampling_params=greedy(48))
        for prompt, piece in zip(prompts(), found, strict=True):
            check_greedy(checkpoint, prompt, piece, FLOAT32_TOLERANCE)
    assert engine.metrics()["num_cached_tokens"] > 0, "the second round read cached prefixes"


def test_invariant_numerics_are_as_close(checkpoints: Checkpoints, start: Starter) -> None:
    checkpoint = checkpoints.get("qwen3")
    engine = start(checkpoint, dtype="float32", numerics="invariant")
    for prompt, piece in zip(prompts(), engine.generate(input_ids=prompts(), sampling_params=greedy(48)), strict=True):
        check_greedy(checkpoint, prompt, piece, FLOAT32_TOLERANCE)


@pytest.mark.parametrize("variant", ["llama-biases", "qwen3"])
def test_prompt_logprobs_also_behind_a_prefix_hit(checkpoints: Checkpoints, start: Starter, variant: str) -> None:
    checkpoint = checkpoints.get(variant)
    engine = start(checkpoint, dtype="float32", cuda_graphs=False, max_num_batched_tokens=256)
    prompt = random_ids(random.Random(1), 700)
    expected = next_logprobs(checkpoint.logits(prompt), prompt)
    for begin in (0, 400):
        [piece] = engine.score(input_ids=[prompt], logprob_start=begin)
        assert (piece.num_cached_tokens > 0) == (begin > 0)
        assert all(value is None for value in piece.prompt_logprobs[: max(1, begin)])
        found = torch.tensor(piece.prompt_logprobs[max(1, begin) :])
        torch.testing.assert_close(found, expected[max(1, begin) - 1 :], atol=FLOAT32_TOLERANCE, rtol=0)


@pytest.mark.parametrize("variant", ["llama", "qwen3"])
@pytest.mark.parametrize("numerics", ["fast", "invariant"])
def test_bfloat16_logprobs_are_as_good_as_those_of_transformers(
    checkpoints: Checkpoints, start: Starter, variant: str, numerics: str
) -> None:
    """Scored as prompts, and as generated tokens: those of decode steps."""
    checkpoint = checkpoints.get(variant, dtype=torch.bfloat16)
    engine = start(checkpoint, numerics=numerics, cuda_graphs=numerics == "fast")
    assert engine.resolved.dtype == "bfloat16", "the checkpoint's"
    choose = random.Random(2)
    texts = [random_ids(choose, 400) for _ in range(6)]
    check_bfloat16(checkpoint, texts, scored(engine, texts), first=1)
    pieces = engine.generate(input_ids=[text[:20] for text in texts], sampling_params=greedy(200))
    texts = [text[:20] + piece.token_ids for text, piece in zip(texts, pieces, strict=True)]
    check_bfloat16(checkpoint, texts, [torch.tensor(piece.logprobs) for piece in pieces], first=20)


def scored(engine: Engine, texts: list[list[int]]) -> list[Tensor]:
    return [torch.tensor(piece.prompt_logprobs[1:]) for piece in engine.score(input_ids=texts)]


def check_bfloat16(checkpoint: Checkpoint, texts: list[list[int]], found: list[Tensor], first: int) -> None:
    """`found` are the engine's values of each text from position `first` on."""
    narrow = load_reference(checkpoint.folder, torch.bfloat16)
    ours, theirs = [], []
    for text, values in zip(texts, found, strict=True):
        exact = next_logprobs(checkpoint.logits(text), text)[first - 1 :]
        with torch.inference_mode():
            rounded = narrow(torch.tensor([text], device=DEVICE)).logits[0].float().cpu()
        ours.append((values - exact).abs())
        theirs.append((next_logprobs(rounded, text)[first - 1 :] - exact).abs())
    mean, their_mean = float(torch.cat(ours).mean()), float(torch.cat(theirs).mean())
    assert 0 < mean < BFLOAT16_TOLERANCE
    assert mean < 1.5 * their_mean, f"{mean} against {their_mean}"


def next_logprobs(logits: Tensor, token_ids: list[int]) -> Tensor:
    """log_softmax of each token after the first, given those before it; float32 [len - 1]."""
    return torch.log_softmax(logits[:-1], -1).gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]
