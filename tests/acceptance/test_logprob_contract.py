"""Ask 4: one written meaning of a log-probability, against a float64 reference over a grid of sampling settings."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import PreTrainedModel

from headrace import Engine, RequestError, SamplingParams
from headrace.types.sampling_params import LogprobMode
from tests.acceptance.conftest import tiny_model

GRID = list(itertools.product([0.0, 0.5, 1.0, 1.7], [1.0, 0.9, 0.5], [-1, 1, 8], [0.0, 0.1]))
PROMPT = [5, 17, 40, 3, 61]


@functools.cache
def reference_model() -> PreTrainedModel:
    return tiny_model(0).double()


def reference_logits(token_ids: list[int]) -> npt.NDArray[np.float64]:
    """float64 logits [len, vocab] of a teacher-forced pass."""
    with torch.inference_mode():
        logits: torch.Tensor = reference_model()(torch.tensor([token_ids])).logits[0]
    return logits.numpy()


def log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max()
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result


def expected(logits: npt.NDArray[np.float64], mode: str, params: SamplingParams) -> npt.NDArray[np.float64]:
    """The documented meaning: processors in the order temperature, top-k, top-p, min-p."""
    if mode == "raw" or (mode == "temperature" and params.temperature == 0):
        return log_softmax(logits)
    if mode == "temperature":
        return log_softmax(logits / params.temperature)
    if params.temperature == 0:
        return np.where(np.arange(len(logits)) == logits.argmax(), 0.0, -np.inf)
    scaled = logits / params.temperature
    kept = np.ones(len(logits), dtype=bool)
    if params.top_k > 0:
        kept &= scaled >= np.sort(scaled)[-params.top_k]
    probabilities = np.exp(log_softmax(np.where(kept, scaled, -np.inf)))
    if params.top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        kept[order[before >= params.top_p]] = False
        probabilities = np.exp(log_softmax(np.where(kept, scaled, -np.inf)))
    kept &= probabilities >= params.min_p * probabilities.max()
    return log_softmax(np.where(kept, scaled, -np.inf))


@pytest.mark.parametrize("mode", ["raw", "temperature", "sampled"])
def test_every_mode_over_the_grid(engine_on: Callable[..., Engine], mode: LogprobMode) -> None:
    engine = engine_on()
    params = [
        SamplingParams(temperature=t, top_p=p, top_k=k, min_p=m, max_new_tokens=6, ignore_eos=True, seed=i)
        for i, (t, p, k, m) in enumerate(GRID)
    ]
    results = engine.generate(input_ids=[PROMPT] * len(params), sampling_params=params, logprob_mode=mode)
    for piece, wanted in zip(results, params, strict=True):
        assert piece.logprob_mode == mode, "the mode is echoed"
        logits = reference_logits(PROMPT + piece.token_ids)
        for position, (token, value) in enumerate(zip(piece.token_ids, piece.logprobs, strict=True)):
            reference = expected(logits[len(PROMPT) - 1 + position], mode, wanted)[token]
            assert abs(value - reference) < 1e-3, (mode, wanted, position)


def test_prompt_logprobs_are_raw_by_default_and_say_so(engine_on: Callable[..., Engine]) -> None:
    [piece] = engine_on().score(input_ids=[PROMPT], sampling_params=SamplingParams(temperature=0.5, max_new_tokens=0))
    logits = reference_logits(PROMPT)
    assert piece.prompt_logprob_mode == "raw"
    assert piece.prompt_logprobs[0] is None
    for position in range(1, len(PROMPT)):
        value = piece.prompt_logprobs[position]
        assert value is not None
        assert abs(value - log_softmax(logits[position - 1])[PROMPT[position]]) < 1e-4


def test_unknown_fields_are_refused(engine_on: Callable[..., Engine]) -> None:
    with pytest.raises(RequestError, match="temprature"):
        engine_on().generate(input_ids=PROMPT, sampling_params={"temprature": 1.0})
