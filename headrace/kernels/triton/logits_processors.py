"""Logits processors on the device: bias, stop-id mask and penalties. Owns their kernels and the layout of their tables.

Rows that a processor acts on get a processed copy in a buffer, and other kernels read a row from its copy if it has
one. Meaning and order are those of `headrace.sampling.slot_state`: bias and mask, repetition penalty, presence and
frequency.

A slot's processors (int32, `pack_processors`) are the header named here, then at `HEADER_SIZE` per entry a token and
its bias (float32 bits). A stop id is written as -1 - id: it has no probability while the new token's position is below
the least length. A slot's counts (int16 [V], read as unsigned) are 0 for a token never seen, else one more than how
often it was generated, at most 65,534 times.

Legend: S rows, V vocabulary, C copies.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.triton.slot_params import OF_MODEL
from headrace.types.request import Int32Array
from headrace.types.sampling_params import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS

NO_COPY = -1
"""Copy of a row that is read from the model's logits."""
SKIPPED = -2
"""Copy of a row that a launch leaves alone."""

MAX_ENTRIES = MAX_LOGIT_BIAS + 2 * MAX_STOP_TOKEN_IDS
"""Biased tokens and stop ids of a slot; the end-of-sequence ids of a model come on top of a request's."""

_NUM_ENTRIES = tl.constexpr(0)
_MIN_LENGTH = tl.constexpr(1)
_REPETITION = tl.constexpr(2)  # float32 bits, as the next two
_PRESENCE = tl.constexpr(3)
_FREQUENCY = tl.constexpr(4)
_HAS_PENALTIES = tl.constexpr(5)
HEADER_SIZE = tl.constexpr(8)
PROCESSORS_SIZE = HEADER_SIZE.value + 2 * MAX_ENTRIES

_MAX_COUNT = tl.constexpr(0xFFFF)
_BLOCK = 4096
_ENTRIES = 512  # at a time


@dataclass(frozen=True)
class ProcessedRows:
    """copies float32 [C, V], and per row of a launch the index of its copy, NO_COPY or SKIPPED: int32 [S]."""

    copies_CV: Tensor
    copy_of_S: Tensor


@triton.jit
def slot_and_copy(slots_ptr, copy_of_ptr, row, HAS_COPIES: tl.constexpr):
    """A row's slot (below 0: leave it alone) and the index of its copy (below 0: it has none)."""
    slot = tl.load(slots_ptr + row)
    copy = slot * 0 - 1
    if HAS_COPIES:
        copy = tl.load(copy_of_ptr + row)
        slot = tl.where(copy < -1, -1, slot)
    return slot, copy


@triton.jit
def drawn_row(logits_ptr, copies_ptr, row, copy, VOCAB: tl.constexpr, HAS_COPIES: tl.constexpr):
    """The logits that a row's token is drawn from."""
    row_ptr = logits_ptr + row.to(tl.int64) * VOCAB
    if HAS_COPIES and copy >= 0:
        row_ptr = copies_ptr + copy.to(tl.int64) * VOCAB
    return row_ptr


@triton.jit
def stated_row(logits_ptr, copies_ptr, row, copy, logprobs_of, VOCAB: tl.constexpr, HAS_COPIES: tl.constexpr):
    """The logits that a row's log-probabilities are of."""
    row_ptr = logits_ptr + row.to(tl.int64) * VOCAB
    if HAS_COPIES and (copy >= 0) & (logprobs_of != OF_MODEL):
        row_ptr = copies_ptr + copy.to(tl.int64) * VOCAB
    return row_ptr


@triton.jit
def load_logits(row_ptr, tokens, VOCAB: tl.constexpr):
    """float32, -inf beyond the vocabulary."""
    return tl.load(row_ptr + tokens, mask=tokens < VOCAB, other=float("-inf")).to(tl.float32)


@triton.jit
def _penalised(x, count, repetition, presence, frequency):
    num_generated = tl.maximum(count - 1, 0).to(tl.float32)
    repeated = tl.where(x > 0.0, tl.div_rn(x, repetition), x * repetition)
    lowered = repeated - num_generated * frequency - tl.where(num_generated > 0.0, presence, 0.0)
    return tl.where(count > 0, lowered, x)


@triton.jit
def _load_counts(counts_ptr, tokens, mask):
    return tl.load(counts_ptr + tokens, mask=mask, other=0).to(tl.int32) & 0xFFFF


