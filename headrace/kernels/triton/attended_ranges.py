"""How a tile of queries attends to a range of positions: block by block, through the page table.

Owns the online softmax and its order, and when pages are looked up. Must not know items or launches.

A pool is (keys, values, page-table row, elements from page to page, elements to the head); queries are (rows, rows of
odd dimensions if PACKED, position of each row, scale / ln 2).
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"

from __future__ import annotations

import triton
import triton.language as tl

from headrace.kernels.triton.float8 import even_halves, odd_halves


@triton.jit
def merge_part(total_m, total_mass, lse):
    """The new running maximum and sum, and the factors of what was summed so far and of the part that comes in."""
    new_m = tl.maximum(total_m, lse)
    old_factor = tl.exp2(total_m - new_m)
    factor = tl.exp2(lse - new_m)
    return new_m, tl.fma(total_mass, old_factor, factor), old_factor, factor


@triton.jit
def widened(q):
    """Queries beside float8 keys: float16 holds those exactly, costs one instruction per pair, and rounds less than
    bfloat16; queries that it does not hold would not be queries."""
    if q.dtype == tl.bfloat16:
        return tl.clamp(q.to(tl.float32), -65504.0, 65504.0).to(tl.float16)
    else:
        return q


@triton.jit
def page_numbers(table, start, end, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):
    """Pages of a block of positions. Beyond the end page 0, which is finite: pages hold whatever was there before."""
    places = tl.arange(0, BLOCK_N)
    column = table + start // PAGE + places // PAGE if BLOCK_N % PAGE == 0 else table + (start + places) // PAGE
    return tl.load(column, mask=start + places < end, other=0) if MASKED else tl.load(column)


@triton.jit
def _load_rows(pointers, mask, IS_WHOLE: tl.constexpr):
    return tl.load(pointers) if IS_WHOLE else tl.load(pointers, mask=mask, other=0)


@triton.jit
def _attend_block(
    queries, pool, page, start, end, m, mass, acc, acc_odd, WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One block of positions into the running maximum, sum and weighted values (of even and odd dimensions if PACKED).

    WIDTH is that of a pool's row in its elements.
    """
    q, q_odd, q_position, scale_log2 = queries
    k_ptr, v_ptr, table, page_stride, head_offset = pool
    position = start + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, WIDTH_BLOCK)
    place = (tl.arange(0, BLOCK_N) if BLOCK_N % PAGE == 0 else position) % PAGE
    offset = page.to(tl.int64) * page_stride + (head_offset + place * WIDTH)
    if PACKED:
        k = _load_rows(k_ptr + offset[None, :] + dims[:, None], (dims < WIDTH)[:, None], WIDTH == WIDTH_BLOCK)
    else:
        k = tl.trans(_load_rows(k_ptr + offset[:, None] + dims[None, :], (dims < WIDTH)[None, :], WIDTH == WIDTH_BLOCK))
    if PACKED:
        scores = tl.dot(q, even_halves(k).to(q.dtype), input_precision=PRECISION)
        scores = tl.dot(q_odd, odd_halves(k).to(q.dtype), acc=scores, input_precision=PRECISION) * scale_log2
    else:
        scores = tl.dot(q, k, input_precision=PRECISION) * scale_log2
    if MASKED:
        scores = tl.where((position[None, :] <= q_position[:, None]) & (position < end)[None, :], scores, -1e30)
    new_m = tl.maximum(m, tl.max(scores, 1))  # m is never below -1e20, so a masked score has weight 0 exactly
    weights = tl.exp2(scores - new_m[:, None])
    factor = tl.exp2(m - new_m)
    v = _load_rows(v_ptr + offset[:, None] + dims[None, :], (dims < WIDTH)[None, :], WIDTH == WIDTH_BLOCK)
    mass = mass * factor + tl.sum(weights, 1)
    if PACKED:
        weights = weights.to(q.dtype)
        acc = tl.dot(weights, even_halves(v).to(q.dtype), acc=acc * factor[:, None], input_precision=PRECISION)
        acc_odd = tl.dot(weights, odd_halves(v).to(q.dtype), acc=acc_odd * factor[:, None], input_precision=PRECISION)
    else:
        acc = tl.dot(weights.to(v.dtype), v, acc=acc * factor[:, None], input_precision=PRECISION)
    return new_m, mass, acc, acc_odd


@triton.jit
def attend_range(
    queries, pool, page, first, unmasked_end, end, WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PEEL: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Positions first..end - 1: greatest score, mass and weighted values.

    PEEL: nothing before `unmasked_end`, whole blocks from the first, has to be masked. AHEAD: `page` holds the first
    block's pages, and each block looks up those of the next, so that no copy waits for a look-up. A range begins at a
    whole page, or within one that blocks divide.
    """
    m = tl.full([BLOCK_M], -1e20, tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, WIDTH_BLOCK], tl.float32)
    acc_odd = acc
    if PEEL:
        for start in range(first, unmasked_end, BLOCK_N):
            block_page = page_numbers(pool[2], start, end, PAGE, BLOCK_N, False)
            m, mass, acc, acc_odd = _attend_block(
                queries, pool, block_page, start, end, m, mass, acc, acc_odd,
                WIDTH, WIDTH_BLOCK, PAGE, BLOCK_N, False, PRECISION, PACKED,
            )  # fmt: skip
        first = tl.maximum(first, unmasked_end)
    for start in range(first, end, BLOCK_N):
        if AHEAD:
            block_page = page
            page = page_numbers(pool[2], start + BLOCK_N, end, PAGE, BLOCK_N, True)
        else:
            block_page = page_numbers(pool[2], start, end, PAGE, BLOCK_N, True)
        m, mass, acc, acc_odd = _attend_block(
            queries, pool, block_page, start, end, m, mass, acc, acc_odd,
            WIDTH, WIDTH_BLOCK, PAGE, BLOCK_N, True, PRECISION, PACKED,
        )  # fmt: skip
    return m, mass, acc, acc_odd


@triton.jit
def log_sum(m, mass):
    """What to divide the weighted values by, and the log-sum-exp; of nothing 1 and -1e30."""
    is_seen = mass > 0
    divisor = tl.where(is_seen, mass, 1.0)
    return divisor, tl.where(is_seen, m + tl.log2(divisor), -1e30)


@triton.jit
def attend_in_parts(
    queries, pool, first, end, SPLIT: tl.constexpr, WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """As `attend_range`, in parts of SPLIT positions, merged as parts of different items are."""
    m = tl.full([BLOCK_M], -1e20, tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, WIDTH_BLOCK], tl.float32)
    acc_odd = acc
    for start in range(first, end, SPLIT):
        part_end = tl.minimum(start + SPLIT, end)
        part_m, part_mass, part_acc, part_odd = attend_range(
            queries, pool, start, start, start, part_end,
            WIDTH, WIDTH_BLOCK, PAGE, BLOCK_M, BLOCK_N, False, PRECISION, PACKED, False,
        )  # fmt: skip
        divisor, lse = log_sum(part_m, part_mass)
        m, mass, old_factor, factor = merge_part(m, mass, lse)
        acc = tl.fma(acc, old_factor[:, None], (part_acc / divisor[:, None]) * factor[:, None])
        if PACKED:
            acc_odd = tl.fma(acc_odd, old_factor[:, None], (part_odd / divisor[:, None]) * factor[:, None])
    return m, mass, acc, acc_odd
