"""The sampling pass against the published noise, and thresholds against their exact meaning."""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from headrace.kernels.triton.last_tokens import LastTokens
from headrace.kernels.triton.logits_processors import PROCESSORS_SIZE, ProcessedRows, SlotProcessors, process_rows
from headrace.kernels.triton.row_survey import BLOCK, RowSurvey
from headrace.kernels.triton.sampling_rows import (
    PARTIAL_WORDS,
    SamplingWorkspace,
    VocabularyShare,
    noise_words,
    philox_keys,
    reduce_rows,
    sample_rows,
    walk_rows,
)
from headrace.kernels.triton.slot_params import NUM_PARAMS, seed_words
from headrace.kernels.triton.threshold_search import ThresholdWorkspace, find_thresholds
from headrace.sampling import noise
from headrace.sampling.noise import gumbel_of, noise_keys
from headrace.sampling.thresholds import truncation_threshold

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 9008  # aligned, or bits of shares would be those of rows on a CPU only
SEEDS = np.array([0, 1, 0x0123456789ABCDEF, 0xFFFFFFFFFFFFFFFF, 77, 78], np.uint64)
POSITIONS = np.array([0, 7, 4096, 2147483647, 12, 3], np.int64)


def on_device(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE)


@triton.jit
def noise_kernel(seeds_ptr, positions_ptr, words_ptr, NUM_TOKENS: tl.constexpr):
    row, tokens = tl.program_id(0), tl.arange(0, NUM_TOKENS)
    seed_ptr = seeds_ptr + 2 * row
    key0, key1 = philox_keys(tl.load(seed_ptr), tl.load(seed_ptr + 1), tl.load(positions_ptr + row))
    words = noise_words(tokens, key0, key1).to(tl.int32, bitcast=True)
    tl.store(words_ptr + row * NUM_TOKENS + tokens, words)


def test_noise_words_are_the_published_ones() -> None:
    words = torch.empty(len(SEEDS), 256, dtype=torch.int32, device=DEVICE)
    positions = on_device(POSITIONS.astype(np.int32))
    noise_kernel[(len(SEEDS),)](on_device(seed_words(SEEDS)), positions, words, NUM_TOKENS=256)
    expected = noise.noise_words(noise_keys(SEEDS, POSITIONS), np.arange(256))
    np.testing.assert_array_equal(words.cpu().numpy().view(np.uint32), expected)


def params(*rows: tuple[float, float, float, int, float, float]) -> torch.Tensor:
    """Rows of (temperature, divisor, mode, top_k, top_p, min_p)."""
    table = np.zeros((len(rows), NUM_PARAMS), np.float32)
    for row, (temperature, divisor, mode, top_k, top_p, min_p) in zip(table, rows, strict=True):
        reach = temperature * math.log(min_p) if min_p else -math.inf
        row[:7] = (temperature, divisor, mode, 0.0, top_k, top_p, reach)
    return on_device(table)


def logits(num_rows: int, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((num_rows, VOCAB)) * 3.0).astype(np.float32)


def last_tokens(num_slots: int, fill: int) -> LastTokens:
    processors = torch.zeros(num_slots, PROCESSORS_SIZE, dtype=torch.int32, device=DEVICE)
    counts = torch.zeros(num_slots, VOCAB, dtype=torch.int16, device=DEVICE)
    tokens = torch.full((num_slots,), fill, dtype=torch.int32, device=DEVICE)
    return LastTokens(tokens, SlotProcessors(processors, counts))


def thresholds_of(values: np.ndarray, table: torch.Tensor) -> torch.Tensor:
    """Of rows without processors, each in a slot of its own."""
    num_rows, vocab_size = values.shape
    slots = on_device(np.arange(num_rows, dtype=np.int32))
    logits, thresholds = on_device(values), torch.full((num_rows,), float("nan"), device=DEVICE)
    processed, survey = ProcessedRows.make(num_rows, vocab_size, DEVICE), RowSurvey.make(num_rows, vocab_size, DEVICE)
    process_rows(logits, processed, survey, slots, slots, table, last_tokens(num_rows, 0).tables)
    workspace = ThresholdWorkspace.make(num_rows, vocab_size, DEVICE)
    find_thresholds(logits, table, slots, processed, survey, workspace, thresholds)
    return thresholds


def log_softmax(row: np.ndarray) -> np.ndarray:
    wide = row.astype(np.float64)
    result: np.ndarray = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
    return result


