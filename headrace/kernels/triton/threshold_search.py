"""Top-k, top-p and min-p as one threshold per row of logits, on the device and without sorting the vocabulary.

Meaning and ties are those of `headrace.sampling.thresholds`: a token stays if its logit is at least the threshold. One
program does a row. Sums are float32 in an order that the vocabulary size fixes, so a row's threshold never depends on
the batch.

Both top-k and top-p ask for *the greatest t such that the values >= t weigh `wanted`*, which `weight_search` finds.

Reading the row is what costs. Where top-k is off, `nucleus_bracket` has found a narrow [low, high) and copied what it
holds, and `bisect` settles t at once; where that was wrong or too wide, `narrow` begins with what is known of it.

Where top-k is on, the first pass keeps the three greatest values of each of its lanes (a lane sees every
`_BLOCK`-th column). Where t lies above every lane's third, whatever reaches t is among the first two of all lanes, and
`bisect` over those settles it: one pass does for a top-k of up to about 100, two for a nucleus of that size. Else
what that bisection found bounds t from below (fewer values can only weigh less), and `narrow` begins there.

Legend: S rows, V vocabulary.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.triton.logits_processors import ProcessedRows, drawn_row, slot_and_copy
from headrace.kernels.triton.nucleus_bracket import (
    BRACKET_WORDS,
    FIRST,
    KEPT,
    LEAST,
    NUM_STRIDE,
    SECOND,
    THIRD,
    TOP,
    WANTED,
    NucleusBracket,
    bracket_nuclei,
)
from headrace.kernels.triton.row_survey import RowSurvey, is_surveyed, weigh
from headrace.kernels.triton.slot_params import MIN_P, TEMPERATURE, TOP_K, TOP_P, load_param
from headrace.kernels.triton.weight_search import (
    bisect,
    collect,
    load_lanes,
    narrow,
    narrowed,
    next_above,
    quarters,
    weigh_above,
    weights_of,
)

CAPACITY = 2048
"""Values copied to be settled at once."""

_BLOCK = 2048  # lanes
_REACH = 32.0  # weights below exp(-32) of the greatest are never needed to make up a mass


@triton.jit
def _kth(
    row_ptr, scratch, best, third, top, top_k, top_p, inverse,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """(threshold, whether top_p is done with): the k-th greatest value, or -inf if there are fewer; or, where
    everything that reaches it was at hand and top_p asks for less, the nucleus of that.

    `best` holds the greatest two values of every lane, `third` the greatest that is not among them.
    """
    high = next_above(top)
    nothing = tl.full([], float("-inf"), tl.float32)
    found = bisect(best, tl.where(best > nothing, 1.0, 0.0), nothing, high, 0.0, top_k)
    threshold = found
    is_done = top_p >= 1.0
    if third < found:
        if top_p < 1.0:
            threshold = _nucleus_within(best, found, high, top, top_p, inverse)
            is_done = True
    else:
        threshold, is_done = _kth_from(row_ptr, scratch, found, high, top, top_k, top_p, inverse, VOCAB, BLOCK, CAP)
    return threshold, is_done


@triton.jit
def _nucleus_within(x, least, high, top, top_p, inverse):
    """The greatest threshold whose values of x hold top_p of the mass of those that reach `least`."""
    weight = weights_of(x, least, top, inverse)
    return bisect(x, weight, least, high, 0.0, top_p * tl.sum(weight, 0))


@triton.jit
def _kth_from(
    row_ptr, scratch, low, high, top, top_k, top_p, inverse,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """As `_kth`, where no more is known than that k values reach `low`, or that it is -inf."""
    if low == float("-inf"):
        low = _lowest(row_ptr, VOCAB, BLOCK)
    above = 0.0
    num_high = 0
    threshold = float("-inf")
    is_done = top_p >= 1.0
    x, count = collect(row_ptr, scratch, low, high, VOCAB, BLOCK, CAP)
    if count >= top_k:
        if count > CAP:
            a, b, c = quarters(low, high)
            low, high, above, num_low, num_high = narrow(
                row_ptr, low, count, a, b, c, top, top_k, float("-inf"), inverse, VOCAB, BLOCK, CAP, False
            )
            x, count = collect(row_ptr, scratch, low, high, VOCAB, BLOCK, CAP)
        threshold = low  # neighbours: every value left is `low` itself
        if count <= CAP:
            threshold = bisect(x, tl.where(x >= low, 1.0, 0.0), low, high, above, top_k)
            if (num_high == 0) & (top_p < 1.0):
                threshold = _nucleus_within(x, threshold, high, top, top_p, inverse)
                is_done = True
    return threshold, is_done


@triton.jit
def _nucleus(
    row_ptr, scratch, best, third, least, reach, top, top_p, inverse,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """The greatest threshold whose values hold top_p of the mass of those that reach `least`; at least `reach`."""
    low = tl.maximum(reach, least)
    high = next_above(top)
    total, near, _, _, num_low, _ = weigh_above(row_ptr, least, low, top, least, top, inverse, VOCAB, BLOCK, True)
    wanted = tl.maximum(top_p * total, LEAST)  # more than the weight of nothing, which is beyond high
    nothing = tl.full([], float("-inf"), tl.float32)
    threshold = bisect(best, weights_of(best, least, top, inverse), nothing, high, 0.0, wanted)
    if third >= threshold:
        threshold = least  # as in `narrowed`
        if near >= wanted:
            a, b, c = quarters(low, high)
            threshold = narrowed(
                row_ptr, scratch, low, num_low, a, b, c, top, wanted, least, inverse, VOCAB, BLOCK, CAP
            )
    return threshold


@triton.jit
def _greatest_of_lanes(row_ptr, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """The greatest three values of every lane, [BLOCK] each; -inf where a lane has fewer."""
    first = tl.full([BLOCK], float("-inf"), tl.float32)
    second = first
    third = first
    for start in tl.range(0, VOCAB, BLOCK, loop_unroll_factor=4):
        x = load_lanes(row_ptr, start, VOCAB, BLOCK)
        lesser = tl.minimum(first, x)
        first = tl.maximum(first, x)
        third = tl.maximum(third, tl.minimum(second, lesser))
        second = tl.maximum(second, lesser)
    return first, second, third


@triton.jit
def _lowest(row_ptr, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """The least value that is not -inf."""
    lows = tl.full([BLOCK], float("inf"), tl.float32)
    for start in tl.range(0, VOCAB, BLOCK, loop_unroll_factor=2):
        x = load_lanes(row_ptr, start, VOCAB, BLOCK)
        lows = tl.minimum(lows, tl.where(x == float("-inf"), float("inf"), x))
    return tl.min(lows, 0)


@triton.jit
def _bracketed(
    row_ptr, scratch, bracket_ptr, weights_ptr, nums_ptr, values_ptr, top_p, temperature, REACH: tl.constexpr,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr,
    SIZE: tl.constexpr, KEPT_V: tl.constexpr,
):  # fmt: skip
    """The end of a nucleus that was bracketed: it settles what was kept, or narrows from the guess on."""
    top = tl.load(bracket_ptr + TOP)
    wanted = tl.load(bracket_ptr + WANTED)
    blocks = tl.arange(0, BLOCKS)
    mask = blocks < NUM_BLOCKS
    above_second = tl.sum(tl.load(weights_ptr + 2 * blocks, mask=mask, other=0.0), 0)
    above_third = tl.sum(tl.load(weights_ptr + 2 * blocks + 1, mask=mask, other=0.0), 0)
    side = tl.where(above_second >= wanted, 1, 0)
    above = tl.where(above_second >= wanted, above_third, above_second)
    beyond = next_above(top)
    low = tl.load(bracket_ptr + FIRST + side)
    high = tl.minimum(tl.load(bracket_ptr + FIRST + side + 1), beyond)
    nums_ptr += side * NUM_BLOCKS * NUM_STRIDE
    most = tl.max(tl.load(nums_ptr + blocks * NUM_STRIDE, mask=mask, other=0), 0)
    index = tl.arange(0, KEPT_V)
    num = tl.load(nums_ptr + index // SIZE * NUM_STRIDE, mask=index < NUM_BLOCKS * SIZE, other=0)
    kept_ptr = values_ptr + side * NUM_BLOCKS * SIZE + index
    x = tl.load(kept_ptr, mask=index % SIZE < num, other=float("-inf"))
    unit = top_p / wanted * (1 << 30)  # of integers that add up to the same in any order: all of the row is 2^30
    shares = (weigh(x, top, 1.0 / temperature) * unit + 0.5).to(tl.int32)
    needed = tl.maximum((wanted - above) * unit + 0.5, 1.0).to(tl.int32)
    if (most <= SIZE) & (above < wanted) & (tl.sum(shares, 0) >= needed):
        threshold = bisect(x, shares, low, high, 0, needed)
    else:
        a = tl.load(bracket_ptr + FIRST)
        b = tl.load(bracket_ptr + SECOND)
        c = tl.minimum(tl.load(bracket_ptr + THIRD), beyond)
        reach = top - REACH * temperature
        threshold = narrowed(
            row_ptr, scratch, reach, VOCAB, a, b, c, top, wanted, float("-inf"), 1.0 / temperature, VOCAB, BLOCK, CAP
        )
    return threshold


@triton.jit
def _searched(
    row_ptr, scratch, top_k, top_p, temperature, REACH: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """A row's threshold by top-k, and by top-p of what that leaves; its greatest value."""
    first, second, thirds = _greatest_of_lanes(row_ptr, VOCAB, BLOCK)
    top = tl.max(first, 0)
    threshold = float("-inf")
    if (top < float("inf")) & (top > float("-inf")):
        best = tl.reshape(tl.join(first, second), [2 * BLOCK])
        third = tl.max(thirds, 0)
        inverse = 1.0 / temperature
        threshold, is_done = _kth(row_ptr, scratch, best, third, top, top_k, top_p, inverse, VOCAB, BLOCK, CAP)
        if is_done == 0:
            reach = top - REACH * temperature
            threshold = _nucleus(
                row_ptr, scratch, best, third, threshold, reach, top, top_p, inverse, VOCAB, BLOCK, CAP
            )
    return threshold, top


