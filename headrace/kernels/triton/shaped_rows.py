"""Logits reshaped by what a sequence asked for: bias, stop-id mask and penalties. Owns the copies' kernels and layouts.

Rows that are reshaped get a place in a buffer of copies; other kernels read a row from there if it has a place. Meaning
and order are those of `headrace.sampling.slot_state`: bias and mask, repetition penalty, presence and frequency.

A slot's *words* (int32, `pack_shaping`): number of entries, min_length, repetition, presence and frequency penalty
(float32 bits), whether penalties act; then at `HEADER_WORDS` per entry a token and its bias (float32 bits). A stop id
is written as -1 - id: it has no probability while the new token's position is below min_length.

A slot's *counts* (int16 [V], read as unsigned): 0 for a token never seen, else one more than how often it was
generated, at most 65,534 times.

Legend: S rows, V vocabulary, C copies.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.types.sampling_params import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS

UNSHAPED = -1
"""Place of a row that is read from the model's logits."""
SKIPPED = -2
"""Place of a row that a launch leaves alone."""

HEADER_WORDS = 8
MAX_ENTRIES = MAX_LOGIT_BIAS + 2 * MAX_STOP_TOKEN_IDS
"""Biased tokens and stop ids of a slot; the end-of-sequence ids of a model come on top of a request's."""
SHAPING_WORDS = HEADER_WORDS + 2 * MAX_ENTRIES

_MAX_COUNT_WORD = 0xFFFF
_BLOCK = 4096
_ENTRIES = 512


@dataclass(frozen=True)
class ShapedRows:
    """copies float32 [C, V], and per row of a launch its place there, UNSHAPED or SKIPPED: int32 [S]."""

    copies_CV: Tensor
    places_S: Tensor


@triton.jit
def place_of(slots_ptr, places_ptr, row, HAS_PLACES: tl.constexpr):
    """A row's slot (below 0: leave it alone) and its place among the copies (below 0: it has none)."""
    slot = tl.load(slots_ptr + row)
    place = slot * 0 - 1
    if HAS_PLACES:
        place = tl.load(places_ptr + row)
        slot = tl.where(place < -1, -1, slot)
    return slot, place


@triton.jit
def _penalised(x, word, repetition, presence, frequency):
    count = tl.maximum(word - 1, 0).to(tl.float32)
    repeated = tl.where(x > 0.0, tl.div_rn(x, repetition), x * repetition)
    lowered = repeated - count * frequency - tl.where(count > 0.0, presence, 0.0)
    return tl.where(word > 0, lowered, x)


@triton.jit
def _count_words(counts_ptr, tokens, mask):
    return tl.load(counts_ptr + tokens, mask=mask, other=0).to(tl.int32) & 0xFFFF


