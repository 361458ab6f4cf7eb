"""Top-k, top-p and min-p as a threshold, against the float64 definition with a full sort."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from headrace.sampling.thresholds import NOTHING_DROPPED, kth_greatest, truncation_threshold
from headrace.types.request import TokenSampling
from tests.sampling import reference

GRID = list(
    itertools.product(
        (0.01, 0.5, 1.0, 3.0, 50.0), (0, 1, 5, 400, 10**6), (1e-9, 0.3, 0.9, 0.999, 1.0), (0.0, 0.05, 1.0)
    )
)


def boundary_gap(row: np.ndarray, sampling: TokenSampling) -> float:
    """How far a cumulative mass is from top_p: below float32 rounding either side is right."""
    if sampling.top_p >= 1.0:
        return 1.0
    only_k = TokenSampling(temperature=sampling.temperature, top_k=sampling.top_k)
    keep = reference.kept(row, only_k)
    masses = np.cumsum(
        np.sort(np.exp(reference.log_softmax(np.where(keep, row / sampling.temperature, -np.inf))))[::-1]
    )
    return float(np.abs(masses - sampling.top_p).min())


@pytest.mark.parametrize("size", [1, 2, 50, 3001, 40000])
@pytest.mark.parametrize("spread", [0.05, 3.0])
def test_the_kept_set_is_the_reference_one(size: int, spread: float) -> None:
    random = np.random.default_rng(size)
    row = (random.standard_normal(size) * spread).astype(np.float32)
    num_compared = 0
    for temperature, top_k, top_p, min_p in GRID[:: 1 if size < 10000 else 7]:
        sampling = TokenSampling(temperature, top_k, top_p, min_p)
        wide = row.astype(np.float64)
        if (
            boundary_gap(wide, sampling) < 1e-6
            or np.abs(np.exp((wide - wide.max()) / temperature) - min_p).min() < 1e-7
        ):
            continue
        threshold = truncation_threshold(row, temperature, top_k, top_p, min_p)
        assert np.array_equal(row >= threshold, reference.kept(wide, sampling)), (temperature, top_k, top_p, min_p)
        num_compared += 1
    assert num_compared > 10


def test_equal_logits_are_kept_or_dropped_together() -> None:
    row = np.array([2.0, 1.0, 2.0, 1.0, 1.0, -3.0, -3.0], np.float32)
    assert (row >= truncation_threshold(row, 1.0, 1, 1.0, 0.0)).tolist() == [
        True,
        False,
        True,
        False,
        False,
        False,
        False,
    ]
    assert (row >= truncation_threshold(row, 1.0, 3, 1.0, 0.0)).sum() == 5
    assert (row >= truncation_threshold(row, 1.0, 0, 0.65, 0.0)).sum() == 5
    assert (row >= truncation_threshold(row, 1.0, 0, 0.1, 0.0)).sum() == 2


def test_the_most_probable_token_is_always_kept() -> None:
    row = np.array([1.0, 5.0, -np.inf], np.float32)
    assert (row >= truncation_threshold(row, 1e-6, 1, 1e-30, 1.0)).tolist() == [False, True, False]
    assert (row >= truncation_threshold(row, 1e4, 0, 1e-30, 0.0)).tolist() == [False, True, False]


@pytest.mark.parametrize("maximum", [10.0, 1e5, 5e7, -5e7])
def test_min_p_is_exact_between_two_floats(maximum: float) -> None:
    """Large logits are far from each other: the nearest to a threshold may be below it."""
    row = np.full(400, maximum, np.float32)
    for at in range(1, len(row)):
        row[at] = np.nextafter(row[at - 1], np.float32(-np.inf))
    step = float(row[0]) - float(row[1])
    for reach in np.arange(0.35, 7.0, 0.3):  # in such steps, and the temperature is one
        threshold = truncation_threshold(row, step, 0, 1.0, float(np.exp(-reach)))
        assert (row >= threshold).sum() == 1 + int(reach)


def test_top_p_counts_over_what_top_k_left() -> None:
    row = np.log(np.array([0.4, 0.3, 0.2, 0.1])).astype(np.float32)
    # Of the first two, renormalised to 4/7 and 3/7, the first alone holds 0.55; of all four it holds 0.4.
    assert (row >= truncation_threshold(row, 1.0, 2, 0.55, 0.0)).sum() == 1
    assert (row >= truncation_threshold(row, 1.0, 0, 0.55, 0.0)).sum() == 2


def test_nothing_is_dropped_when_all_is_off_or_the_row_is_broken() -> None:
    row = np.array([1.0, 5.0], np.float32)
    assert truncation_threshold(row, 1.0, 0, 1.0, 0.0) == NOTHING_DROPPED
    assert truncation_threshold(row, 1.0, 2, 1.0, 0.0) == NOTHING_DROPPED
    assert truncation_threshold(np.array([np.nan, 1.0], np.float32), 1.0, 1, 0.5, 0.1) == NOTHING_DROPPED


@pytest.mark.parametrize("size", [1, 10, 5000])
def test_kth_greatest_is_what_a_sort_says(size: int) -> None:
    random = np.random.default_rng(3)
    for scale in (0.1, 1.0, 100.0):
        row = (random.integers(-50, 50, size) * scale).astype(np.float32)
        row[::7] = -np.inf
        ordered = np.sort(row)[::-1]
        for k in {1, (size + 1) // 2, size}:
            assert kth_greatest(row, k) == ordered[k - 1]


def test_logits_masked_with_the_least_float_are_no_trouble() -> None:
    row = np.full(5000, np.finfo(np.float32).min, np.float32)
    row[:3] = (1.0, 2.0, 0.0)
    for temperature in (1e-6, 1.0, 1e4):
        assert (row >= truncation_threshold(row, temperature, 10, 0.9999, 1e-4))[3:].sum() in (0, 4997)
    assert (row >= truncation_threshold(row, 1.0, 0, 0.9999, 0.0)).sum() == 3
