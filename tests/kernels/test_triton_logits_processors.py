"""Processed copies, saturating counts, entries that are biased, masked and seen at once; surveys; slot records."""

from __future__ import annotations

import numpy as np
import torch

from headrace.kernels.triton.last_tokens import LastTokens, leave_tokens
from headrace.kernels.triton.logits_processors import (
    NO_COPY,
    PROCESSORS_SIZE,
    AllowedTokens,
    ProcessedRows,
    SlotProcessors,
    count_seen,
    fill_counts,
    pack_processors,
    process_rows,
)
from headrace.kernels.triton.row_survey import BLOCK, GROUP, RowSurvey
from headrace.kernels.triton.slot_params import (
    MASKED,
    MIN_P,
    NUM_PARAMS,
    PROCESSED,
    PROCESSORS,
    RECORD_SIZE,
    TEMPERATURE,
    TOP_P,
    UNPROCESSED,
    make_record,
    write_records,
)

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


def slot_params(*rows: tuple[int, float, float]) -> torch.Tensor:
    """Of slots with these kinds of processors, temperatures and top_p."""
    table = np.zeros((len(rows), NUM_PARAMS), np.float32)
    table[:, [PROCESSORS.value, TEMPERATURE.value, TOP_P.value]] = rows
    table[:, MIN_P.value] = -np.inf
    return on_device(table)


def rows_and_survey(num_rows: int) -> tuple[ProcessedRows, RowSurvey]:
    copies = torch.full((num_rows, VOCAB), 99.0, device=DEVICE)
    survey = RowSurvey.make(num_rows, VOCAB, DEVICE)
    survey.maxima_RBG.fill_(98.0)
    return ProcessedRows(copies, torch.full((num_rows,), 7, dtype=torch.int32, device=DEVICE)), survey


def test_bias_comes_before_the_mask_and_both_before_penalties() -> None:
    logits = np.random.default_rng(0).standard_normal((5, VOCAB)).astype(np.float32)
    prompt, output = np.array([1, 2, 2, 5000], np.int32), np.array([2, 7, 7, 7], np.int32)
    processors = slot_table(
        pack_processors((2.0, 0.25, 0.5), ((2, 3.0), (5000, -4.0), (4999, 1.0)), (7, 2), 10),
        pack_processors((1.0, 0.0, 0.0), tuple((token, 1.0) for token in range(0, 5000, 2)), (), 0),
    )
    counts = torch.full((2, VOCAB), 9, dtype=torch.int16, device=DEVICE)
    fill_counts(counts[0], on_device(np.stack(count_seen(prompt, output))))
    params = slot_params((PROCESSED.value, 1.0, 1.0), (PROCESSED.value, 0.0, 1.0), (UNPROCESSED.value, 0.0, 1.0))
    processed, survey = rows_and_survey(5)
    slots, positions = integers(0, 2, 1, 0, -1), integers(9, 9, 9, 10, 9)
    tables = SlotProcessors(processors, counts)
    process_rows(on_device(logits), processed, survey, slots, positions, params, tables)
    assert processed.copy_of_S[:4].tolist() == [0, NO_COPY, 2, 3]
    assert (processed.copies_SV[[1, 4]] == 99.0).all() and (survey.maxima_RBG == 98.0).all()

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

    copies = processed.copies_SV.cpu().numpy()
    np.testing.assert_allclose(copies[0], expected(logits[0], masked=True), rtol=1e-6)
    np.testing.assert_allclose(copies[3], expected(logits[3], masked=False), rtol=1e-6)
    biased = logits[2].copy()
    biased[:5000:2] += np.float32(1)
    np.testing.assert_array_equal(copies[2], biased)

    scored = params, tables, None, integers(0, 0, 0, 0, 0)
    process_rows(on_device(logits), processed, survey, integers(0, 2, 1, 0, -1), positions, *scored)
    only_bias = logits[0].copy()
    only_bias[[2, 5000, 4999]] += np.array([3.0, -4.0, 1.0], np.float32)
    np.testing.assert_array_equal(processed.copies_SV.cpu().numpy()[0], only_bias)


