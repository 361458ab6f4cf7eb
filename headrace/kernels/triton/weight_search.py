"""Where the weight of a row's greatest values reaches what is wanted: the parts that `threshold_search` is made of.

Both top-k and top-p ask for *the greatest t such that the values >= t weigh `wanted`*. For top-k each value weighs 1
and k is wanted. For top-p a value x of those that top-k left weighs exp((x - top) / T), and top_p of their sum is
wanted. The weight of {x >= t} only grows as t falls, so t can be bracketed. Every search below keeps one invariant:

    weight{x >= low} >= wanted > weight{x >= high},   low <= t < high,   above = weight{x >= high}

`narrow` reads the row again and again: it weighs at three values between low and high at once, and goes on with the
quarter that keeps the invariant, until few enough values are left in [low, high). `bisect` then settles t exactly over
values that are at hand: float32, taken as integers in the same order, are halved until high is low's neighbour.

Example: the values 5 3 3 1 0, a top-k of 2, T = 1. Begin with low = 0 (5 values reach it) and high just above 5 (none):

    narrow at 1.25, 2.5, 3.75   3, 3 and 1 values reach them, 2 are wanted: [2.5, 3.75), above = 1
    bisect [2.5, 3.75)          at 3.125 1 value reaches, at 2.8125 3 do, ... t = 3, and both that tie there stay

Then top_p = 0.8 of what is left, 5 3 3: they weigh 1, e^-2 and e^-2, together 1.27. From [3, just above 5) with 1.02
wanted: 5 alone weighs 1, too little; all three do, so again t = 3. With top_p = 0.7, 0.89 is wanted, and t = 5.

Legend: V vocabulary.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"

from __future__ import annotations

import triton
import triton.language as tl

from headrace.kernels.triton.fast_math import fast_exp
from headrace.kernels.triton.logits_processors import load_logits


@triton.jit
def ordered_bits(x):
    """float32 as int32 in the same order; -0 comes before 0."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def unordered_bits(key):
    """The float32 that `ordered_bits` gave `key` for."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def next_above(x):
    """The least float32 greater than x."""
    return unordered_bits(ordered_bits(tl.where(x == 0.0, 0.0, x)) + 1)  # above -0 as above 0, which it equals


@triton.jit
def load_lanes(row_ptr, start, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK logits from `start` on."""
    return load_logits(row_ptr, start + tl.arange(0, BLOCK), VOCAB)


@triton.jit
def weights_of(x, least, top, inverse):
    """What softmax gives values, in units of the greatest's; those below `least` weigh nothing."""
    return tl.where(x >= least, fast_exp((x - top) * inverse), 0.0)


@triton.jit
def weigh_above(
    row_ptr, a, b, c, least, top, inverse, VOCAB: tl.constexpr, BLOCK: tl.constexpr, BY_MASS: tl.constexpr
):  # fmt: skip
    """What the values that reach a, b and c weigh (BY_MASS: as `weights_of`; else one each), and how many they are."""
    sum_a = tl.zeros([BLOCK], tl.float32)
    sum_b = tl.zeros([BLOCK], tl.float32)
    sum_c = tl.zeros([BLOCK], tl.float32)
    num = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, VOCAB, BLOCK, loop_unroll_factor=2):
        x = load_lanes(row_ptr, start, VOCAB, BLOCK)
        if BY_MASS:
            weight = weights_of(x, least, top, inverse)
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
def collect(row_ptr, scratch, low, high, VOCAB: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr):
    """The first CAP values in [low, high), in order of their columns, -inf in the rest of [CAP]; the number of all."""
    count = 0
    for start in range(0, VOCAB, BLOCK):
        x = load_lanes(row_ptr, start, VOCAB, BLOCK)
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
def bisect(x, weight, low, high, above, wanted):
    """The greatest t in [low, high) such that the values >= t of x weigh `wanted`, with `above` from beyond high."""
    keys = ordered_bits(x)
    low_key = ordered_bits(low).to(tl.int64)
    high_key = ordered_bits(high).to(tl.int64)
    while high_key - low_key > 1:
        middle = (low_key + high_key) // 2
        is_enough = above + tl.sum(tl.where(keys >= middle.to(tl.int32), weight, 0), 0) >= wanted
        low_key = tl.where(is_enough, middle, low_key)
        high_key = tl.where(is_enough, high_key, middle)
    return unordered_bits(low_key.to(tl.int32))


@triton.jit
def quarters(low, high):
    """What cuts a range in four."""
    b = low + (high - low) * 0.5
    return low + (b - low) * 0.5, b, b + (high - b) * 0.5


@triton.jit
def narrow(
    row_ptr, low, num_low, a, b, c, top, wanted, least, inverse,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr, BY_MASS: tl.constexpr,
):  # fmt: skip
    """A range [low, high) that holds the threshold and at most CAP values, or equal ones alone.

    `num_low` values reach the given low, and weigh enough; the first three to weigh at are given, a <= b <= c. Returns
    the range, the weight from beyond it, and the numbers of values >= low and >= high.
    """
    high = next_above(top)
    above = 0.0
    num_high = 0
    num_low += tl.full([], 0, tl.int32)  # may be given as a number, which no loop can carry
    shrinks = True
    while (num_low - num_high > CAP) & shrinks:
        sum_a, sum_b, sum_c, num_a, num_b, num_c = weigh_above(
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
        a, b, c = quarters(low, high)
    return low, high, above, num_low, num_high


@triton.jit
def narrowed(
    row_ptr, scratch, low, num_low, a, b, c, top, wanted, least, inverse,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """The threshold by mass, given as to `narrow`; `least`, should rounding leave too little mass to find."""
    if VOCAB > CAP:
        low, high, above, num_low, num_high = narrow(
            row_ptr, low, num_low, a, b, c, top, wanted, least, inverse, VOCAB, BLOCK, CAP, True
        )
    else:  # all have room; and Triton's compiler breaks down over a loop that it knows is never entered
        high = next_above(top)
        above = 0.0
        num_high = 0
    threshold = low
    if num_low - num_high <= CAP:
        x, _ = collect(row_ptr, scratch, low, high, VOCAB, BLOCK, CAP)
        weights = weights_of(x, least, top, inverse)
        threshold = bisect(x, weights, low, high, above, wanted)
        if above + tl.sum(weights, 0) < wanted:
            threshold = least
    return threshold