@triton.jit(do_not_specialize_on_alignment=["slots_ptr", "positions_ptr", "places_ptr"])
def _shape_kernel(
    logits_ptr, copies_ptr, places_ptr, slots_ptr, positions_ptr, words_ptr, counts_ptr,
    VOCAB: tl.constexpr, BLOCK_V: tl.constexpr, WORDS: tl.constexpr, HEADER: tl.constexpr, ENTRIES: tl.constexpr,
    SCORING: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    slot = tl.load(slots_ptr + row)
    place = tl.load(places_ptr + row)
    if (slot < 0) | (place < 0):
        return
    words_ptr += slot.to(tl.int64) * WORDS
    counts_ptr += slot.to(tl.int64) * VOCAB
    logits_ptr += row.to(tl.int64) * VOCAB
    copies_ptr += place.to(tl.int64) * VOCAB
    num_entries = tl.load(words_ptr)
    repetition = tl.load(words_ptr + 2).to(tl.float32, bitcast=True)
    presence = tl.load(words_ptr + 3).to(tl.float32, bitcast=True)
    frequency = tl.load(words_ptr + 4).to(tl.float32, bitcast=True)
    has_penalties = (tl.load(words_ptr + 5) != 0) & (not SCORING)
    is_masked = (tl.load(positions_ptr + row) < tl.load(words_ptr + 1)) & (not SCORING)
    start = tl.program_id(0) * BLOCK_V
    tokens = start + tl.arange(0, BLOCK_V)
    x = tl.load(logits_ptr + tokens, mask=tokens < VOCAB, other=0.0)
    if has_penalties:
        x = _penalised(x, _count_words(counts_ptr, tokens, tokens < VOCAB), repetition, presence, frequency)
    tl.store(copies_ptr + tokens, x, mask=tokens < VOCAB)
    if num_entries > 0:
        tl.debug_barrier()  # the stores below replace some of those above
        for first in range(0, num_entries, ENTRIES):
            entries = first + tl.arange(0, ENTRIES)
            entry_ptr = words_ptr + HEADER + 2 * entries
            code = tl.load(entry_ptr, mask=entries < num_entries, other=0)
            bias = tl.load(entry_ptr + 1, mask=entries < num_entries, other=0).to(tl.float32, bitcast=True)
            token = tl.where(code < 0, -1 - code, code)
            mask = (entries < num_entries) & (token >= start) & (token < start + BLOCK_V)
            value = tl.load(logits_ptr + token, mask=mask, other=0.0) + bias
            # What is not finite stays in sight: the row has to come out as NaN.
            value = tl.where((code < 0) & is_masked & (value < float("inf")), float("-inf"), value)
            if has_penalties:
                value = _penalised(value, _count_words(counts_ptr, token, mask), repetition, presence, frequency)
            tl.store(copies_ptr + token, value, mask=mask)


def shape_rows(
    logits_SV: Tensor,
    shaped: ShapedRows,
    slots_S: Tensor,
    positions_S: Tensor,
    slot_words: Tensor,
    slot_counts: Tensor,
    *,
    scoring: bool = False,
) -> None:
    """Write the reshaped copy of every row that has a place.

    logits_SV     float32, contiguous; not changed
    slots_S, positions_S   int32; a row whose slot is below 0 is skipped
    slot_words    int32 [slots, SHAPING_WORDS]
    slot_counts   int16 [slots, V]
    scoring       only the bias acts, as for prompt positions
    """
    num_rows, vocab_size = logits_SV.shape
    _shape_kernel[(triton.cdiv(vocab_size, _BLOCK), num_rows)](
        logits_SV, shaped.copies_CV, shaped.places_S, slots_S, positions_S, slot_words, slot_counts,
        VOCAB=vocab_size, BLOCK_V=_BLOCK, WORDS=SHAPING_WORDS, HEADER=HEADER_WORDS, ENTRIES=_ENTRIES, SCORING=scoring,
        num_warps=8,
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["rows_ptr", "masks_ptr", "places_ptr"])
def _mask_kernel(
    copies_ptr, places_ptr, rows_ptr, masks_ptr, VOCAB: tl.constexpr, BLOCK_V: tl.constexpr, WORDS: tl.constexpr
):
    place = tl.load(places_ptr + tl.load(rows_ptr + tl.program_id(1)))
    if place < 0:
        return
    tokens = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    word = tl.load(masks_ptr + tl.program_id(1) * WORDS + tokens // 32, mask=tokens < VOCAB, other=0)
    copies_ptr += place.to(tl.int64) * VOCAB
    x = tl.load(copies_ptr + tokens, mask=tokens < VOCAB, other=0.0)
    is_forbidden = ((word >> (tokens % 32)) & 1) == 0
    # What is not finite stays in sight, as above.
    tl.store(copies_ptr + tokens, float("-inf"), mask=(tokens < VOCAB) & is_forbidden & (x < float("inf")))


def mask_rows(shaped: ShapedRows, rows_M: Tensor, masks_MW: Tensor) -> None:
    """Take tokens from the copies of rows: of `rows_M` (int32) those whose bit in `masks_MW` (int32) is not set."""
    vocab_size = shaped.copies_CV.shape[1]
    _mask_kernel[(triton.cdiv(vocab_size, _BLOCK), len(rows_M))](
        shaped.copies_CV, shaped.places_S, rows_M, masks_MW,
        VOCAB=vocab_size, BLOCK_V=_BLOCK, WORDS=masks_MW.shape[1], num_warps=8,
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["slots_ptr", "tokens_ptr", "places_ptr"])
def _count_kernel(
    tokens_ptr, slots_ptr, places_ptr, words_ptr, counts_ptr, VOCAB: tl.constexpr, WORDS: tl.constexpr,
    GREATEST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row)
    if (slot < 0) | (tl.load(places_ptr + row) < 0):
        return
    if tl.load(words_ptr + slot.to(tl.int64) * WORDS + 5) != 0:
        count_ptr = counts_ptr + slot.to(tl.int64) * VOCAB + tl.load(tokens_ptr + row)
        word = tl.load(count_ptr).to(tl.int32) & 0xFFFF
        tl.store(count_ptr, tl.minimum(tl.maximum(word, 1) + 1, GREATEST).to(tl.int16))


def count_tokens(
    tokens_S: Tensor, slots_S: Tensor, shaped: ShapedRows, slot_words: Tensor, slot_counts: Tensor
) -> None:
    """Count the tokens (int32) just sampled by rows that have a place, where penalties act. Slots are distinct."""
    _count_kernel[(len(tokens_S),)](
        tokens_S, slots_S, shaped.places_S, slot_words, slot_counts,
        VOCAB=slot_counts.shape[1], WORDS=SHAPING_WORDS, GREATEST=_MAX_COUNT_WORD, num_warps=1,
    )  # fmt: skip


def pack_shaping(
    penalties: tuple[float, float, float],
    logit_bias: tuple[tuple[int, float], ...],
    stop_ids: tuple[int, ...],
    min_length: int,
) -> npt.NDArray[np.int32]:
    """A slot's words, as many as are in use. `penalties` are repetition, presence and frequency; ids are below V."""
    biases = dict.fromkeys(stop_ids, 0.0) | dict(logit_bias)
    assert len(biases) <= MAX_ENTRIES, f"{len(biases)} tokens are biased or masked"
    words = np.zeros(HEADER_WORDS + 2 * len(biases), np.int32)
    words[:2] = len(biases), min_length
    words[2:5] = np.array(penalties, np.float32).view(np.int32)
    words[5] = penalties != (1.0, 0.0, 0.0)
    masked = frozenset(stop_ids)
    words[HEADER_WORDS::2] = [-1 - token if token in masked else token for token in biases]
    words[HEADER_WORDS + 1 :: 2] = np.array(list(biases.values()), np.float32).view(np.int32)
    return words


def count_seen(
    prompt: npt.NDArray[np.int32], output: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """The distinct tokens of a sequence and the words they have in its slot's counts."""
    ids, inverse = np.unique(np.concatenate((prompt, output)), return_inverse=True)
    counts = np.bincount(inverse[len(prompt) :], minlength=len(ids)) + 1
    words = np.minimum(counts, _MAX_COUNT_WORD).astype(np.uint16).view(np.int16)
    return ids.astype(np.int32), words.astype(np.int32)


def fill_counts(counts_V: Tensor, seen_2N: Tensor) -> None:
    """Set a slot's counts to what `count_seen` gave, stacked: int32 [2, n] on the device."""
    counts_V.zero_()
    counts_V.index_put_((seen_2N[0].long(),), seen_2N[1].to(torch.int16))
