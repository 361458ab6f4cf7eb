"""The whole engine against transformers, for every family: greedy tokens, output and prompt log-probabilities, under
chunking, prefix hits, preemption, overlap and any page size; and `numerics="invariant"` bit for bit."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from headrace import Engine, Generation, SamplingParams
from tests.parity.models import LLAMA3_ROPE, VOCAB_SIZE, make_model, reference_logits

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3_ROPE, "num_key_value_heads": 1},
    "mistral": {"sliding_window": None, "num_key_value_heads": 4},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, "norm_topk_prob": False},
    "mixtral": {},
}
NUM_TOKENS = 24
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=NUM_TOKENS, ignore_eos=True)
TOLERANCE = 1e-4
# Each setting forces what its name says; `forced` is the counter that proves it.
SETTINGS: dict[str, tuple[dict[str, Any], str | None]] = {
    "plain": ({}, None),
    "chunked": ({"max_num_batched_tokens": 7, "page_size": 1}, "num_chunked_prompts"),
    "preempted": ({"kv_pool_tokens": 200, "page_size": 4, "prefix_cache": False}, "num_preemptions"),
    "evicted": ({"kv_pool_tokens": 256, "page_size": 4}, "num_evicted_pages"),
    "overlapped": ({"overlap_depth": 1, "page_size": 64}, "num_overshoot_tokens"),
}
# Each family as it comes, and each setting with half of them: what a setting forces knows no family.
PAIRS = [("plain", family) for family in VARIANTS] + [
    (setting, family)
    for number, setting in enumerate(SETTINGS)
    for family in [*VARIANTS][number % 2 :: 2]
    if setting != "plain"
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[PreTrainedModel, Path]]:
    made = {}
    for family, overrides in VARIANTS.items():
        model = make_model(family, **overrides)
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        made[family] = (model, folder)
    return made


@pytest.fixture
def start() -> Iterator[Callable[..., Engine]]:
    started: list[Engine] = []

    def build(folder: Path, **settings: Any) -> Engine:
        defaults: dict[str, Any] = {"inprocess": True, "skip_tokenizer_init": True, "num_threads": 1}
        started.append(Engine(model=str(folder), **{**defaults, **settings}))
        return started[-1]

    yield build
    for engine in started:
        engine.shutdown()


def prompts() -> list[list[int]]:
    """Different lengths; the last three share 40 tokens."""
    choose = random.Random(5)
    made = [[choose.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in (1, 9, 30, 61)]
    shared = [choose.randrange(3, VOCAB_SIZE) for _ in range(40)]
    return made + [shared + [token] for token in (7, 8, 9)]


@functools.cache
def known_logits(model: PreTrainedModel, token_ids: tuple[int, ...]) -> torch.Tensor:
    """The reference's: under every setting the same sequences are asked for."""
    return reference_logits(model, list(token_ids))


def check(model: PreTrainedModel, prompt: list[int], piece: Generation) -> None:
    """Greedy tokens equal up to the first position whose top-two gap is below the tolerance; all values close."""
    logits = known_logits(model, tuple(prompt + piece.token_ids))
    logprobs = torch.log_softmax(logits, -1)
    assert len(piece.token_ids) == NUM_TOKENS
    for index, (token, value) in enumerate(zip(piece.token_ids, piece.logprobs, strict=True)):
        row = logits[len(prompt) - 1 + index]
        assert abs(value - float(logprobs[len(prompt) - 1 + index, token])) < TOLERANCE
        if token != int(row.argmax()):
            gap = float(row.max() - row[token])
            assert gap < TOLERANCE, f"token {index} is not the greedy one by {gap}"


@pytest.mark.parametrize(("setting", "family"), PAIRS)
def test_greedy_tokens_and_logprobs_equal_transformers(
    models: dict[str, tuple[PreTrainedModel, Path]], start: Callable[..., Engine], family: str, setting: str
) -> None:
    model, folder = models[family]
    settings, forced = SETTINGS[setting]
    engine = start(folder, **settings)
    stops = SamplingParams(
        temperature=0.0, max_new_tokens=NUM_TOKENS, stop_token_ids=tuple(range(3, 60)), ignore_eos=True
    )
    engine.generate(input_ids=prompts(), sampling_params=stops)  # ends early: overshoot under overlap, pages to evict
    for _ in range(2):
        for prompt, piece in zip(prompts(), engine.generate(input_ids=prompts(), sampling_params=GREEDY), strict=True):
            check(model, prompt, piece)
    assert forced is None or engine.metrics()[forced] > 0, f"{setting} did not happen"


@pytest.mark.parametrize("family", VARIANTS)
def test_prompt_logprobs_equal_transformers_also_behind_a_prefix_hit(
    models: dict[str, tuple[PreTrainedModel, Path]], start: Callable[..., Engine], family: str
) -> None:
    model, folder = models[family]
    engine = start(folder, page_size=8, max_num_batched_tokens=16)
    prompt = prompts()[3]
    expected = torch.log_softmax(reference_logits(model, prompt), -1)
    for begin in (0, 33):
        [piece] = engine.score(input_ids=[prompt], logprob_start=begin)
        assert len(piece.prompt_logprobs) == len(prompt) and piece.token_ids == []
        assert piece.num_cached_tokens == (0 if begin == 0 else 32)
        for position in range(len(prompt)):
            value = piece.prompt_logprobs[position]
            if position == 0 or position < begin:
                assert value is None
            else:
                assert value is not None
                assert abs(value - float(expected[position - 1, prompt[position]])) < TOLERANCE


def bits(pieces: list[Generation]) -> list[tuple[list[int], bytes]]:
    return [(piece.token_ids, np.asarray(piece.logprobs).tobytes()) for piece in pieces]


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "mixtral"])
def test_invariant_numerics_are_the_same_bits_whatever_runs_beside(
    models: dict[str, tuple[PreTrainedModel, Path]], start: Callable[..., Engine], family: str
) -> None:
    _, folder = models[family]
    asked = prompts()
    params = [SamplingParams(max_new_tokens=8, temperature=0.9, seed=i, ignore_eos=True) for i in range(len(asked))]
    alone = start(folder, numerics="invariant", prefix_cache=False)
    expected = [
        bits(alone.generate(input_ids=prompt, sampling_params=each))[0]
        for prompt, each in zip(asked, params, strict=True)
    ]
    for settings in (
        {"page_size": 1, "max_num_batched_tokens": 5},
        {"page_size": 16, "overlap_depth": 1},
        {"page_size": 64, "max_num_batched_tokens": 64},
        {"page_size": 4, "kv_pool_tokens": 160},
    ):
        engine = start(folder, numerics="invariant", **settings)
        for order in (range(len(asked)), reversed(range(len(asked)))):
            places = list(order)
            found = engine.generate(input_ids=[asked[i] for i in places], sampling_params=[params[i] for i in places])
            assert bits(found) == [expected[i] for i in places], settings
        if settings["page_size"] <= 16:
            assert engine.metrics()["num_cached_tokens"] > 0, "the second round was warm"
