"""Top-k, top-p and min-p as one threshold per row of logits, on the device and without sorting the vocabulary.

Meaning and ties are those of `headrace.sampling.thresholds`. One program finds a row's threshold. It keeps the three
greatest values of each of its lanes: where a threshold lies above every lane's third, the first two of all lanes are
all that it can depend on. So one pass settles a top-k of up to about 100, and two a nucleus of that size. Otherwise it
narrows a range of values by counting (top-k) or weighing (top-p) what lies above three values at a time, until what is
left inside fits a buffer, and copies that there. What was found either way is settled exactly by bisection over the
bits of the float. Sums are float32 in an order that the vocabulary size fixes: a row's threshold never depends on the
batch.

Legend: S rows, V vocabulary.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.triton.fast_math import fast_exp
from headrace.kernels.triton.shaped_rows import ShapedRows, place_of

ROW_WORDS = 8
"""float32 words of a slot's sampling parameters; see `sample_rows`. Words 4-6: top_k, top_p, T log(min_p)."""

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
    columns = start + tl.arange(0, BLOCK)
    return tl.load(row_ptr + columns, mask=columns < VOCAB, other=float("-inf")).to(tl.float32)


@triton.jit
def _count_above(row_ptr, a, b, c, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """How many values reach a, b and c."""
    num = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, VOCAB, BLOCK, loop_unroll_factor=2):
        x = _load(row_ptr, start, VOCAB, BLOCK)
        # Three counts share a word: a lane sees V / BLOCK values, fewer than 1024.
        num += tl.where(x >= a, 1, 0) + tl.where(x >= b, 1024, 0) + tl.where(x >= c, 1048576, 0)
    return tl.sum(num & 1023, 0), tl.sum((num >> 10) & 1023, 0), tl.sum(num >> 20, 0)


@triton.jit
def _weights(x, floor, top, inverse):
    """What softmax gives values, in units of the greatest's; those below `floor` weigh nothing."""
    return tl.where(x >= floor, fast_exp((x - top) * inverse), 0.0)


@triton.jit
def _weigh_above(row_ptr, a, b, c, floor, top, inverse, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """The mass of the values that reach a, b and c, of those that reach `floor`, in units of the greatest's; and how
    many reach a, b and c."""
    sum_a = tl.zeros([BLOCK], tl.float32)
    sum_b = tl.zeros([BLOCK], tl.float32)
    sum_c = tl.zeros([BLOCK], tl.float32)
    num = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, VOCAB, BLOCK, loop_unroll_factor=2):
        x = _load(row_ptr, start, VOCAB, BLOCK)
        weight = _weights(x, floor, top, inverse)
        sum_a += tl.where(x >= a, weight, 0.0)
        sum_b += tl.where(x >= b, weight, 0.0)
        sum_c += tl.where(x >= c, weight, 0.0)
        num += tl.where(x >= a, 1, 0) + tl.where(x >= b, 1024, 0) + tl.where(x >= c, 1048576, 0)
    num_a = tl.sum(num & 1023, 0)
    num_b = tl.sum((num >> 10) & 1023, 0)
    return tl.sum(sum_a, 0), tl.sum(sum_b, 0), tl.sum(sum_c, 0), num_a, num_b, tl.sum(num >> 20, 0)


@triton.jit
def _above(row_ptr, a, b, c, floor, top, inverse, VOCAB: tl.constexpr, BLOCK: tl.constexpr, BY_MASS: tl.constexpr):
    """What the values that reach a, b and c weigh (their mass, or one each), and how many they are."""
    if BY_MASS:
        sum_a, sum_b, sum_c, num_a, num_b, num_c = _weigh_above(row_ptr, a, b, c, floor, top, inverse, VOCAB, BLOCK)
    else:
        num_a, num_b, num_c = _count_above(row_ptr, a, b, c, VOCAB, BLOCK)
        sum_a, sum_b, sum_c = num_a.to(tl.float32), num_b.to(tl.float32), num_c.to(tl.float32)
    return sum_a, sum_b, sum_c, num_a, num_b, num_c


