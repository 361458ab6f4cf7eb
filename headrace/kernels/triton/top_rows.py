"""Further log-probabilities of rows that were just sampled: their most probable ids, and those of given ids.

Owns two kernels over the same logits, which read what the sampling pass left: every block's greatest logit and the
normaliser of the row. The n most probable ids lie in the n blocks whose greatest logits are greatest (the block with
the lower ids first among equals), so only those are read, and of them only until the next block's greatest does not
make it onto the list. One program does a row, whatever the batch.

A candidate is one int64, the logit's bits in order above those of its id: greatest first, lowest id first among equals.

Legend: S rows, V vocabulary, W int32 of a row of results.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.triton.logits_processors import ProcessedRows, stated_row
from headrace.kernels.triton.row_survey import BLOCK
from headrace.kernels.triton.sampling_rows import PARTIAL_WORDS, SamplingWorkspace
from headrace.kernels.triton.slot_params import (
    DIVISOR,
    LOGPROBS_OF,
    NUM_ASKED,
    NUM_TOP,
    OF_POINT,
    OF_SAMPLED,
    load_param,
)
from headrace.kernels.triton.weight_search import ordered_bits, unordered_bits

LIST_SIZES = (8, 32, 1024)
"""Numbers of top ids that a kernel is compiled for."""

_ASKED = 256
_LOWEST = tl.constexpr(-(1 << 63))
_HIGHEST = tl.constexpr((1 << 63) - 1)


@dataclass(frozen=True)
class SampledRows:
    """Rows of the last `sample_rows`: what it was given, and the tokens it wrote."""

    logits_SV: Tensor
    slots_S: Tensor
    tokens_S: Tensor
    slot_params: Tensor
    thresholds_S: Tensor | None
    workspace: SamplingWorkspace
    processed: ProcessedRows | None


@triton.jit
def _distribution_of(
    logits_ptr, copies_ptr, copy_of_ptr, thresholds_ptr, row, logprobs_of, has_copies, has_thresholds,
    VOCAB: tl.constexpr,
):  # fmt: skip
    """Where the logits are of which a row's log-probabilities are; the least that counts."""
    row_ptr = logits_ptr + row.to(tl.int64) * VOCAB
    threshold = logprobs_of * 0.0 + float("-inf")
    if has_copies:
        copy = tl.load(copy_of_ptr + row)
        row_ptr = stated_row(logits_ptr, copies_ptr, row, copy, logprobs_of, VOCAB, True)
    if has_thresholds & (logprobs_of == OF_SAMPLED):
        threshold = tl.load(thresholds_ptr + row)
    return row_ptr, threshold


@triton.jit
def _load_stated(row_ptr, ids, mask, threshold, is_point, token):
    """The logits of a distribution: -inf where nothing is left of an id."""
    x = tl.load(row_ptr + ids, mask=mask, other=float("-inf")).to(tl.float32)
    x = tl.where(is_point, tl.where(ids == token, 0.0, float("-inf")), x)
    return tl.where(x >= threshold, x, float("-inf"))


