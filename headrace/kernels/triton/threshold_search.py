"""Top-k, top-p and min-p as one threshold per row of logits, on the device and without sorting the vocabulary.

Meaning and ties are those of `headrace.sampling.thresholds`: a token stays if its logit is at least the threshold. One
program does a row. Sums are float32 in an order that the vocabulary size fixes, so a row's threshold never depends on
the batch.

Both top-k and top-p ask for *the greatest t such that the values >= t weigh `wanted`*. For top-k each value weighs 1
and k is wanted. For top-p a value x of those that top-k left weighs exp((x - top) / T), and top_p of their sum is
wanted. The weight of {x >= t} only grows as t falls, so t can be bracketed. Every search below keeps one invariant:

    weight{x >= low} >= wanted > weight{x >= high},   low <= t < high,   above = weight{x >= high}

`_narrow` reads the row again and again: it weighs at three values between low and high at once, and goes on with the
quarter that keeps the invariant, until few enough values are left in [low, high). `_bisect` then settles t exactly over
values that are at hand: float32, taken as integers in the same order, are halved until high is low's neighbour.

Example: the values 5 3 3 1 0, a top-k of 2, T = 1. Begin with low = 0 (5 values reach it) and high just above 5 (none):

    narrow at 1.25, 2.5, 3.75   3, 3 and 1 values reach them, 2 are wanted: [2.5, 3.75), above = 1
    bisect [2.5, 3.75)          at 3.125 1 value reaches, at 2.8125 3 do, ... t = 3, and both that tie there stay

Then top_p = 0.8 of what is left, 5 3 3: they weigh 1, e^-2 and e^-2, together 1.27. From [3, just above 5) with 1.02
wanted: 5 alone weighs 1, too little; all three do, so again t = 3. With top_p = 0.7, 0.89 is wanted, and t = 5.

Reading the row is what costs, so the first pass keeps the three greatest values of each of its lanes (a lane sees every
`_BLOCK`-th column). Where t lies above every lane's third, whatever reaches t is among the first two of all lanes, and
`_bisect` over those settles it: one pass does for a top-k of up to about 100, two for a nucleus of that size. Else
what that bisection found bounds t from below (fewer values can only weigh less), and `_narrow` begins there.

Most rows need none of that: where top-k is off, `nucleus_bracket` has found a narrow [low, high) and copied what is in
it, and `_bisect` settles t at once. The search above is for top-k, and for where the bracket turns out to be wrong.

Legend: S rows, V vocabulary.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.triton.fast_math import fast_exp
from headrace.kernels.triton.logits_processors import ProcessedRows, drawn_row, load_logits, slot_and_copy
from headrace.kernels.triton.nucleus_bracket import (
    ABOVE_SECOND,
    ABOVE_THIRD,
    BRACKET_WORDS,
    EACH,
    FIRST,
    NUM_LOWER,
    PART_WORDS,
    SECOND,
    TOP,
    WANTED,
    NucleusBracket,
    bracket_nuclei,
)
from headrace.kernels.triton.row_survey import RowSurvey, is_surveyed, weigh
from headrace.kernels.triton.slot_params import MIN_P, TEMPERATURE, TOP_K, TOP_P, load_param

CAPACITY = 2048
"""Values copied to be settled at once."""

_BLOCK = 2048  # lanes
_REACH = 32.0  # weights below exp(-32) of the greatest are never needed to make up a mass


@triton.jit
def ordered_bits(x):
    """float32 as int32 in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def unordered_bits(key):
    """The float32 that `ordered_bits` gave `key` for."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _next_above(x):
    """The least float32 greater than x."""
    return unordered_bits(ordered_bits(x) + 1)


@triton.jit
def _load(row_ptr, start, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    return load_logits(row_ptr, start + tl.arange(0, BLOCK), VOCAB)


@triton.jit
def _weights(x, least, top, inverse):
    """What softmax gives values, in units of the greatest's; those below `least` weigh nothing."""
    return tl.where(x >= least, fast_exp((x - top) * inverse), 0.0)


