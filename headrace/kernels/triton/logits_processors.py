"""Logits processors on the device: bias, masks and penalties. Owns their kernel and the layout of their tables.

One look at a step's logits does all of it. Rows that a processor acts on get a processed copy, and other kernels read a
row from its copy if it has one; rows whose nucleus is wanted get a survey (`row_survey`). A row that wants neither is
not read. Meaning and order are those of `headrace.sampling.slot_state`: bias and mask of stop ids, repetition penalty,
presence and frequency; a mask of allowed tokens comes last.

A slot's processors (int32, `pack_processors`) are the header named here, then at `HEADER_SIZE` per entry a token and
its bias (float32 bits). A stop id is written as -1 - id: it has no probability while the new token's position is below
the least length. Its parameters say whether the table means anything, so that a slot without processors writes none. A
slot's counts (int16 [V], read as unsigned) are 0 for a token never seen, else one more than how often it was generated,
at most 65,534 times (`last_tokens`).

Legend: S rows, V vocabulary.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.triton.row_survey import (
    BLOCK,
    GROUP,
    RowSurvey,
    block_of,
    is_surveyed,
    leave_survey,
    token_of,
)
from headrace.kernels.triton.slot_params import (
    OF_MODEL,
    PROCESSED,
    PROCESSORS,
    TEMPERATURE,
    UNPROCESSED,
    load_param,
)
from headrace.types.request import Int32Array
from headrace.types.sampling_params import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS

NO_COPY = -1
"""Copy of a row that is read from the model's logits."""

MAX_ENTRIES = MAX_LOGIT_BIAS + 2 * MAX_STOP_TOKEN_IDS
"""Biased tokens and stop ids of a slot; the end-of-sequence ids of a model come on top of a request's."""

_NUM_ENTRIES = tl.constexpr(0)
_MIN_LENGTH = tl.constexpr(1)
_REPETITION = tl.constexpr(2)  # float32 bits, as the next two
_PRESENCE = tl.constexpr(3)
_FREQUENCY = tl.constexpr(4)
HAS_PENALTIES = tl.constexpr(5)
HEADER_SIZE = tl.constexpr(8)
PROCESSORS_SIZE = HEADER_SIZE.value + 2 * MAX_ENTRIES
SLOT_WORDS = tl.constexpr(PROCESSORS_SIZE)

MAX_COUNT = tl.constexpr(0xFFFF)
_ENTRIES = 512  # at a time
_WARPS, _REGISTERS = 8, 64  # four programs have room on a multiprocessor


@dataclass(frozen=True)
class ProcessedRows:
    """copies float32 [S, V], and per row its own number or NO_COPY: int32 [S], of rows that are not skipped."""

    copies_SV: Tensor
    copy_of_S: Tensor

    @classmethod
    def make(cls, max_rows: int, vocab_size: int, device: torch.device) -> ProcessedRows:
        """Room for copies of `max_rows` rows."""
        copies = torch.empty(max_rows, vocab_size, dtype=torch.float32, device=device)
        return cls(copies, torch.empty(max_rows, dtype=torch.int32, device=device))

    def first(self, num_rows: int) -> ProcessedRows:
        """The room of so many rows."""
        return ProcessedRows(self.copies_SV[:num_rows], self.copy_of_S[:num_rows])


@dataclass(frozen=True)
class SlotProcessors:
    """Tables of the slots: processors int32 [slots, PROCESSORS_SIZE], counts int16 [slots, V]."""

    processors: Tensor
    counts: Tensor


@dataclass(frozen=True)
class AllowedTokens:
    """Of some rows the tokens that may be drawn: masks int32 [M, W], bit i of word j for token 32 j + i, and per row of
    a launch the number of its mask or -1: int32 [S]."""

    masks_MW: Tensor
    mask_of_S: Tensor


@triton.jit
def slot_and_copy(slots_ptr, copy_of_ptr, row, HAS_COPIES: tl.constexpr):
    """A row's slot (below 0: leave it alone) and the index of its copy (below 0: it has none)."""
    slot = tl.load(slots_ptr + row)
    copy = slot * 0 - 1
    if HAS_COPIES:
        copy = tl.load(copy_of_ptr + row)
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