def test_masks_of_a_step_come_last_and_those_of_stop_ids_end() -> None:
    """A row without processors that has a mask gets a copy; what a slot's table says is nothing to it."""
    logits = np.random.default_rng(2).standard_normal((4, VOCAB)).astype(np.float32)
    processors = slot_table(
        pack_processors((1.0, 0.0, 0.0), (), (3, 5), 10), pack_processors((1.0, 0.0, 0.0), ((8, 2.0), (9, 2.0)), (), 0)
    )
    counts = torch.zeros(2, VOCAB, dtype=torch.int16, device=DEVICE)
    kinds = (MASKED, PROCESSED, UNPROCESSED)
    params = slot_params(*((kind.value, 1.0, 1.0) for kind in kinds))
    masks = np.zeros((1, -(-VOCAB // 32)), np.int32)
    masks[0, [0, -1]] = (1 << 9) | (1 << 20), 1
    allowed = AllowedTokens(on_device(masks), integers(-1, -1, 0, 0))
    processed, survey = rows_and_survey(4)
    tables = SlotProcessors(processors, counts)
    slots, positions = integers(0, 0, 1, 2), integers(9, 10, 9, 9)
    process_rows(on_device(logits), processed, survey, slots, positions, params, tables, allowed)
    assert processed.copy_of_S.tolist() == [0, NO_COPY, 2, 3]
    expected = logits.copy()
    expected[0, [3, 5]] = -np.inf
    expected[2, 9] += np.float32(2)
    is_left = np.isin(np.arange(VOCAB), [9, 20, 32 * (VOCAB // 32)])
    expected[2:, ~is_left] = -np.inf
    np.testing.assert_array_equal(processed.copies_SV.cpu().numpy()[[0, 2, 3]], expected[[0, 2, 3]])


def test_a_survey_is_of_what_is_drawn_from() -> None:
    """Of processed rows and others, and of those alone whose threshold is wanted."""
    logits = np.random.default_rng(3).standard_normal((3, VOCAB)).astype(np.float32)
    processors = slot_table(pack_processors((1.0, 0.0, 0.0), ((70, 9.0), (VOCAB - 1, -99.0)), (), 0))
    counts = torch.zeros(1, VOCAB, dtype=torch.int16, device=DEVICE)
    params = slot_params((PROCESSED.value, 0.7, 0.9))
    params = torch.cat((params, slot_params((UNPROCESSED.value, 2.0, 0.5), (UNPROCESSED.value, 1.0, 1.0))))
    tables = SlotProcessors(processors.expand(3, -1).contiguous(), counts.expand(3, -1).contiguous())
    processed, survey = rows_and_survey(3)
    process_rows(on_device(logits), processed, survey, integers(0, 1, 2), integers(0, 0, 0), params, tables)
    drawn = logits.copy()
    drawn[0, [70, VOCAB - 1]] += np.array([9.0, -99.0], np.float32)
    padded = np.pad(drawn, ((0, 0), (0, -VOCAB % BLOCK)), constant_values=-np.inf)
    dealt = padded.reshape(3, BLOCK // GROUP, -1, GROUP).swapaxes(1, 2)
    maxima, peaks = survey.maxima_RBG.cpu().numpy(), survey.peaks_RB2.cpu().numpy()
    for row, temperature in ((0, 0.7), (1, 2.0)):
        np.testing.assert_array_equal(maxima[row], dealt[row].max(2))
        greatest = dealt[row].max((1, 2))
        weights = np.exp((dealt[row] - greatest[:, None, None]) / temperature).sum((1, 2))
        np.testing.assert_array_equal(peaks[row, :, 0], greatest)
        np.testing.assert_allclose(peaks[row, :, 1], weights, rtol=1e-5)
    assert (maxima[2] == 98.0).all()


def test_counts_start_at_the_sequence_and_saturate() -> None:
    processors = slot_table(
        pack_processors((1.5, 0.0, 0.0), (), (), 0),
        pack_processors((1.0, 0.0, 0.0), ((1, 1.0),), (), 0),
        pack_processors((1.5, 0.0, 0.0), (), (), 0),  # left from who was there before
    )
    counts = torch.full((3, VOCAB), 3, dtype=torch.int16, device=DEVICE)
    output = np.repeat(np.array([4, 6], np.int32), (40_000, 65_533))
    fill_counts(counts[0], on_device(np.stack(count_seen(np.array([4, 4, 9], np.int32), output))))

    def read(slot: int) -> list[int]:
        return [int(count) for count in counts[slot, [4, 6, 9, 11]].cpu().numpy().view(np.uint16)]

    assert read(0) == [40_001, 65_534, 1, 0]
    params = slot_params((PROCESSED.value, 1.0, 1.0), (PROCESSED.value, 1.0, 1.0), (UNPROCESSED.value, 1.0, 1.0))
    last = LastTokens(integers(5, 5, 5), SlotProcessors(processors, counts))
    for token in (4, 6, 6, 9, 11):
        leave_tokens(integers(token, token, token, 9), integers(0, 1, 2, -1), params, last)
    assert last.tokens.tolist() == [11, 11, 11]
    assert read(0) == [40_002, 65_535, 2, 2]
    assert read(1) == read(2) == [3, 3, 3, 3], "penalties do not act there"


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