@triton.jit
def _pack(x, ids):
    x = tl.where(x == 0.0, 0.0, x)  # one zero
    return (ordered_bits(x).to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def _packed_id(key):
    return (0x7FFFFFFF - (key & 0x7FFFFFFF)).to(tl.int32)


@triton.jit(
    do_not_specialize=["has_copies", "has_thresholds", "out_stride", "values_at"],
    do_not_specialize_on_alignment=["slots_ptr", "copy_of_ptr", "tokens_ptr"],
)
def _top_kernel(
    logits_ptr, copies_ptr, copy_of_ptr, thresholds_ptr, params_ptr, slots_ptr, tokens_ptr, partial_ptr, norms_ptr,
    out_ptr, has_copies, has_thresholds, out_stride, values_at,
    VOCAB: tl.constexpr, BLOCK_V: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    num_top = load_param(params_ptr, slot, NUM_TOP).to(tl.int32)
    logprobs_of = load_param(params_ptr, slot, LOGPROBS_OF)
    row_ptr, threshold = _distribution_of(
        logits_ptr, copies_ptr, copy_of_ptr, thresholds_ptr, row, logprobs_of, has_copies, has_thresholds, VOCAB
    )
    if num_top == 0:
        return
    is_point = logprobs_of == OF_POINT
    token = tl.load(tokens_ptr + row)
    blocks = tl.arange(0, BLOCKS)
    words = (row * NUM_BLOCKS + blocks) * PARTIAL_WORDS
    greatest = tl.load(partial_ptr + words, mask=blocks < NUM_BLOCKS, other=float("-inf"))
    greatest = tl.where(is_point, tl.where(blocks == token // BLOCK_V, 0.0, float("-inf")), greatest)
    greatest = tl.where(greatest >= threshold, greatest, float("-inf"))
    bounds = tl.where(blocks < NUM_BLOCKS, _pack(greatest, blocks * BLOCK_V), _LOWEST)  # nothing in a block is greater
    lanes = tl.arange(0, LIST)
    found = tl.where(lanes < num_top, lanes.to(tl.int64) + _LOWEST, _HIGHEST)  # distinct, and below every candidate
    least = tl.min(found, 0)
    bound = tl.max(bounds, 0)
    while bound > least:
        bounds = tl.where(bounds == bound, _LOWEST, bounds)
        ids = (_packed_id(bound) // BLOCK_V) * BLOCK_V + tl.arange(0, BLOCK_V)  # seen to be aligned
        mask = ids < VOCAB
        keys = tl.where(mask, _pack(_load_stated(row_ptr, ids, mask, threshold, is_point, token), ids), _LOWEST)
        key = tl.max(keys, 0)
        while key > least:
            found = tl.where(found == least, key, found)
            keys = tl.where(keys == key, _LOWEST, keys)
            least = tl.min(found, 0)
            key = tl.max(keys, 0)
        bound = tl.max(bounds, 0)
    inverse = 1.0 / load_param(params_ptr, slot, DIVISOR)
    top = tl.load(norms_ptr + 2 * row)
    log_total = tl.load(norms_ptr + 2 * row + 1)
    out_ptr += row.to(tl.int64) * out_stride
    found = tl.where(lanes < num_top, found, _LOWEST)
    for index in range(0, num_top):
        key = tl.max(found, 0)
        found = tl.where(found == key, _LOWEST, found)
        value = (unordered_bits((key >> 32).to(tl.int32)) - top) * inverse - log_total
        tl.store(out_ptr + index, _packed_id(key))
        tl.store(out_ptr + values_at + index, value.to(tl.int32, bitcast=True))


@triton.jit(
    do_not_specialize=["has_copies", "has_thresholds", "out_stride", "values_at", "ids_stride", "one_per_row"],
    do_not_specialize_on_alignment=["slots_ptr", "copy_of_ptr", "tokens_ptr", "ids_ptr"],
)
def _asked_kernel(
    logits_ptr, copies_ptr, copy_of_ptr, thresholds_ptr, params_ptr, slots_ptr, tokens_ptr, ids_ptr, norms_ptr, out_ptr,
    has_copies, has_thresholds, out_stride, values_at, ids_stride, one_per_row,
    VOCAB: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    num_asked = load_param(params_ptr, slot, NUM_ASKED).to(tl.int32)
    start = slot.to(tl.int64) * ids_stride
    if one_per_row:
        num_asked = 1
        start = row.to(tl.int64)
    logprobs_of = load_param(params_ptr, slot, LOGPROBS_OF)
    row_ptr, threshold = _distribution_of(
        logits_ptr, copies_ptr, copy_of_ptr, thresholds_ptr, row, logprobs_of, has_copies, has_thresholds, VOCAB
    )
    columns = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask = columns < num_asked
    ids = tl.load(ids_ptr + start + columns, mask=mask, other=VOCAB)
    is_point = logprobs_of == OF_POINT
    x = _load_stated(row_ptr, ids, mask & (ids < VOCAB), threshold, is_point, tl.load(tokens_ptr + row))
    inverse = 1.0 / load_param(params_ptr, slot, DIVISOR)
    value = (x - tl.load(norms_ptr + 2 * row)) * inverse - tl.load(norms_ptr + 2 * row + 1)
    value = tl.where(ids < VOCAB, value, float("-inf"))
    tl.store(out_ptr + row.to(tl.int64) * out_stride + values_at + columns, value.to(tl.int32, bitcast=True), mask=mask)


def _common(rows: SampledRows) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    """The leading tensors of both kernels, and which of them mean something."""
    copies, copy_of = rows.logits_SV, rows.slots_S
    if rows.processed is not None:
        copies, copy_of = rows.processed.copies_SV, rows.processed.copy_of_S
    thresholds = rows.slot_params if rows.thresholds_S is None else rows.thresholds_S
    tensors = (rows.logits_SV, copies, copy_of, thresholds, rows.slot_params, rows.slots_S, rows.tokens_S)
    return tensors, (int(rows.processed is not None), int(rows.thresholds_S is not None))


def top_rows(rows: SampledRows, out_SW: Tensor, most: int) -> None:
    """The most probable ids of each row and their log-probabilities, of what the row's own log-probability is of.

    Each row gets as many as its slot's parameters say, at most `most` <= V: the ids in columns 0.. of out_SW
    (int32), greatest first and the lowest id first among equals, the bits of their log-probabilities in columns most...
    Logits are float32. A row with NaN gets ids in no promised order.
    """
    tensors, flags = _common(rows)
    num_rows, vocab_size = rows.logits_SV.shape
    num_blocks = triton.cdiv(vocab_size, BLOCK)
    _top_kernel[(num_rows,)](
        *tensors, rows.workspace.partial_RBW, rows.workspace.norms_R2, out_SW, *flags, out_SW.stride(0), most,
        VOCAB=vocab_size, BLOCK_V=BLOCK, NUM_BLOCKS=num_blocks, BLOCKS=triton.next_power_of_2(num_blocks),
        LIST=next(size for size in LIST_SIZES if size >= most), num_warps=8,
    )  # fmt: skip


def asked_rows(rows: SampledRows, ids: Tensor, out_SW: Tensor, first: int, most: int) -> None:
    """The log-probabilities of given ids, of what the row's own log-probability is of, as bits from column `first` on.

    ids     int32 [slots, *], of which as many count as the slot's parameters say, at most `most`; or [S], one per row.
            One outside the vocabulary has log-probability -inf
    """
    tensors, flags = _common(rows)
    num_rows, vocab_size = rows.logits_SV.shape
    is_table = ids.ndim == 2
    _asked_kernel[(num_rows, triton.cdiv(most, _ASKED))](
        *tensors, ids, rows.workspace.norms_R2, out_SW, *flags, out_SW.stride(0), first,
        ids.stride(0) if is_table else 0, int(not is_table),
        VOCAB=vocab_size, BLOCK_A=_ASKED, num_warps=4,
    )  # fmt: skip
