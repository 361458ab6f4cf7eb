"""The most probable ids against a sort: ties, rows with few tokens left, more ids than blocks, thresholds, points."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from headrace.kernels.triton.row_survey import BLOCK
from headrace.kernels.triton.sampling_rows import SamplingWorkspace, sample_rows
from headrace.kernels.triton.slot_params import DIVISOR, LOGPROBS_OF, NUM_ASKED, NUM_PARAMS, NUM_TOP
from headrace.kernels.triton.top_rows import SampledRows, asked_rows, top_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 5 * BLOCK + 123


def sampled(logits: np.ndarray, *, num_top: list[int], of: list[int], thresholds: np.ndarray | None) -> SampledRows:
    """The rows after a greedy pass at divisor 2."""
    num_rows = len(logits)
    params = np.zeros((num_rows, NUM_PARAMS), np.float32)
    params[:, DIVISOR], params[:, LOGPROBS_OF], params[:, NUM_TOP], params[:, NUM_ASKED] = 2.0, of, num_top, 3
    slots = torch.arange(num_rows, dtype=torch.int32, device=DEVICE)
    tokens, logprobs = torch.zeros_like(slots), torch.zeros(num_rows, device=DEVICE)
    device_thresholds = None if thresholds is None else torch.from_numpy(thresholds).to(DEVICE)
    workspace = SamplingWorkspace.make(num_rows, logits.shape[1], DEVICE)
    values, table = torch.from_numpy(logits).to(DEVICE), torch.from_numpy(params).to(DEVICE)
    seeds = torch.zeros(num_rows, 2, dtype=torch.int32, device=DEVICE)
    sample_rows(values, slots, slots, table, seeds, device_thresholds, workspace, tokens, logprobs, None)
    return SampledRows(values, slots, tokens, table, device_thresholds, workspace, None)


def found_in(rows: SampledRows, most: int) -> tuple[np.ndarray, np.ndarray]:
    out = torch.full((len(rows.slots_S), 2 * most + 1), -3, dtype=torch.int32, device=DEVICE)
    top_rows(rows, out, most)
    found = out.cpu().numpy()
    assert (found[:, -1] == -3).all()
    return found[:, :most], found[:, most : 2 * most].view(np.float32)


def log_softmax(row: np.ndarray) -> np.ndarray:
    wide = row.astype(np.float64) / 2.0
    with np.errstate(divide="ignore"):
        result: np.ndarray = wide - wide.max() - math.log(np.exp(wide - wide.max()).sum())
    return result


@pytest.mark.parametrize("most", [5, 20, 40])
def test_ids_come_greatest_first_and_lowest_first_among_equals(most: int) -> None:
    generator = np.random.default_rng(most)
    logits = (generator.standard_normal((5, VOCAB)) * 3).astype(np.float32)
    logits[1] = np.round(logits[1])  # many ties, across blocks
    logits[2, 3:] = -np.inf  # fewer than asked for
    logits[3] = np.sort(logits[3])[::-1]  # all of them in one block
    logits[4] = 0.0
    logits[4, ::2] = -0.0
    num_top = [most, most, 4, most, 1]
    ids, values = found_in(sampled(logits, num_top=num_top, of=[0] * 5, thresholds=None), most)
    for row, found, logprobs, count in zip(logits, ids, values, num_top, strict=True):
        expected = np.lexsort((np.arange(VOCAB), -row))[:count]
        np.testing.assert_array_equal(found[:count], expected)
        np.testing.assert_allclose(logprobs[:count], log_softmax(row)[expected], rtol=0, atol=1e-5)
        assert (found[count:] == -3).all(), "no more than the slot asks for"


def test_dropped_tokens_have_no_probability() -> None:
    logits = (np.random.default_rng(2).standard_normal((3, VOCAB)) * 3).astype(np.float32)
    thresholds = np.sort(logits, axis=1)[:, -3].copy()
    rows = sampled(logits, num_top=[5] * 3, of=[1, 0, 2], thresholds=thresholds)
    ids, values = found_in(rows, 5)
    left = np.where(logits[0] >= thresholds[0], logits[0], -np.inf)
    first = np.argsort(-left, kind="stable")[:5]
    best = int(logits[2].argmax())
    np.testing.assert_array_equal(ids, [first, np.argsort(-logits[1], kind="stable")[:5], [best, 0, 1, 2, 3]])
    np.testing.assert_allclose(values[0], log_softmax(left)[first], rtol=0, atol=1e-5)
    assert np.isfinite(values[1]).all()
    assert values[2].tolist() == [0.0] + [-math.inf] * 4

    asked = np.array([[0, best, VOCAB]] * 3, np.int32)
    asked[0] = first[1], first[4], VOCAB + 9
    out = torch.full((3, 4), -3, dtype=torch.int32, device=DEVICE)
    asked_rows(rows, torch.from_numpy(asked).to(DEVICE), out, 1, 3)
    words = out.cpu().numpy()
    assert (words[:, 0] == -3).all()
    found = words[:, 1:].view(np.float32)
    assert found[0, 0] == values[0, 1] and found[0, 1:].tolist() == [-math.inf] * 2
    np.testing.assert_allclose(found[1, :2], log_softmax(logits[1])[asked[1, :2]], rtol=0, atol=1e-5)
    assert found[2].tolist() == [-math.inf, 0.0, -math.inf]
    out.fill_(-3)
    asked_rows(rows, torch.tensor([7, 8, best], dtype=torch.int32, device=DEVICE), out, 2, 1)
    own = out.cpu().numpy()[:, 2].view(np.float32)
    np.testing.assert_allclose(own[1], log_softmax(logits[1])[8], rtol=0, atol=1e-5)
    assert own[2] == 0.0
