"""Processed copies, saturating counts, entries that are biased, masked and seen at once; slot records."""

from __future__ import annotations

import numpy as np
import torch

from headrace.kernels.triton.logits_processors import (
    NO_COPY,
    PROCESSORS_SIZE,
    SKIPPED,
    ProcessedRows,
    count_seen,
    count_tokens,
    fill_counts,
    pack_processors,
    process_rows,
)
from headrace.kernels.triton.slot_params import NUM_PARAMS, RECORD_SIZE, make_record, write_records

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 5003


def on_device(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE)


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def slot_table(*packed: np.ndarray) -> torch.Tensor:
    table = np.zeros((len(packed), PROCESSORS_SIZE), np.int32)
    for row, processors in zip(table, packed, strict=True):
        row[: len(processors)] = processors
    return on_device(table)


def test_bias_comes_before_the_mask_and_both_before_penalties() -> None:
    logits = np.random.default_rng(0).standard_normal((4, VOCAB)).astype(np.float32)
    prompt, output = np.array([1, 2, 2, 5000], np.int32), np.array([2, 7, 7, 7], np.int32)
    processors = slot_table(
        pack_processors((2.0, 0.25, 0.5), ((2, 3.0), (5000, -4.0), (4999, 1.0)), (7, 2), 10),
        pack_processors((1.0, 0.0, 0.0), tuple((token, 1.0) for token in range(0, 5000, 2)), (), 0),
    )
    counts = torch.full((2, VOCAB), 9, dtype=torch.int16, device=DEVICE)
    fill_counts(counts[0], on_device(np.stack(count_seen(prompt, output))))
    processed = ProcessedRows(torch.full((3, VOCAB), 99.0, device=DEVICE), integers(2, NO_COPY, 0, 1))
    slots, positions = integers(0, 0, 1, 0), integers(9, 9, 9, 10)
    process_rows(on_device(logits), processed, slots, positions, processors, counts)

    def expected(row: np.ndarray, *, masked: bool) -> np.ndarray:
        values = row.copy()
        values[[2, 5000, 4999]] += np.array([3.0, -4.0, 1.0], np.float32)
        if masked:
            values[[7, 2]] = -np.inf
        for token, count in ((1, 0), (2, 1), (5000, 0), (7, 3)):
            value = values[token]
            value = value / np.float32(2) if value > 0 else value * np.float32(2)
            values[token] = value - np.float32(0.25 * (count > 0) + 0.5 * count)
        return values

    copies = processed.copies_CV.cpu().numpy()
    np.testing.assert_allclose(copies[2], expected(logits[0], masked=True), rtol=1e-6)
    np.testing.assert_allclose(copies[1], expected(logits[3], masked=False), rtol=1e-6)
    biased = logits[2].copy()
    biased[:5000:2] += np.float32(1)
    np.testing.assert_array_equal(copies[0], biased)

    process_rows(on_device(logits), processed, slots, positions, processors, counts, scoring=True)
    only_bias = logits[0].copy()
    only_bias[[2, 5000, 4999]] += np.array([3.0, -4.0, 1.0], np.float32)
    np.testing.assert_array_equal(processed.copies_CV.cpu().numpy()[2], only_bias)


def test_counts_start_at_the_sequence_and_saturate() -> None:
    processors = slot_table(
        pack_processors((1.5, 0.0, 0.0), (), (), 0), pack_processors((1.0, 0.0, 0.0), ((1, 1.0),), (), 0)
    )
    counts = torch.full((2, VOCAB), 3, dtype=torch.int16, device=DEVICE)
    output = np.repeat(np.array([4, 6], np.int32), (40_000, 65_533))
    fill_counts(counts[0], on_device(np.stack(count_seen(np.array([4, 4, 9], np.int32), output))))

    def read(slot: int) -> list[int]:
        return [int(count) for count in counts[slot, [4, 6, 9, 11]].cpu().numpy().view(np.uint16)]

    assert read(0) == [40_001, 65_534, 1, 0]
    processed = ProcessedRows(torch.empty(2, VOCAB, device=DEVICE), integers(0, 1, SKIPPED, NO_COPY, 1))
    for token in (4, 6, 6, 9, 11):
        count_tokens(integers(token, token, 9, 9, 9), integers(0, 1, 0, 0, -1), processed, processors, counts)
    assert read(0) == [40_002, 65_535, 2, 2]
    assert read(1) == [3, 3, 3, 3], "penalties do not act there"


def test_records_reach_their_slots() -> None:
    params, seeds = torch.zeros(4, NUM_PARAMS, device=DEVICE), torch.zeros(4, 2, dtype=torch.int32, device=DEVICE)
    generator = np.random.default_rng(1)
    values = generator.standard_normal((2, NUM_PARAMS)).astype(np.float32)
    values[0, 6] = -np.inf
    words = generator.integers(-(1 << 31), 1 << 31, (2, 2)).astype(np.int32)
    seeds_of = words.view(np.uint64)[:, 0].tolist()
    records = np.full((4, RECORD_SIZE), -1, np.int32)
    records[1], records[3] = make_record(3, values[0], seeds_of[0]), make_record(0, values[1], seeds_of[1])
    write_records(on_device(records), params, seeds)
    np.testing.assert_array_equal(params.cpu().numpy()[[3, 0]], values)
    np.testing.assert_array_equal(seeds.cpu().numpy()[[3, 0]], words)
    assert not params[1:3].any() and not seeds[1:3].any()
