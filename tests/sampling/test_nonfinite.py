"""A row of logits that is not finite comes out as NaN in every mode and on every path, and harms no other row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from headrace.sampling import Sampler
from headrace.sampling.device_sampler import DeviceSampler
from headrace.types.plan import SlotInit
from headrace.types.request import TokenSampling
from headrace.types.sampling_params import GREEDY_TEMPERATURE, MAX_LOGIT_BIAS, MIN_REPETITION_PENALTY, LogprobMode
from tests.sampling.device_pair import DEVICE, MODES, VOCAB, Pair, make_init, normal

MASKED = 7
FAULTS = ["one NaN", "NaN where it is masked", "all NaN", "inf", "inf where it is masked", "a block of NaN", "all -inf"]
SAMPLINGS = {
    "greedy": TokenSampling(temperature=0.0),
    "plain": TokenSampling(),
    "hot": TokenSampling(temperature=1.7),
    "top-k": TokenSampling(top_k=5),
    "top-p": TokenSampling(top_p=0.7),
    "min-p": TokenSampling(min_p=0.1, temperature=0.6),
    "all three": TokenSampling(top_k=50, top_p=0.8, min_p=0.01),
    "penalties": TokenSampling(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2),
    "greedy with penalties": TokenSampling(temperature=0.0, presence_penalty=0.5),
    "bias": TokenSampling(logit_bias=((3, 2.0), (9, -100.0)), top_k=20),
}

# The interpreter is numpy, which remarks on the arithmetic of what is not finite.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def broken(row: np.ndarray, fault: str) -> np.ndarray:
    row = row.copy()
    if fault == "one NaN":
        row[VOCAB - 1] = math.nan
    elif fault == "NaN where it is masked":
        row[MASKED] = math.nan
    elif fault == "inf where it is masked":
        row[MASKED] = math.inf
    elif fault == "inf":
        row[123] = math.inf
    elif fault == "a block of NaN":
        row[:4096] = math.nan
    else:
        row[:] = math.nan if fault == "all NaN" else -math.inf
    return row


def masked(slot: int, sampling: str, mode: LogprobMode) -> SlotInit:
    """A sequence whose stop id has no probability yet."""
    return make_init(slot, SAMPLINGS[sampling], mode=mode, stop_ids=(MASKED,), min_length=20)


def sampled_on_device(sampler: DeviceSampler, logits: np.ndarray, position: int) -> tuple[list[float], list[int]]:
    """Log-probabilities and tokens of all slots, a row each."""
    slots, positions = np.arange(len(logits), dtype=np.int32), np.full(len(logits), position, np.int32)
    tokens = torch.full((len(logits),), -5, dtype=torch.int32, device=DEVICE)
    logprobs = torch.full((len(logits),), 5.0, device=DEVICE)
    given = (torch.from_numpy(logits).to(DEVICE), torch.from_numpy(slots).to(DEVICE))
    results = (torch.from_numpy(positions).to(DEVICE), tokens, logprobs)
    path = sampler.path(slots, positions)
    if path == "eager":
        sampler.sample_eager(*given, *results, slots, positions)
    else:
        sampler.sample(*given, *results, plain=path == "plain")
    return logprobs.tolist(), tokens.tolist()


@pytest.mark.parametrize(
    ("sampling", "mode"),
    [(sampling, mode) for number, sampling in enumerate(SAMPLINGS) for mode in ("sampled", MODES[number % 2])],
)
def test_a_sampled_row_that_is_not_finite_is_nan(sampling: str, mode: LogprobMode) -> None:
    """Each between two rows that are finite."""
    num_rows = 2 * len(FAULTS) + 1
    fine = normal(num_rows, 3)
    logits = fine.copy()
    for number, fault in enumerate(FAULTS):
        logits[2 * number + 1] = broken(logits[2 * number + 1], fault)
    slots, positions = torch.arange(num_rows), torch.full((num_rows,), 4)
    found = []
    for shown in (logits, fine):
        sampler = Sampler(VOCAB, num_rows)
        for slot in range(num_rows):
            sampler.enter(masked(slot, sampling, mode))
        found.append(sampler.sample(torch.from_numpy(shown), slots, positions))
    tokens, logprobs = found[0].token_ids.numpy(), found[0].logprobs.numpy()
    assert np.isnan(logprobs[1::2]).all(), [FAULTS[i] for i in np.flatnonzero(~np.isnan(logprobs[1::2]))]
    assert ((tokens >= 0) & (tokens < VOCAB)).all()
    np.testing.assert_array_equal(tokens[::2], found[1].token_ids.numpy()[::2])
    np.testing.assert_array_equal(logprobs[::2], found[1].logprobs.numpy()[::2])
    assert np.isfinite(logprobs[::2]).all()


@pytest.mark.parametrize("samplings", [("greedy", "plain"), ("all three",), ("greedy with penalties", "bias")], ids=str)
def test_a_sampled_row_that_is_not_finite_is_nan_on_the_device(samplings: tuple[str, ...]) -> None:
    faults = ("", "one NaN", "NaN where it is masked", "inf", "all -inf")
    mode: LogprobMode = "sampled"  # the one that is of the processed row, where it is processed
    rows = [(sampling, fault) for sampling in samplings for fault in faults]
    logits = normal(len(rows), 3)
    sampler = DeviceSampler(VOCAB, len(rows), len(rows), DEVICE)
    for row, (sampling, fault) in enumerate(rows):
        logits[row] = broken(logits[row], fault) if fault else logits[row]
        init = masked(row, sampling, mode) if "masked" in fault else make_init(row, SAMPLINGS[sampling], mode=mode)
        sampler.write_slots(torch.from_numpy(sampler.enter(init)[None]).to(DEVICE))
    for case, value, token in zip(rows, *sampled_on_device(sampler, logits, 4), strict=True):
        assert math.isnan(value) == bool(case[1]) and 0 <= token < VOCAB, case


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sampling", ["greedy", "top-p", "bias"])
def test_a_scored_row_that_is_not_finite_is_nan(sampling: str, mode: LogprobMode) -> None:
    faults = ("one NaN", "inf", "all -inf")
    logits = normal(2 * len(faults) + 1, 5)
    for number, fault in enumerate(faults):
        logits[2 * number + 1] = broken(logits[2 * number + 1], fault)
    pair = Pair(VOCAB, len(logits))
    pair.enter(make_init(0, SAMPLINGS[sampling], prompt_mode=mode))
    targets = logits.argmax(axis=1) if sampling == "greedy" else np.full(len(logits), 55)
    on_cpu, _ = pair.cpu.score(torch.from_numpy(logits), torch.from_numpy(targets), 0)
    on_device, _ = pair.device.score(
        torch.from_numpy(logits).to(DEVICE), torch.from_numpy(targets).to(DEVICE), 0
    ).finish()
    for values in (on_cpu.numpy(), on_device):
        assert np.isnan(values[1::2]).all() and not np.isnan(values[::2]).any()


EXTREMES: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (MIN_REPETITION_PENALTY, 100.0),
    "presence_penalty": (-100.0, 100.0),
    "frequency_penalty": (-100.0, 100.0),
    "logit_bias": tuple(tuple((token, value) for token in range(MAX_LOGIT_BIAS)) for value in (-1e4, 1e4)),
    "top_p": (1e-300,),
    "top_k": (1,),
    "min_p": (1e-300, 1.0),
}


TRUNCATIONS = ("top_p", "top_k", "min_p")
TEMPERATURES = [
    *((name, 0.0) for name in EXTREMES if name not in TRUNCATIONS),
    *((name, GREEDY_TEMPERATURE) for name in EXTREMES),
    ("logit_bias", 1e4),
]
"""What is divided by the least may overflow; by the greatest, nothing. A greedy row is not truncated."""


@pytest.mark.parametrize(("name", "temperature"), TEMPERATURES)
def test_no_parameter_makes_a_finite_row_one_that_is_not(name: str, temperature: float) -> None:
    """The request would end as if the weights were at fault."""
    logits = normal(1, 3, 97).repeat(3, axis=0) * 10
    best = tuple(np.argsort(-logits[0])[:40].tolist())
    pair = Pair(97, 3, 3)
    for value in EXTREMES[name]:
        sampling = TokenSampling(temperature, **{name: value})
        for slot, mode in enumerate(MODES):
            stops = best[:9]
            pair.enter(make_init(slot, sampling, prompt=best, output=stops, mode=mode, stop_ids=stops, min_length=99))
        on_cpu = pair.cpu.sample(torch.from_numpy(logits), torch.arange(3), torch.full((3,), 49))
        for logprobs, tokens in (
            (on_cpu.logprobs.tolist(), on_cpu.token_ids.tolist()),
            sampled_on_device(pair.device, logits, 49),
        ):
            assert np.isfinite(logprobs).all() and not set(tokens) & set(stops), value


def test_masks_and_biases_of_minus_infinity_are_no_fault() -> None:
    """As long as something is left to draw."""
    bias = tuple((token, -math.inf) for token in range(VOCAB) if token % 2)
    small = make_init(0, TokenSampling(logit_bias=bias[:300]), mode="sampled", stop_ids=(2, 4), min_length=20)
    pair = Pair(VOCAB, 2)
    pair.enter(small)
    logits = normal(1, 1)
    logits[0, 10] = -math.inf
    pair.step(logits, [0], [4])
    found = pair.cpu.sample(torch.from_numpy(logits), torch.tensor([0]), torch.tensor([5]))
    assert torch.isfinite(found.logprobs).all()