@triton.jit
def _weigh_above(
    row_ptr, a, b, c, least, top, inverse, VOCAB: tl.constexpr, BLOCK: tl.constexpr, BY_MASS: tl.constexpr
):  # fmt: skip
    """What the values that reach a, b and c weigh (BY_MASS: as `_weights`; else one each), and how many they are."""
    sum_a = tl.zeros([BLOCK], tl.float32)
    sum_b = tl.zeros([BLOCK], tl.float32)
    sum_c = tl.zeros([BLOCK], tl.float32)
    num = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, VOCAB, BLOCK, loop_unroll_factor=2):
        x = _load(row_ptr, start, VOCAB, BLOCK)
        if BY_MASS:
            weight = _weights(x, least, top, inverse)
            sum_a += tl.where(x >= a, weight, 0.0)
            sum_b += tl.where(x >= b, weight, 0.0)
            sum_c += tl.where(x >= c, weight, 0.0)
        # Three counts share an int32: a lane sees V / BLOCK values, fewer than 1024.
        num += tl.where(x >= a, 1, 0) + tl.where(x >= b, 1024, 0) + tl.where(x >= c, 1048576, 0)
    num_a, num_b = tl.sum(num & 1023, 0), tl.sum((num >> 10) & 1023, 0)
    if BY_MASS:
        return tl.sum(sum_a, 0), tl.sum(sum_b, 0), tl.sum(sum_c, 0), num_a, num_b, tl.sum(num >> 20, 0)
    else:
        num_c = tl.sum(num >> 20, 0)
        return num_a.to(tl.float32), num_b.to(tl.float32), num_c.to(tl.float32), num_a, num_b, num_c


@triton.jit
def _collect(row_ptr, scratch, low, high, VOCAB: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr):
    """The first CAP values in [low, high), in order of their columns, -inf in the rest of [CAP]; the number of all."""
    count = 0
    for start in range(0, VOCAB, BLOCK):
        x = _load(row_ptr, start, VOCAB, BLOCK)
        inside = ((x >= low) & (x < high)).to(tl.int32)
        num_inside = tl.sum(inside, 0)
        if num_inside > 0:
            targets = count + tl.cumsum(inside, 0) - 1
            tl.store(scratch + targets, x, mask=(inside > 0) & (targets < CAP))
        count += num_inside
    tl.debug_barrier()  # this program's own stores, read by its other threads
    indices = tl.arange(0, CAP)
    x = tl.load(scratch + indices, mask=indices < count, other=float("-inf"))
    tl.debug_barrier()
    return x, count


@triton.jit
def _bisect(x, weight, low, high, above, wanted):
    """The greatest t in [low, high) such that the values >= t of x weigh `wanted`, with `above` from beyond high."""
    keys = ordered_bits(x)
    low_key = ordered_bits(low).to(tl.int64)
    high_key = ordered_bits(high).to(tl.int64)
    while high_key - low_key > 1:
        middle = (low_key + high_key) // 2
        is_enough = above + tl.sum(tl.where(keys >= middle.to(tl.int32), weight, 0.0), 0) >= wanted
        low_key = tl.where(is_enough, middle, low_key)
        high_key = tl.where(is_enough, high_key, middle)
    return unordered_bits(low_key.to(tl.int32))


@triton.jit
def _narrow(
    row_ptr, low, num_low, top, wanted, least, inverse,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr, BY_MASS: tl.constexpr,
):  # fmt: skip
    """A range [low, high) that holds the threshold and at most CAP values, or equal ones alone.

    `num_low` values reach the given low, and weigh enough. Returns the range, the weight from beyond it, and the
    numbers of values >= low and >= high.
    """
    high = _next_above(top)
    above = 0.0
    num_high = 0
    shrinks = True
    while (num_low - num_high > CAP) & shrinks:
        b = low + (high - low) * 0.5
        a = low + (b - low) * 0.5
        c = b + (high - b) * 0.5
        sum_a, sum_b, sum_c, num_a, num_b, num_c = _weigh_above(
            row_ptr, a, b, c, least, top, inverse, VOCAB, BLOCK, BY_MASS
        )
        shrinks = (b > low) & (b < high)  # else low and high are neighbours
        has_a = sum_a >= wanted
        has_b = sum_b >= wanted
        has_c = sum_c >= wanted
        low = tl.where(has_c, c, tl.where(has_b, b, tl.where(has_a, a, low)))
        num_low = tl.where(has_c, num_c, tl.where(has_b, num_b, tl.where(has_a, num_a, num_low)))
        high = tl.where(has_c, high, tl.where(has_b, c, tl.where(has_a, b, a)))
        above = tl.where(has_c, above, tl.where(has_b, sum_c, tl.where(has_a, sum_b, sum_a)))
        num_high = tl.where(has_c, num_high, tl.where(has_b, num_c, tl.where(has_a, num_b, num_a)))
    return low, high, above, num_low, num_high


