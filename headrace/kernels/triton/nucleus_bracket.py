"""Where a row's nucleus ends, to within a few values: a guess, then one look at the row that makes the guess certain.

Owns the two kernels between a row's survey and `threshold_search`, which settles the threshold, or searches anew where
the guess was wrong. Wanted is the greatest t such that the values >= t weigh `top_p` of all.

The *guess* needs little of the row. What all of it weighs is known from the survey. What values >= t weigh is known of
those that are the greatest of their group, and estimated of the others from `SAMPLE` values at fixed columns, whose
ratios are scaled to what the others weigh in all. Where all of the weight is on a few values those are known, and where
it is spread over many the sample is a good one. t is guessed to lie in [a, c), several standard errors of that estimate
around b; and where few values lie above it, in the range of as many as can be kept.

The *look* leaves of every block what its values >= b and >= c weigh, and the values in [a, b) and in [b, c), as far as
there is room. Groups whose greatest value is below a are not read. The values of a block come in any order, so whoever
adds up what they weigh has to do that in integers.

Legend: R rows, B blocks of a row, E values kept of a block and side.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.triton.logits_processors import ProcessedRows, drawn_row, load_logits, slot_and_copy
from headrace.kernels.triton.row_survey import BLOCK, GROUP, RowSurvey, group_of, is_surveyed, token_of, weigh
from headrace.kernels.triton.slot_params import TEMPERATURE, TOP_P, load_param

SAMPLE = 8192
"""Values of a row that are looked at for a guess."""
KEPT = 8192
"""Values of a row that can be kept from each side of a guess, shared evenly between its blocks."""

TOP, WANTED, FIRST, SECOND, THIRD, INVERSE = (tl.constexpr(word) for word in range(6))
"""Of a bracket: the row's greatest value, the weight wanted in units of its, a (+inf: there is nothing to look for), b
and c, and 1 / T."""
BRACKET_WORDS = tl.constexpr(8)

NUM_STRIDE = tl.constexpr(32)
"""Between the numbers of blocks: those that are counted up at once lie on lines of their own."""

_NEIGHBOURS = tl.constexpr(8)  # of the sample: as many as memory is read in
_ERRORS = tl.constexpr(4.0)  # standard errors between b and the ends
_REACH = tl.constexpr(32.0)  # in units of T: what weighs less than exp(-32) of the greatest is never needed
_HALVINGS = tl.constexpr(13)  # of the reach, until b is found
_FEW = tl.constexpr(256)  # groups: as many as reach a, at least
_SPAN = tl.constexpr(2.0)  # in units of T: of [a, b) and [b, c) at most
_SPAN_HALVINGS = tl.constexpr(9)
_WARPS, _GUESS_REGISTERS, _LOOK_REGISTERS = 8, 128, 80  # two and three programs have room on a multiprocessor
LEAST = tl.constexpr(1e-30)
_ROUNDING = tl.constexpr(1e-5)  # of the wanted weight, what sums in another order may come to


@dataclass(frozen=True)
class NucleusBracket:
    """bracket float32 [R, BRACKET_WORDS]; weights float32 [R, B, 2], what values >= b and >= c of a block weigh; nums
    int32 [R, 2, B, NUM_STRIDE], in the first how many of them lie in [a, b) and in [b, c); values float32 [R, 2, B, E],
    those."""

    bracket_RW: Tensor
    weights_RB2: Tensor
    nums_R2BN: Tensor
    values_R2BE: Tensor

    @classmethod
    def make(cls, max_rows: int, vocab_size: int, device: torch.device) -> NucleusBracket:
        """Allocate for `max_rows` rows of `vocab_size` logits."""
        num_blocks = triton.cdiv(vocab_size, BLOCK)
        kept = 2, num_blocks, KEPT // num_blocks
        shapes = (BRACKET_WORDS.value,), (num_blocks, 2), (2, num_blocks, NUM_STRIDE.value), kept
        dtypes = torch.float32, torch.float32, torch.int32, torch.float32
        both = zip(shapes, dtypes, strict=True)
        return cls(*(torch.empty(max_rows, *shape, dtype=dtype, device=device) for shape, dtype in both))


@triton.jit
def _total(peaks_ptr, top, inverse, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr):
    """What a row weighs."""
    blocks = tl.arange(0, BLOCKS)
    mask = blocks < NUM_BLOCKS
    peaks = tl.load(peaks_ptr + 2 * blocks, mask=mask, other=float("-inf"))
    weights = tl.load(peaks_ptr + 2 * blocks + 1, mask=mask, other=0.0)
    return tl.sum(weigh(peaks, top, inverse) * weights, 0)


@triton.jit
def _sampled(row_ptr, maxima_ptr, top, inverse, VOCAB: tl.constexpr, NUM_BLOCKS: tl.constexpr, SIZE: tl.constexpr):
    """SIZE values of a row, and what they weigh: nothing, if they are the greatest of their group."""
    index = tl.arange(0, SIZE)
    near = index // _NEIGHBOURS * (VOCAB // _NEIGHBOURS) // (SIZE // _NEIGHBOURS)
    columns = near * _NEIGHBOURS + index % _NEIGHBOURS
    x = load_logits(row_ptr, columns, VOCAB)
    greatest = tl.load(maxima_ptr + group_of(columns, NUM_BLOCKS), mask=columns < VOCAB, other=float("-inf"))
    return x, tl.where(x < greatest, weigh(x, top, inverse), 0.0)


@triton.jit
def _estimated(maxima, held, sample, weights, scale, t):
    """What the values >= t weigh."""
    return tl.sum(tl.where(maxima >= t, held, 0.0), 0) + scale * tl.sum(tl.where(sample >= t, weights, 0.0), 0)


@triton.jit
def _guess(maxima, held, sample, weights, total, top, temperature, wanted):
    """a, b and c."""
    all_weights = tl.maximum(tl.sum(weights, 0), LEAST)
    scale = tl.maximum(total - tl.sum(held, 0), 0.0) / all_weights
    b = top - _REACH * temperature
    few = b
    b_high = top
    few_high = top
    for _ in range(_HALVINGS):
        middle = b + 0.5 * (b_high - b)
        is_enough = _estimated(maxima, held, sample, weights, scale, middle) >= wanted
        b = tl.where(is_enough, middle, b)
        b_high = tl.where(is_enough, b_high, middle)
        middle = few + 0.5 * (few_high - few)
        are_enough = tl.sum(tl.where(maxima >= middle, 1, 0), 0) >= _FEW
        few = tl.where(are_enough, middle, few)
        few_high = tl.where(are_enough, few_high, middle)
    reaching = tl.where(sample >= b, weights, 0.0)
    deviation = reaching - weights * (tl.sum(reaching, 0) / all_weights)
    slack = _ERRORS * scale * tl.sqrt(tl.sum(deviation * deviation, 0)) + _ROUNDING * wanted
    a = b - _SPAN * temperature
    below_c = b
    a_high = b
    c = b + _SPAN * temperature
    for _ in range(_SPAN_HALVINGS):
        middle = a + 0.5 * (a_high - a)
        is_enough = _estimated(maxima, held, sample, weights, scale, middle) >= wanted + slack
        a = tl.where(is_enough, middle, a)
        a_high = tl.where(is_enough, a_high, middle)
        middle = below_c + 0.5 * (c - below_c)
        is_enough = _estimated(maxima, held, sample, weights, scale, middle) >= wanted - slack
        below_c = tl.where(is_enough, middle, below_c)
        c = tl.where(is_enough, c, middle)
    if few < b:
        a = tl.minimum(a, few)
        c = float("inf")
    return a, b, c


@triton.jit(do_not_specialize_on_alignment=["slots_ptr", "copy_of_ptr"])
def _guess_kernel(
    logits_ptr, copies_ptr, copy_of_ptr, params_ptr, slots_ptr, maxima_ptr, peaks_ptr, bracket_ptr, nums_ptr,
    VOCAB: tl.constexpr, GROUPS: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot, copy = slot_and_copy(slots_ptr, copy_of_ptr, row, True)
    maxima_ptr += row * NUM_BLOCKS * GROUPS
    peaks_ptr += row * NUM_BLOCKS * 2
    bracket_ptr += row * BRACKET_WORDS
    tl.store(bracket_ptr + FIRST, float("inf"))
    if slot < 0:
        return
    if is_surveyed(params_ptr, slot, VOCAB) == 0:
        return
    groups = tl.arange(0, BLOCKS * GROUPS)
    maxima = tl.load(maxima_ptr + groups, mask=groups < NUM_BLOCKS * GROUPS, other=float("-inf"))
    top = tl.max(maxima, 0)
    tl.store(bracket_ptr + TOP, top)
    top_p = load_param(params_ptr, slot, TOP_P)
    if (top_p < 1.0) & (top < float("inf")) & (top > float("-inf")):
        temperature = load_param(params_ptr, slot, TEMPERATURE)
        inverse = 1.0 / temperature
        total = _total(peaks_ptr, top, inverse, NUM_BLOCKS, BLOCKS)
        row_ptr = drawn_row(logits_ptr, copies_ptr, row, copy, VOCAB, True)
        sample, weights = _sampled(row_ptr, maxima_ptr, top, inverse, VOCAB, NUM_BLOCKS, SIZE)
        wanted = tl.maximum(top_p * total, LEAST)  # more than the weight of nothing, which is beyond c
        a, b, c = _guess(maxima, weigh(maxima, top, inverse), sample, weights, total, top, temperature, wanted)
        tl.store(bracket_ptr + WANTED, wanted)
        tl.store(bracket_ptr + FIRST, a)
        tl.store(bracket_ptr + SECOND, b)
        tl.store(bracket_ptr + THIRD, c)
        tl.store(bracket_ptr + INVERSE, inverse)
        sides = tl.arange(0, 2 * BLOCKS)
        tl.store(nums_ptr + (2 * row * NUM_BLOCKS + sides) * NUM_STRIDE, sides * 0, mask=sides < 2 * NUM_BLOCKS)


@triton.jit(do_not_specialize_on_alignment=["copy_of_ptr"])
def _look_kernel(
    logits_ptr, copies_ptr, copy_of_ptr, maxima_ptr, bracket_ptr, weights_ptr, nums_ptr, values_ptr,
    VOCAB: tl.constexpr, BLOCK_V: tl.constexpr, GROUP_V: tl.constexpr, NUM_BLOCKS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    row = tl.program_id(1)
    bracket_ptr += row * BRACKET_WORDS
    a = tl.load(bracket_ptr + FIRST)
    if a == float("inf"):
        return
    index = tl.arange(0, BLOCK_V)
    group = index // GROUP_V
    has_any = tl.load(maxima_ptr + (row * NUM_BLOCKS + block) * (BLOCK_V // GROUP_V) + group) >= a
    weight_b = 0.0
    weight_c = 0.0
    if tl.max(has_any.to(tl.int32), 0) > 0:
        b = tl.load(bracket_ptr + SECOND)
        c = tl.load(bracket_ptr + THIRD)
        row_ptr = drawn_row(logits_ptr, copies_ptr, row, tl.load(copy_of_ptr + row), VOCAB, True)
        # Two by two the other way round: what no thread can load at once stays in the threads that write it.
        tokens = token_of(block, group, index % GROUP_V ^ 1, NUM_BLOCKS)
        x = tl.load(row_ptr + tokens, mask=has_any & (tokens < VOCAB), other=float("-inf")).to(tl.float32)
        weights = weigh(x, tl.load(bracket_ptr + TOP), tl.load(bracket_ptr + INVERSE))
        weight_b = tl.sum(tl.where(x >= b, weights, 0.0), 0)
        weight_c = tl.sum(tl.where(x >= c, weights, 0.0), 0)
        is_inside = (x >= a) & (x < c)
        target = (2 * row + tl.where(x >= b, 1, 0)) * NUM_BLOCKS + block
        place = tl.atomic_add(
            nums_ptr + target * NUM_STRIDE, tl.full([BLOCK_V], 1, tl.int32), mask=is_inside, sem="relaxed"
        )
        tl.store(values_ptr + target * SIZE + place, x, mask=is_inside & (place < SIZE))
    tl.store(weights_ptr + 2 * (row * NUM_BLOCKS + block), weight_b)
    tl.store(weights_ptr + 2 * (row * NUM_BLOCKS + block) + 1, weight_c)


def bracket_nuclei(
    logits_SV: Tensor,
    slot_params: Tensor,
    slots_S: Tensor,
    processed: ProcessedRows,
    survey: RowSurvey,
    found: NucleusBracket,
) -> None:
    """Bracket the nucleus of every row that has a survey and a top-p; of all that have one, the greatest value is left.

    What is given is as in `find_thresholds`.
    """
    num_rows, vocab_size = logits_SV.shape
    num_blocks = triton.cdiv(vocab_size, BLOCK)
    rows = logits_SV, processed.copies_SV, processed.copy_of_S
    _guess_kernel[(num_rows,)](
        *rows, slot_params, slots_S, survey.maxima_RBG, survey.peaks_RB2, found.bracket_RW, found.nums_R2BN,
        VOCAB=vocab_size, GROUPS=BLOCK // GROUP, NUM_BLOCKS=num_blocks, BLOCKS=triton.next_power_of_2(num_blocks),
        SIZE=SAMPLE, num_warps=_WARPS, maxnreg=_GUESS_REGISTERS,
    )  # fmt: skip
    _look_kernel[(num_blocks, num_rows)](
        *rows, survey.maxima_RBG, found.bracket_RW, found.weights_RB2, found.nums_R2BN, found.values_R2BE,
        VOCAB=vocab_size, BLOCK_V=BLOCK, GROUP_V=GROUP, NUM_BLOCKS=num_blocks, SIZE=KEPT // num_blocks,
        num_warps=_WARPS, maxnreg=_LOOK_REGISTERS,
    )  # fmt: skip