@triton.jit
def _collect(row_ptr, scratch, low, high, VOCAB: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr):
    """The first CAP values in [low, high), in order of their columns, -inf in the rest of [CAP]; the number of all."""
    count = 0
    for start in range(0, VOCAB, BLOCK):
        x = _load(row_ptr, start, VOCAB, BLOCK)
        inside = ((x >= low) & (x < high)).to(tl.int32)
        num_inside = tl.sum(inside, 0)
        if num_inside > 0:
            places = count + tl.cumsum(inside, 0) - 1
            tl.store(scratch + places, x, mask=(inside > 0) & (places < CAP))
        count += num_inside
    tl.debug_barrier()  # this program's own stores, read by its other threads
    slots = tl.arange(0, CAP)
    x = tl.load(scratch + slots, mask=slots < count, other=float("-inf"))
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
    row_ptr, low, num_low, top, wanted, floor, inverse,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr, BY_MASS: tl.constexpr,
):  # fmt: skip
    """A range [low, high) of at most CAP values, or of one value, where the weight from above reaches `wanted`.

    Values >= the given low weigh enough, and are `num_low`. Returns the range, the weight from beyond it, and the
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
        sum_a, sum_b, sum_c, num_a, num_b, num_c = _above(row_ptr, a, b, c, floor, top, inverse, VOCAB, BLOCK, BY_MASS)
        shrinks = (b > low) & (b < high)
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
    """The k-th greatest value, or -inf if there are fewer; or, where everything above it was at hand and top_p asks for
    less, the nucleus of that.

    Also returns whether top_p is done with.
    """
    high = _next_above(top)
    nothing = tl.full([], float("-inf"), tl.float32)
    least = _bisect(best, tl.where(best > nothing, 1.0, 0.0), nothing, high, 0.0, top_k)
    threshold = least
    is_done = top_p >= 1.0
    if third < least:
        if top_p < 1.0:
            threshold = _nucleus_within(best, least, high, top, top_p, inverse)
            is_done = True
    else:
        threshold, is_done = _kth_from(row_ptr, scratch, least, high, top, top_k, top_p, inverse, VOCAB, BLOCK, CAP)
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
    row_ptr, scratch, best, third, floor, reach, top, top_p, inverse,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """The greatest threshold whose values hold top_p of the mass of those that reach `floor`."""
    low = tl.maximum(reach, floor)
    high = _next_above(top)
    total, near, _, _, num_low, _ = _above(row_ptr, floor, low, top, floor, top, inverse, VOCAB, BLOCK, True)
    wanted = top_p * total
    nothing = tl.full([], float("-inf"), tl.float32)
    threshold = _bisect(best, _weights(best, floor, top, inverse), nothing, high, 0.0, wanted)
    if third >= threshold:
        threshold = floor  # should rounding leave a mass of nearly nothing to find: everything is kept
        if near >= wanted:
            low, high, above, num_low, num_high = _narrow(
                row_ptr, low, num_low, top, wanted, floor, inverse, VOCAB, BLOCK, CAP, True
            )
            threshold = low
            if num_low - num_high <= CAP:
                x, _ = _collect(row_ptr, scratch, low, high, VOCAB, BLOCK, CAP)
                threshold = _bisect(x, _weights(x, floor, top, inverse), low, high, above, wanted)
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


@triton.jit(do_not_specialize_on_alignment=["slots_ptr", "places_ptr"])
def _thresholds_kernel(
    logits_ptr, copies_ptr, places_ptr, params_ptr, slots_ptr, scratch_ptr, floors_ptr,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr, WORDS: tl.constexpr, REACH: tl.constexpr,
    HAS_PLACES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot, place = place_of(slots_ptr, places_ptr, row, HAS_PLACES)
    if slot < 0:
        return
    params = params_ptr + slot * WORDS
    temperature = tl.load(params)
    top_k = tl.load(params + 4)
    top_p = tl.load(params + 5)
    min_reach = tl.load(params + 6)
    is_off = (top_k <= 0.0) & (top_p >= 1.0) & (min_reach == float("-inf"))
    if is_off | (temperature <= 0.0):
        tl.store(floors_ptr + row, float("-inf"))
        return
    row_ptr = logits_ptr + row.to(tl.int64) * VOCAB
    if HAS_PLACES and place >= 0:
        row_ptr = copies_ptr + place.to(tl.int64) * VOCAB
    scratch = scratch_ptr + row * CAP
    first, second, third = _greatest_of_lanes(row_ptr, VOCAB, BLOCK)
    top = tl.max(first, 0)
    floor = float("-inf")
    if (top < float("inf")) & (top > float("-inf")):
        best = tl.reshape(tl.join(first, second), [2 * BLOCK])
        best_third = tl.max(third, 0)
        inverse = 1.0 / temperature
        is_done = top_p >= 1.0
        if (top_k > 0.0) & (top_k < VOCAB):
            floor, is_done = _kth(row_ptr, scratch, best, best_third, top, top_k, top_p, inverse, VOCAB, BLOCK, CAP)
        if is_done == 0:
            reach = top - REACH * temperature
            floor = _nucleus(row_ptr, scratch, best, best_third, floor, reach, top, top_p, inverse, VOCAB, BLOCK, CAP)
        floor = tl.maximum(floor, top + min_reach)
    tl.store(floors_ptr + row, floor)


def threshold_scratch(max_rows: int, device: torch.device) -> Tensor:
    """What `find_thresholds` works in."""
    return torch.empty(max_rows, CAPACITY, dtype=torch.float32, device=device)


def find_thresholds(
    logits_SV: Tensor,
    slot_params: Tensor,
    slots_S: Tensor,
    scratch: Tensor,
    floors_S: Tensor,
    shaped: ShapedRows | None = None,
) -> None:
    """Write the least logit kept of each row to `floors_S` (float32; -inf where nothing is dropped).

    logits_SV     before division by the temperature, any float dtype, contiguous
    slot_params   float32 [slots, ROW_WORDS]: word 0 temperature (0: nothing is dropped), 4 top_k (0 off), 5 top_p
                  (1 off), 6 T log(min_p) (-inf off)
    slots_S       int32; a row whose slot is below 0 is skipped
    shaped        rows to read from reshaped copies instead (logits are float32 then)
    """
    num_rows, vocab_size = logits_SV.shape
    assert logits_SV.is_contiguous() and vocab_size < 1024 * _BLOCK
    copies, places = (logits_SV, slots_S) if shaped is None else (shaped.copies_CV, shaped.places_S)
    _thresholds_kernel[(num_rows,)](
        logits_SV, copies, places, slot_params, slots_S, scratch, floors_S,
        VOCAB=vocab_size, BLOCK=_BLOCK, CAP=CAPACITY, WORDS=ROW_WORDS, REACH=_REACH, HAS_PLACES=shaped is not None,
        num_warps=8,
    )  # fmt: skip