@triton.jit
def _kth(
    row_ptr, scratch, best, third, top, top_k, top_p, inverse,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """(threshold, whether top_p is done with): the k-th greatest value, or -inf if there are fewer; or, where
    everything that reaches it was at hand and top_p asks for less, the nucleus of that.

    `best` holds the greatest two values of every lane, `third` the greatest that is not among them.
    """
    high = _next_above(top)
    nothing = tl.full([], float("-inf"), tl.float32)
    found = _bisect(best, tl.where(best > nothing, 1.0, 0.0), nothing, high, 0.0, top_k)
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
    weight = _weights(x, least, top, inverse)
    return _bisect(x, weight, least, high, 0.0, top_p * tl.sum(weight, 0))


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
    x, count = _collect(row_ptr, scratch, low, high, VOCAB, BLOCK, CAP)
    if count >= top_k:
        if count > CAP:
            low, high, above, num_low, num_high = _narrow(
                row_ptr, low, count, top, top_k, float("-inf"), inverse, VOCAB, BLOCK, CAP, False
            )
            x, count = _collect(row_ptr, scratch, low, high, VOCAB, BLOCK, CAP)
        threshold = low  # neighbours: every value left is `low` itself
        if count <= CAP:
            threshold = _bisect(x, tl.where(x >= low, 1.0, 0.0), low, high, above, top_k)
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
    high = _next_above(top)
    total, near, _, _, num_low, _ = _weigh_above(row_ptr, least, low, top, least, top, inverse, VOCAB, BLOCK, True)
    wanted = top_p * total
    nothing = tl.full([], float("-inf"), tl.float32)
    threshold = _bisect(best, _weights(best, least, top, inverse), nothing, high, 0.0, wanted)
    if third >= threshold:
        threshold = least  # should rounding leave a mass of nearly nothing to find: everything stays
        if near >= wanted:
            low, high, above, num_low, num_high = _narrow(
                row_ptr, low, num_low, top, wanted, least, inverse, VOCAB, BLOCK, CAP, True
            )
            threshold = low
            if num_low - num_high <= CAP:
                x, _ = _collect(row_ptr, scratch, low, high, VOCAB, BLOCK, CAP)
                threshold = _bisect(x, _weights(x, least, top, inverse), low, high, above, wanted)
    return threshold


@triton.jit
def _greatest_of_lanes(row_ptr, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """The greatest three values of every lane, [BLOCK] each; -inf where a lane has fewer."""
    first = tl.full([BLOCK], float("-inf"), tl.float32)
    second = first
    third = first
    for start in tl.range(0, VOCAB, BLOCK, loop_unroll_factor=4):
        x = _load(row_ptr, start, VOCAB, BLOCK)
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
        x = _load(row_ptr, start, VOCAB, BLOCK)
        lows = tl.minimum(lows, tl.where(x == float("-inf"), float("inf"), x))
    return tl.min(lows, 0)


@triton.jit
def _settle(bracket_ptr, parts_ptr, values_ptr, inverse, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr,
            SIZE: tl.constexpr):  # fmt: skip
    """The end of a nucleus that was bracketed, and whether it lies there with all values that it takes at hand."""
    top = tl.load(bracket_ptr + TOP)
    wanted = tl.load(bracket_ptr + WANTED)
    blocks = tl.arange(0, BLOCKS)
    mask = blocks < NUM_BLOCKS
    above_second = tl.sum(tl.load(parts_ptr + blocks * PART_WORDS + ABOVE_SECOND, mask=mask, other=0.0), 0)
    above_third = tl.sum(tl.load(parts_ptr + blocks * PART_WORDS + ABOVE_THIRD, mask=mask, other=0.0), 0)
    is_upper = above_second >= wanted
    side = tl.where(is_upper, 1, 0)
    low = tl.load(bracket_ptr + FIRST + side)
    high = tl.load(bracket_ptr + SECOND + side)
    above = tl.where(is_upper, above_third, above_second)
    nums_ptr = parts_ptr + NUM_LOWER + side
    most = tl.max(tl.load(nums_ptr + blocks * PART_WORDS, mask=mask, other=0.0), 0)
    index = tl.arange(0, BLOCKS * SIZE)
    block = index // SIZE
    num = tl.load(nums_ptr + block * PART_WORDS, mask=block < NUM_BLOCKS, other=0.0)
    x = tl.load(values_ptr + side * NUM_BLOCKS * SIZE + index, mask=index % SIZE < num, other=float("-inf"))
    weights = weigh(x, top, inverse)
    is_found = (most <= SIZE) & (above < wanted) & (above + tl.sum(weights, 0) >= wanted)
    threshold = low
    if is_found:
        threshold = _bisect(x, weights, low, high, above, wanted)
    return threshold, is_found


@triton.jit
def _search(
    row_ptr, scratch, top_k, top_p, temperature, REACH: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """A row's threshold by top-k and top-p, and its greatest value."""
    first, second, thirds = _greatest_of_lanes(row_ptr, VOCAB, BLOCK)
    top = tl.max(first, 0)
    threshold = float("-inf")
    if (top < float("inf")) & (top > float("-inf")):
        best = tl.reshape(tl.join(first, second), [2 * BLOCK])
        third = tl.max(thirds, 0)
        inverse = 1.0 / temperature
        is_done = top_p >= 1.0
        if (top_k > 0.0) & (top_k < VOCAB):
            threshold, is_done = _kth(row_ptr, scratch, best, third, top, top_k, top_p, inverse, VOCAB, BLOCK, CAP)
        if is_done == 0:
            reach = top - REACH * temperature
            threshold = _nucleus(
                row_ptr, scratch, best, third, threshold, reach, top, top_p, inverse, VOCAB, BLOCK, CAP
            )
    return threshold, top


@triton.jit(do_not_specialize_on_alignment=["slots_ptr", "copy_of_ptr"])
def _thresholds_kernel(
    logits_ptr, copies_ptr, copy_of_ptr, params_ptr, slots_ptr, scratch_ptr, bracket_ptr, parts_ptr, values_ptr,
    thresholds_ptr,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr, REACH: tl.constexpr, NUM_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr, SIZE: tl.constexpr,
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
    parts_ptr += row * NUM_BLOCKS * PART_WORDS
    values_ptr += row * 2 * NUM_BLOCKS * SIZE
    top = tl.full([], float("-inf"), tl.float32)
    threshold = top
    has_survey = is_surveyed(params_ptr, slot, VOCAB)
    is_found = False
    if has_survey:
        top = tl.load(bracket_ptr + TOP)
        is_found = (top_p >= 1.0) | (top == float("inf")) | (top == float("-inf"))
        if is_found == 0:
            threshold, is_found = _settle(
                bracket_ptr, parts_ptr, values_ptr, 1.0 / temperature, NUM_BLOCKS, BLOCKS, SIZE
            )
    if is_found == 0:
        row_ptr = drawn_row(logits_ptr, copies_ptr, row, copy, VOCAB, True)
        threshold, top = _search(row_ptr, scratch_ptr + row * CAP, top_k, top_p, temperature, REACH, VOCAB, BLOCK, CAP)
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
    num_blocks = bracket.parts_RBW.shape[1]
    _thresholds_kernel[(num_rows,)](
        logits_SV, processed.copies_SV, processed.copy_of_S, slot_params, slots_S, workspace.scratch_RC,
        bracket.bracket_RW, bracket.parts_RBW, bracket.values_R2BE, thresholds_S,
        VOCAB=vocab_size, BLOCK=_BLOCK, CAP=CAPACITY, REACH=_REACH, NUM_BLOCKS=num_blocks,
        BLOCKS=triton.next_power_of_2(num_blocks), SIZE=EACH, num_warps=8,
    )  # fmt: skip