@triton.jit(do_not_specialize_on_alignment=["slots_ptr", "positions_ptr", "copy_of_ptr"])
def _process_kernel(
    logits_ptr, copies_ptr, copy_of_ptr, slots_ptr, positions_ptr, processors_ptr, counts_ptr,
    VOCAB: tl.constexpr, BLOCK_V: tl.constexpr, SIZE: tl.constexpr, ENTRIES: tl.constexpr, SCORING: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    slot = tl.load(slots_ptr + row)
    copy = tl.load(copy_of_ptr + row)
    if (slot < 0) | (copy < 0):
        return
    processors_ptr += slot.to(tl.int64) * SIZE
    counts_ptr += slot.to(tl.int64) * VOCAB
    logits_ptr += row.to(tl.int64) * VOCAB
    copies_ptr += copy.to(tl.int64) * VOCAB
    num_entries = tl.load(processors_ptr + _NUM_ENTRIES)
    repetition = tl.load(processors_ptr + _REPETITION).to(tl.float32, bitcast=True)
    presence = tl.load(processors_ptr + _PRESENCE).to(tl.float32, bitcast=True)
    frequency = tl.load(processors_ptr + _FREQUENCY).to(tl.float32, bitcast=True)
    has_penalties = (tl.load(processors_ptr + _HAS_PENALTIES) != 0) & (not SCORING)
    is_masked = (tl.load(positions_ptr + row) < tl.load(processors_ptr + _MIN_LENGTH)) & (not SCORING)
    start = tl.program_id(0) * BLOCK_V
    tokens = start + tl.arange(0, BLOCK_V)
    x = tl.load(logits_ptr + tokens, mask=tokens < VOCAB, other=0.0)
    if has_penalties:
        x = _penalised(x, _load_counts(counts_ptr, tokens, tokens < VOCAB), repetition, presence, frequency)
    tl.store(copies_ptr + tokens, x, mask=tokens < VOCAB)
    if num_entries > 0:
        tl.debug_barrier()  # the stores below replace some of those above
        for first in range(0, num_entries, ENTRIES):
            entries = first + tl.arange(0, ENTRIES)
            entry_ptr = processors_ptr + HEADER_SIZE + 2 * entries
            code = tl.load(entry_ptr, mask=entries < num_entries, other=0)
            bias = tl.load(entry_ptr + 1, mask=entries < num_entries, other=0).to(tl.float32, bitcast=True)
            token = tl.where(code < 0, -1 - code, code)
            mask = (entries < num_entries) & (token >= start) & (token < start + BLOCK_V)
            value = tl.load(logits_ptr + token, mask=mask, other=0.0) + bias
            # What is not finite stays in sight: the row has to come out as NaN.
            value = tl.where((code < 0) & is_masked & (value < float("inf")), float("-inf"), value)
            if has_penalties:
                value = _penalised(value, _load_counts(counts_ptr, token, mask), repetition, presence, frequency)
            tl.store(copies_ptr + token, value, mask=mask)


def process_rows(
    logits_SV: Tensor,
    processed: ProcessedRows,
    slots_S: Tensor,
    positions_S: Tensor,
    slot_processors: Tensor,
    slot_counts: Tensor,
    *,
    scoring: bool = False,
) -> None:
    """Write the processed copy of every row that has one.

    logits_SV     float32, contiguous; not changed
    slots_S, positions_S   int32; a row whose slot is below 0 is skipped
    slot_processors   int32 [slots, PROCESSORS_SIZE]
    slot_counts   int16 [slots, V]
    scoring       only the bias acts, as for prompt positions
    """
    num_rows, vocab_size = logits_SV.shape
    _process_kernel[(triton.cdiv(vocab_size, _BLOCK), num_rows)](
        logits_SV, processed.copies_CV, processed.copy_of_S, slots_S, positions_S, slot_processors, slot_counts,
        VOCAB=vocab_size, BLOCK_V=_BLOCK, SIZE=PROCESSORS_SIZE, ENTRIES=_ENTRIES, SCORING=scoring, num_warps=8,
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["rows_ptr", "masks_ptr", "copy_of_ptr"])
def _mask_kernel(
    copies_ptr, copy_of_ptr, rows_ptr, masks_ptr, VOCAB: tl.constexpr, BLOCK_V: tl.constexpr, WORDS: tl.constexpr
):
    copy = tl.load(copy_of_ptr + tl.load(rows_ptr + tl.program_id(1)))
    if copy < 0:
        return
    tokens = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    word = tl.load(masks_ptr + tl.program_id(1) * WORDS + tokens // 32, mask=tokens < VOCAB, other=0)
    copies_ptr += copy.to(tl.int64) * VOCAB
    x = tl.load(copies_ptr + tokens, mask=tokens < VOCAB, other=0.0)
    is_forbidden = ((word >> (tokens % 32)) & 1) == 0
    # What is not finite stays in sight, as above.
    tl.store(copies_ptr + tokens, float("-inf"), mask=(tokens < VOCAB) & is_forbidden & (x < float("inf")))


def mask_rows(processed: ProcessedRows, rows_M: Tensor, masks_MW: Tensor) -> None:
    """Take tokens from the copies of rows: of `rows_M` (int32) those whose bit in `masks_MW` (int32) is not set."""
    vocab_size = processed.copies_CV.shape[1]
    _mask_kernel[(triton.cdiv(vocab_size, _BLOCK), len(rows_M))](
        processed.copies_CV, processed.copy_of_S, rows_M, masks_MW,
        VOCAB=vocab_size, BLOCK_V=_BLOCK, WORDS=masks_MW.shape[1], num_warps=8,
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["slots_ptr", "tokens_ptr", "copy_of_ptr"])
def _count_kernel(
    tokens_ptr, slots_ptr, copy_of_ptr, processors_ptr, counts_ptr, VOCAB: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row)
    if (slot < 0) | (tl.load(copy_of_ptr + row) < 0):
        return
    if tl.load(processors_ptr + slot.to(tl.int64) * SIZE + _HAS_PENALTIES) != 0:
        count_ptr = counts_ptr + slot.to(tl.int64) * VOCAB + tl.load(tokens_ptr + row)
        count = tl.load(count_ptr).to(tl.int32) & 0xFFFF
        tl.store(count_ptr, tl.minimum(tl.maximum(count, 1) + 1, _MAX_COUNT).to(tl.int16))


def count_tokens(
    tokens_S: Tensor, slots_S: Tensor, processed: ProcessedRows, slot_processors: Tensor, slot_counts: Tensor
) -> None:
    """Count the tokens (int32) just sampled by rows that have a copy, where penalties act. Slots are distinct."""
    _count_kernel[(len(tokens_S),)](
        tokens_S, slots_S, processed.copy_of_S, slot_processors, slot_counts,
        VOCAB=slot_counts.shape[1], SIZE=PROCESSORS_SIZE, num_warps=1,
    )  # fmt: skip


def pack_processors(
    penalties: tuple[float, float, float],
    logit_bias: tuple[tuple[int, float], ...],
    stop_ids: tuple[int, ...],
    min_length: int,
) -> Int32Array:
    """A slot's processors, as far as they are used. `penalties` are repetition, presence and frequency; ids are < V."""
    biases = dict.fromkeys(stop_ids, 0.0) | dict(logit_bias)
    assert len(biases) <= MAX_ENTRIES, f"{len(biases)} tokens are biased or masked"
    packed = np.zeros(HEADER_SIZE.value + 2 * len(biases), np.int32)
    header, entries = np.split(packed, [HEADER_SIZE.value])
    header[_NUM_ENTRIES], header[_MIN_LENGTH] = len(biases), min_length
    header[_REPETITION:_HAS_PENALTIES] = np.array(penalties, np.float32).view(np.int32)
    header[_HAS_PENALTIES] = penalties != (1.0, 0.0, 0.0)
    masked = frozenset(stop_ids)
    entries[::2] = [-1 - token if token in masked else token for token in biases]
    entries[1::2] = np.array(list(biases.values()), np.float32).view(np.int32)
    return packed


def count_seen(prompt: Int32Array, output: Int32Array) -> tuple[Int32Array, Int32Array]:
    """The distinct tokens of a sequence and their counts in its slot's table."""
    ids, inverse = np.unique(np.concatenate((prompt, output)), return_inverse=True)
    counts = np.bincount(inverse[len(prompt) :], minlength=len(ids)) + 1
    stored = np.minimum(counts, _MAX_COUNT.value).astype(np.uint16).view(np.int16)
    return ids.astype(np.int32), stored.astype(np.int32)


def fill_counts(counts_V: Tensor, seen_2N: Tensor) -> None:
    """Set a slot's counts to what `count_seen` gave, stacked: int32 [2, n] on the device."""
    counts_V.zero_()
    counts_V.index_put_((seen_2N[0].long(),), seen_2N[1].to(torch.int16))
