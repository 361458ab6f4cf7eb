"""Where nuclei end: brackets that hold the end with little beside it, and rows made to be guessed wrong."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from headrace.kernels.triton.logits_processors import PROCESSORS_SIZE, ProcessedRows, SlotProcessors, process_rows
from headrace.kernels.triton.nucleus_bracket import FIRST, KEPT, SAMPLE, TOP, WANTED
from headrace.kernels.triton.row_survey import RowSurvey
from headrace.kernels.triton.slot_params import MIN_P, NUM_PARAMS, TEMPERATURE, TOP_P
from headrace.kernels.triton.threshold_search import ThresholdWorkspace, find_thresholds
from headrace.sampling.thresholds import truncation_threshold

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 40_016
NEIGHBOURS = 8


class Found(NamedTuple):
    """Thresholds [n]; of a row what values >= a, b and c weigh, in units of what is wanted; numbers from a and b."""

    thresholds: np.ndarray
    weights: np.ndarray
    nums: np.ndarray


def found_in(values: np.ndarray, cases: list[tuple[float, float]]) -> Found:
    """Of rows with a temperature and a top_p each."""
    num_rows, vocab_size = values.shape
    params = torch.zeros(num_rows, NUM_PARAMS, device=DEVICE)
    params[:, [TEMPERATURE.value, TOP_P.value]] = torch.tensor(cases, device=DEVICE)
    params[:, MIN_P.value] = float("-inf")
    tables = SlotProcessors(
        torch.zeros(num_rows, PROCESSORS_SIZE, dtype=torch.int32, device=DEVICE),
        torch.zeros(num_rows, vocab_size, dtype=torch.int16, device=DEVICE),
    )
    logits = torch.from_numpy(values).to(DEVICE)
    slots = torch.arange(num_rows, dtype=torch.int32, device=DEVICE)
    processed, survey = ProcessedRows.make(num_rows, vocab_size, DEVICE), RowSurvey.make(num_rows, vocab_size, DEVICE)
    workspace = ThresholdWorkspace.make(num_rows, vocab_size, DEVICE)
    thresholds = torch.empty(num_rows, device=DEVICE)
    process_rows(logits, processed, survey, slots, slots, params, tables)
    find_thresholds(logits, params, slots, processed, survey, workspace, thresholds)
    found = workspace.bracket
    bracket = found.bracket_RW.cpu().numpy()
    weights = []
    for row, each, (temperature, _) in zip(values.astype(np.float64), bracket, cases, strict=True):
        ends = each[FIRST.value : FIRST.value + 3, None]
        weight = np.exp((row - each[TOP.value]) / temperature)
        weights.append((weight * (row >= ends)).sum(1) / each[WANTED.value])
    return Found(thresholds.cpu().numpy(), np.stack(weights), found.nums_R2BN[..., 0].cpu().numpy())


def assert_same_left(values: np.ndarray, found: Found, cases: list[tuple[float, float]]) -> None:
    for row, threshold, (temperature, top_p) in zip(values, found.thresholds, cases, strict=True):
        expected = truncation_threshold(row, temperature, 0, top_p, 0.0)
        np.testing.assert_array_equal(row >= threshold, row >= expected, f"{temperature} {top_p}")


def normal(num_rows: int, spread: float, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((num_rows, VOCAB)) * spread).astype(np.float32)


@pytest.mark.parametrize("spread", [0.64, 2.0, 6.0])
def test_a_bracket_holds_the_end_and_little_beside_it(spread: float) -> None:
    cases = [(1.0, 0.9), (0.7, 0.95), (1.0, 0.5)]
    values = normal(len(cases), spread, 1)
    found = found_in(values, cases)
    assert (found.weights[:, 0] >= 1.0).all() and (found.weights[:, 2] < 1.0).all()
    assert (found.nums.sum((1, 2)) < KEPT // 2).all()
    assert_same_left(values, found, cases)


def test_rows_that_mislead_the_guess_get_their_threshold_all_the_same() -> None:
    """The columns that no guess looks at hold more than all others, or what little is wanted beside them."""
    chosen = np.arange(SAMPLE // NEIGHBOURS) * (VOCAB // NEIGHBOURS) // (SAMPLE // NEIGHBOURS)
    is_seen = np.isin(np.arange(VOCAB) // NEIGHBOURS, chosen)
    values = normal(3, 0.01, 3)
    values[0, ~is_seen] += 3.0
    values[0, ~is_seen & (np.arange(VOCAB) % 3 > 0)] -= 3.0
    values[1, is_seen & (np.arange(VOCAB) % 3 == 0)] += 4.0
    values[1, ~is_seen] += 2.0
    values[2] = values[1]
    cases = [(1.0, 0.5), (1.0, 0.7), (1.0, 0.4)]
    found = found_in(values, cases)
    assert found.weights[0, 2] >= 1.0, "the end lies above what was guessed"
    assert found.weights[1, 0] < 1.0, "the end lies below what was guessed"
    assert_same_left(values, found, cases)


def test_equal_values_that_nothing_has_room_for() -> None:
    values = np.round(normal(2, 1.0, 4))
    cases = [(1.0, 0.9), (0.5, 0.6)]
    found = found_in(values, cases)
    assert (found.nums > KEPT // found.nums.shape[2]).any()
    assert_same_left(values, found, cases)