@triton.jit
def _masked(x, tokens, mask_ptr, VOCAB: tl.constexpr):
    """-inf for what is not allowed; what is not finite stays in sight: the row has to come out as NaN."""
    word = tl.load(mask_ptr + tokens // 32, mask=tokens < VOCAB, other=0)
    is_forbidden = ((word >> (tokens % 32)) & 1) == 0
    return tl.where(is_forbidden & (x < float("inf")), float("-inf"), x)


@triton.jit(do_not_specialize_on_alignment=["slots_ptr", "owners_ptr", "positions_ptr", "copy_of_ptr", "mask_of_ptr"])
def _process_kernel(
    logits_ptr, copies_ptr, copy_of_ptr, params_ptr, slots_ptr, owners_ptr, positions_ptr, processors_ptr, counts_ptr,
    masks_ptr, mask_of_ptr, maxima_ptr, peaks_ptr,
    VOCAB: tl.constexpr, BLOCK_V: tl.constexpr, GROUP_V: tl.constexpr, NUM_BLOCKS: tl.constexpr,
    ENTRIES: tl.constexpr, WORDS: tl.constexpr, SCORING: tl.constexpr, HAS_MASKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    row = tl.program_id(1)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    owner = tl.load(owners_ptr + row).to(tl.int64)
    processors_ptr += owner * SLOT_WORDS
    counts_ptr += owner * VOCAB
    kind = load_param(params_ptr, slot, PROCESSORS)
    is_stopped = (tl.load(positions_ptr + row) < tl.load(processors_ptr + _MIN_LENGTH)) & (not SCORING)
    is_stopped &= kind != UNPROCESSED
    is_processed = (kind == PROCESSED) | is_stopped
    if HAS_MASKS:
        mask_row = tl.load(mask_of_ptr + row)
        masks_ptr += mask_row.to(tl.int64) * WORDS
        is_processed |= mask_row >= 0
    if block == 0:
        tl.store(copy_of_ptr + row, tl.where(is_processed, row, -1))
    surveyed = is_surveyed(params_ptr, slot, VOCAB)
    if (is_processed | surveyed) == 0:
        return
    logits_ptr += row.to(tl.int64) * VOCAB
    copies_ptr += row.to(tl.int64) * VOCAB
    groups = tl.arange(0, BLOCK_V // GROUP_V)
    tokens = token_of(block, groups[:, None], tl.arange(0, GROUP_V)[None, :], NUM_BLOCKS)
    x = load_logits(logits_ptr, tokens, VOCAB)
    if is_processed:
        has_penalties = (kind != UNPROCESSED) & (tl.load(processors_ptr + HAS_PENALTIES) != 0) & (not SCORING)
        num_entries = tl.where(kind != UNPROCESSED, tl.load(processors_ptr + _NUM_ENTRIES), 0)
        repetition = tl.load(processors_ptr + _REPETITION).to(tl.float32, bitcast=True)
        presence = tl.load(processors_ptr + _PRESENCE).to(tl.float32, bitcast=True)
        frequency = tl.load(processors_ptr + _FREQUENCY).to(tl.float32, bitcast=True)
        if has_penalties:
            x = _penalised(x, _load_counts(counts_ptr, tokens, tokens < VOCAB), repetition, presence, frequency)
        if HAS_MASKS and mask_row >= 0:
            x = _masked(x, tokens, masks_ptr, VOCAB)
        tl.store(copies_ptr + tokens, x, mask=tokens < VOCAB)
        if num_entries > 0:
            tl.debug_barrier()  # the stores below replace some of those above
            for first in range(0, num_entries, ENTRIES):
                entries = first + tl.arange(0, ENTRIES)
                entry_ptr = processors_ptr + HEADER_SIZE + 2 * entries
                code = tl.load(entry_ptr, mask=entries < num_entries, other=0)
                bias = tl.load(entry_ptr + 1, mask=entries < num_entries, other=0).to(tl.float32, bitcast=True)
                token = tl.where(code < 0, -1 - code, code)
                mask = (entries < num_entries) & (block_of(token, NUM_BLOCKS) == block)
                value = tl.load(logits_ptr + token, mask=mask, other=0.0) + bias
                value = tl.where((code < 0) & is_stopped & (value < float("inf")), float("-inf"), value)  # as _masked
                if has_penalties:
                    value = _penalised(value, _load_counts(counts_ptr, token, mask), repetition, presence, frequency)
                if HAS_MASKS and mask_row >= 0:
                    value = _masked(value, token, masks_ptr, VOCAB)
                tl.store(copies_ptr + token, value, mask=mask)
            tl.debug_barrier()
            x = load_logits(copies_ptr, tokens, VOCAB)
    if surveyed:
        inverse = 1.0 / load_param(params_ptr, slot, TEMPERATURE)
        leave_survey(x, maxima_ptr, peaks_ptr, row * NUM_BLOCKS + block, inverse)


def process_rows(
    logits_SV: Tensor,
    processed: ProcessedRows,
    survey: RowSurvey,
    slots_S: Tensor,
    positions_S: Tensor,
    slot_params: Tensor,
    tables: SlotProcessors,
    allowed: AllowedTokens | None = None,
    scored_S: Tensor | None = None,
) -> None:
    """Write the processed copy of every row that a processor acts on, and the survey of every row that is to have one.

    logits_SV     float32, contiguous; not changed
    slots_S, positions_S   int32; a row whose slot is below 0 is skipped
    slot_params   as `slot_params` has them
    allowed       masks that some rows have beside those
    scored_S      int32, of prompt positions: the slot whose bias acts, and nothing else of it does. `slots_S` then says
                  only which row of `slot_params` is read
    """
    num_rows, vocab_size = logits_SV.shape
    masks, mask_of = (tables.processors, slots_S) if allowed is None else (allowed.masks_MW, allowed.mask_of_S)
    num_blocks = triton.cdiv(vocab_size, BLOCK)
    _process_kernel[(num_blocks, num_rows)](
        logits_SV, processed.copies_SV, processed.copy_of_S, slot_params, slots_S,
        slots_S if scored_S is None else scored_S, positions_S, tables.processors, tables.counts, masks, mask_of,
        survey.maxima_RBG, survey.peaks_RB2,
        VOCAB=vocab_size, BLOCK_V=BLOCK, GROUP_V=GROUP, NUM_BLOCKS=num_blocks, ENTRIES=_ENTRIES,
        WORDS=masks.shape[-1], SCORING=scored_S is not None, HAS_MASKS=allowed is not None, num_warps=_WARPS,
        maxnreg=_REGISTERS,
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
    header[_REPETITION:HAS_PENALTIES] = np.array(penalties, np.float32).view(np.int32)
    header[HAS_PENALTIES] = penalties != (1.0, 0.0, 0.0)
    masked = frozenset(stop_ids)
    entries[::2] = [-1 - token if token in masked else token for token in biases]
    entries[1::2] = np.array(list(biases.values()), np.float32).view(np.int32)
    return packed


def count_seen(prompt: Int32Array, output: Int32Array) -> tuple[Int32Array, Int32Array]:
    """The distinct tokens of a sequence and their counts in its slot's table."""
    ids, inverse = np.unique(np.concatenate((prompt, output)), return_inverse=True)
    counts = np.bincount(inverse[len(prompt) :], minlength=len(ids)) + 1
    stored = np.minimum(counts, MAX_COUNT.value).astype(np.uint16).view(np.int16)
    return ids.astype(np.int32), stored.astype(np.int32)


def fill_counts(counts_V: Tensor, seen_2N: Tensor) -> None:
    """Set a slot's counts to what `count_seen` gave, stacked: int32 [2, n] on the device."""
    counts_V.zero_()
    counts_V.index_put_((seen_2N[0].long(),), seen_2N[1].to(torch.int16))