@triton.jit(do_not_specialize_on_alignment=["slots_ptr", "copy_of_ptr"])
def _thresholds_kernel(
    logits_ptr, copies_ptr, copy_of_ptr, params_ptr, slots_ptr, scratch_ptr, bracket_ptr, weights_ptr, nums_ptr,
    values_ptr, thresholds_ptr,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr, REACH: tl.constexpr, NUM_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr, SIZE: tl.constexpr, KEPT_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot, copy = slot_and_copy(slots_ptr, copy_of_ptr, row, True)
    if slot < 0:
        return
    temperature = load_param(params_ptr, slot, TEMPERATURE)
    top_k = load_param(params_ptr, slot, TOP_K)
    top_p = load_param(params_ptr, slot, TOP_P)
    min_p_reach = load_param(params_ptr, slot, MIN_P)
    is_off = (top_k <= 0.0) & (top_p >= 1.0) & (min_p_reach == float("-inf"))
    if is_off | (temperature <= 0.0):
        tl.store(thresholds_ptr + row, float("-inf"))
        return
    bracket_ptr += row * BRACKET_WORDS
    weights_ptr += row * NUM_BLOCKS * 2
    nums_ptr += row * 2 * NUM_BLOCKS * NUM_STRIDE
    values_ptr += row * 2 * NUM_BLOCKS * SIZE
    row_ptr = drawn_row(logits_ptr, copies_ptr, row, copy, VOCAB, True)
    scratch = scratch_ptr + row * CAP
    threshold = tl.full([], float("-inf"), tl.float32)
    if is_surveyed(params_ptr, slot, VOCAB):
        top = tl.load(bracket_ptr + TOP)
        if (top_p < 1.0) & (top < float("inf")) & (top > float("-inf")):
            threshold = _bracketed(
                row_ptr, scratch, bracket_ptr, weights_ptr, nums_ptr, values_ptr, top_p, temperature,
                REACH, VOCAB, BLOCK, CAP, NUM_BLOCKS, BLOCKS, SIZE, KEPT_V,
            )  # fmt: skip
    else:
        threshold, top = _searched(row_ptr, scratch, top_k, top_p, temperature, REACH, VOCAB, BLOCK, CAP)
    if (top < float("inf")) & (top > float("-inf")):
        threshold = tl.maximum(threshold, top + min_p_reach)
    tl.store(thresholds_ptr + row, threshold)


@dataclass(frozen=True)
class ThresholdWorkspace:
    """What `find_thresholds` works in, for at most R rows: scratch float32 [R, CAPACITY], and what was bracketed."""

    scratch_RC: Tensor
    bracket: NucleusBracket

    @classmethod
    def make(cls, max_rows: int, vocab_size: int, device: torch.device) -> ThresholdWorkspace:
        """Allocate for `max_rows` rows of `vocab_size` logits."""
        scratch = torch.empty(max_rows, CAPACITY, dtype=torch.float32, device=device)
        return cls(scratch, NucleusBracket.make(max_rows, vocab_size, device))


def find_thresholds(
    logits_SV: Tensor,
    slot_params: Tensor,
    slots_S: Tensor,
    processed: ProcessedRows,
    survey: RowSurvey,
    workspace: ThresholdWorkspace,
    thresholds_S: Tensor,
) -> None:
    """Write the least logit of each row that may be drawn to `thresholds_S` (float32; -inf: all may).

    logits_SV     before division by the temperature, float32, contiguous
    slot_params   as `slot_params` has them; nothing is dropped at temperature 0
    slots_S       int32; a row whose slot is below 0 is skipped
    processed, survey   as `process_rows` left them of these rows: one that has a copy is read from it
    """
    num_rows, vocab_size = logits_SV.shape
    assert logits_SV.is_contiguous() and vocab_size < 1024 * _BLOCK
    bracket = workspace.bracket
    bracket_nuclei(logits_SV, slot_params, slots_S, processed, survey, bracket)
    num_blocks = bracket.weights_RB2.shape[1]
    _thresholds_kernel[(num_rows,)](
        logits_SV, processed.copies_SV, processed.copy_of_S, slot_params, slots_S, workspace.scratch_RC,
        bracket.bracket_RW, bracket.weights_RB2, bracket.nums_R2BN, bracket.values_R2BE, thresholds_S,
        VOCAB=vocab_size, BLOCK=_BLOCK, CAP=CAPACITY, REACH=_REACH, NUM_BLOCKS=num_blocks,
        BLOCKS=triton.next_power_of_2(num_blocks), SIZE=KEPT // num_blocks,
        KEPT_V=KEPT, num_warps=8,
    )  # fmt: skip