def test_tokens_and_logprobs_of_every_mode() -> None:
    values = logits(6, 0)
    values[1, 5:9] = 40.0  # greedy ties: the lowest id
    values[4, 100:] = -np.inf
    table = params(
        (1.0, 1.0, 0, 0, 1.0, 0.0), (0.0, 1.0, 0, 0, 1.0, 0.0), (0.7, 0.7, 0, 0, 1.0, 0.0), (0.7, 1.0, 0, 0, 1.0, 0.0),
        (1.5, 1.5, 1, 0, 1.0, 0.0), (0.0, 1.0, 2, 0, 1.0, 0.0),
    )  # fmt: skip
    slots = np.array([3, 1, 2, 0, -1, 5, 4], np.int32)
    rows = np.array([3, 1, 2, 0, 0, 5, 4])
    tokens = torch.full((7,), -7, dtype=torch.int32, device=DEVICE)
    logprobs = torch.zeros(7, device=DEVICE)
    last = last_tokens(6, -9)
    sample_rows(
        on_device(values[rows]), on_device(slots), on_device(POSITIONS[rows].astype(np.int32)), table,
        on_device(seed_words(SEEDS)), None, SamplingWorkspace.make(7, VOCAB, DEVICE), tokens, logprobs, last,
    )  # fmt: skip
    assert int(tokens[4]) == -7, "a skipped row"
    gumbel = gumbel_of(noise.noise_words(noise_keys(SEEDS, POSITIONS), np.arange(VOCAB)))
    for at, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        temperature, divisor, mode = table[slot, :3].tolist()
        scores = values[slot].astype(np.float64) / temperature + gumbel[slot] if temperature else values[slot]
        assert int(tokens[at]) == int(scores.argmax()) == int(last.tokens[slot])
        expected = 0.0 if mode == 2 else log_softmax(values[slot] / np.float32(divisor))[int(tokens[at])]
        assert abs(float(logprobs[at]) - expected) < 1e-5


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, which interprets it, tells of overflow
def test_equals_are_drawn_by_their_noise_however_large_they_are() -> None:
    values = np.full((6, VOCAB), -1e10, np.float32)
    equal = np.array([0, 3, 100, VOCAB - 1])
    values[:, equal] = np.array([1e6, 1e9, 1e10, 1e11, 1e20, 3e38], np.float32)[:, None]
    slots, tokens = on_device(np.arange(6, dtype=np.int32)), torch.zeros(6, dtype=torch.int32, device=DEVICE)
    sample_rows(
        on_device(values), slots, on_device(POSITIONS.astype(np.int32)), params(*[(1e-6, 1e-6, 0, 0, 1.0, 0.0)] * 6),
        on_device(seed_words(SEEDS)), None, SamplingWorkspace.make(6, VOCAB, DEVICE), tokens,
        torch.zeros(6, device=DEVICE), last_tokens(6, 0),
    )  # fmt: skip
    expected = equal[gumbel_of(noise.noise_words(noise_keys(SEEDS, POSITIONS), equal)).argmax(axis=1)]
    assert tokens.tolist() == expected.tolist() and len(set(expected)) > 1


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, which interprets it, tells of NaN
@pytest.mark.parametrize("num_blocks", [1, 2])
def test_ranks_that_have_whole_blocks_each_find_what_one_does(num_blocks: int) -> None:
    """To the bit, also of rows with ties over ranks, with NaN, with nothing on a rank; padding counts nowhere."""
    values = logits(7, 11)
    values[1, [3, BLOCK + 3, VOCAB - 1]] = 50.0
    values[2, : 2 * BLOCK] = -np.inf
    values[3, 9] = np.nan
    values[5] = -np.inf
    values[6, BLOCK:] = -np.inf
    table = params(
        *((1.0, 1.0, 0, 0, 1.0, 0.0), (0.0, 1.0, 0, 0, 1.0, 0.0), (0.7, 0.7, 1, 0, 1.0, 0.0)),
        *((1.0, 1.0, 0, 0, 1.0, 0.0), (0.0, 1.0, 2, 0, 1.0, 0.0), (1.0, 1.0, 0, 0, 1.0, 0.0)),
        *((3.0, 1.0, 0, 0, 1.0, 0.0),),
    )
    slots, positions = (on_device(np.arange(7, dtype=np.int32)) for _ in range(2))
    seeds = on_device(seed_words(np.arange(7, dtype=np.uint64)))
    workspace = SamplingWorkspace.make(7, VOCAB, DEVICE)
    expected = torch.zeros(7, dtype=torch.int32, device=DEVICE), torch.zeros(7, device=DEVICE)
    last, no_last = last_tokens(7, 0), None
    sample_rows(on_device(values), slots, positions, table, seeds, None, workspace, *expected, no_last)
    norms = workspace.norms_R2.clone()
    width = num_blocks * BLOCK
    parts = []
    for first in range(0, VOCAB, width):
        num_tokens = min(width, VOCAB - first)
        share = np.full((7, width), 99.0, np.float32)
        share[:, :num_tokens] = values[:, first : first + num_tokens]
        parts.append(torch.full((7, num_blocks, PARTIAL_WORDS.value), torch.nan, device=DEVICE))
        columns = VocabularyShare(first, num_tokens)
        walk_rows(on_device(share), columns, slots, positions, table, seeds, None, parts[-1])
    tokens, logprobs = torch.full_like(expected[0], -1), torch.zeros(7, device=DEVICE)
    reduce_rows(torch.stack(parts), slots, table, workspace.norms_R2, tokens, logprobs, last)
    assert torch.equal(tokens, expected[0]) and torch.equal(tokens, last.tokens)
    assert torch.equal(logprobs.view(torch.int32), expected[1].view(torch.int32))
    assert torch.equal(workspace.norms_R2.view(torch.int32), norms.view(torch.int32))
    assert int(tokens[1]) == 3 and int(tokens[2]) >= 2 * BLOCK and int(tokens[6]) < BLOCK
    assert logprobs[[3, 5]].isnan().all() and not logprobs[[0, 1, 2, 4, 6]].isnan().any()


