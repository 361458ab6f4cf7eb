"""Which tokens could have been drawn by rows that were just sampled, as bits. Owns one kernel over their logits.

A token could have been drawn if its logit reaches the row's threshold and is not -inf; in a greedy row it is the one
that was. A row's bits are a function of that row alone.

Legend: S rows, V vocabulary, W int32 of a row of results.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.triton.logits_processors import drawn_row, load_logits, slot_and_copy
from headrace.kernels.triton.slot_params import TEMPERATURE, load_param
from headrace.kernels.triton.top_rows import SampledRows

_WORDS = 64  # of one program
_BITS = tl.constexpr(32)


@triton.jit(
    do_not_specialize=["has_thresholds", "out_stride", "first"],
    do_not_specialize_on_alignment=["slots_ptr", "copy_of_ptr", "tokens_ptr"],
)
def _kept_kernel(
    logits_ptr, copies_ptr, copy_of_ptr, thresholds_ptr, params_ptr, slots_ptr, tokens_ptr, out_ptr,
    has_thresholds, out_stride, first,
    VOCAB: tl.constexpr, NUM_WORDS: tl.constexpr, WORDS: tl.constexpr, HAS_COPIES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot, copy = slot_and_copy(slots_ptr, copy_of_ptr, row, HAS_COPIES)
    if slot < 0:
        return
    words = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    bits = tl.arange(0, _BITS)
    ids = words[:, None] * _BITS + bits[None, :]
    x = load_logits(drawn_row(logits_ptr, copies_ptr, row, copy, VOCAB, HAS_COPIES), ids, VOCAB)
    threshold = float("-inf")
    if has_thresholds:
        threshold = tl.load(thresholds_ptr + row)
    is_kept = (x >= threshold) & (x > float("-inf"))
    if load_param(params_ptr, slot, TEMPERATURE) <= 0.0:
        is_kept = ids == tl.load(tokens_ptr + row)
    found = tl.sum(is_kept.to(tl.int32) << bits[None, :], 1)  # each bit once: a sum is what sets them
    tl.store(out_ptr + row.to(tl.int64) * out_stride + first + words, found, mask=words < NUM_WORDS)


def num_words(vocab_size: int) -> int:
    """How many int32 have a bit for each token."""
    return triton.cdiv(vocab_size, _BITS.value)


def kept_rows(rows: SampledRows, out_SW: Tensor, first: int) -> None:
    """Write the bits of each row from column `first` of out_SW (int32) on: bit i of word j is of token 32 j + i.

    Rows that are skipped are left alone. NaN could not have been drawn.
    """
    num_rows, vocab_size = rows.logits_SV.shape
    copies, copy_of = rows.logits_SV, rows.slots_S
    if rows.processed is not None:
        copies, copy_of = rows.processed.copies_SV, rows.processed.copy_of_S
    thresholds = rows.slot_params if rows.thresholds_S is None else rows.thresholds_S
    _kept_kernel[(num_rows, triton.cdiv(num_words(vocab_size), _WORDS))](
        rows.logits_SV, copies, copy_of, thresholds, rows.slot_params, rows.slots_S, rows.tokens_S, out_SW,
        int(rows.thresholds_S is not None), out_SW.stride(0), first,
        VOCAB=vocab_size, NUM_WORDS=num_words(vocab_size), WORDS=_WORDS, HAS_COPIES=rows.processed is not None,
        num_warps=4,
    )  # fmt: skip