CASES = [
    (1.0, 50, 1.0, 0.0), (1.0, 1, 1.0, 0.0), (1.0, 8999, 1.0, 0.0), (1.0, 0, 0.95, 0.0), (0.3, 0, 0.5, 0.0),
    (1.0, 50, 0.9, 0.0), (2.0, 3000, 0.99, 0.0), (1.0, 0, 1.0, 0.05), (0.7, 200, 0.95, 0.1), (0.0, 5, 0.5, 0.0),
    (2.0, 50, 1e-300, 0.0),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["normal", "ties", "masked", "peak", "plateau", "one lane", "-0", "top"])
def test_thresholds_leave_what_they_mean(kind: str) -> None:
    values = logits(len(CASES), 3)
    if kind == "ties":
        values = np.round(values)
    elif kind == "masked":
        values[:, 40:] = -np.inf
    elif kind == "peak":
        values[:, 7] = 60.0
    elif kind == "plateau":  # more equal values than a buffer holds
        values[:, 100:8100] = 9.0
    elif kind == "one lane":  # the greatest lie where a pass with any power of 2 of lanes sees them in few
        values[:, ::512] += 30.0
    elif kind == "top":  # and nothing is greater
        values = np.minimum(values, np.float32(1.0))
        values[:, 100:8100] = 1.1
    elif kind == "-0":  # the greatest value
        values = -np.abs(values)
        values[:, ::900] = -0.0
    table = params(*[(t, t or 1.0, 1, top_k, top_p, min_p) for t, top_k, top_p, min_p in CASES])
    thresholds = thresholds_of(values, table)
    for row, found, (temperature, top_k, top_p, min_p) in zip(values, thresholds.tolist(), CASES, strict=True):
        if temperature == 0.0:
            assert found == -math.inf
            continue
        expected = truncation_threshold(row, temperature, top_k, top_p, min_p)
        left, wanted = np.flatnonzero(row >= np.float32(found)), np.flatnonzero(row >= expected)
        finite = np.isfinite(row)
        left, wanted = left[finite[left]], wanted[finite[wanted]]
        assert np.array_equal(left, wanted), (temperature, top_k, top_p, min_p, len(left), len(wanted))


def test_only_tokens_above_the_threshold_are_drawn_and_renormalised() -> None:
    values = logits(3, 5)
    table = params(*[(1.0, 1.0, 1, 4, 1.0, 0.0)] * 3)
    slots, seeds = on_device(np.arange(3, dtype=np.int32)), on_device(seed_words(SEEDS[:3]))
    device_logits, thresholds = on_device(values), thresholds_of(values, table)
    workspace = SamplingWorkspace.make(3, VOCAB, DEVICE)
    tokens, logprobs = torch.zeros(3, dtype=torch.int32, device=DEVICE), torch.zeros(3, device=DEVICE)
    for position in range(2):
        positions = torch.full((3,), position, dtype=torch.int32, device=DEVICE)
        sample_rows(device_logits, slots, positions, table, seeds, thresholds, workspace, tokens, logprobs, None)
        for row, token, logprob in zip(values, tokens.tolist(), logprobs.tolist(), strict=True):
            top = np.sort(row)[::-1][:4]
            assert row[token] in top
            assert abs(logprob - (row[token] - top.max() - math.log(np.exp(top - top.max()).sum()))) < 1e-5
