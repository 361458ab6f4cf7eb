"""What the programs of `hopper_prefill` walk, and the warps that fetch for them.

Owns the order of a program's (item, KV head) pairs, and the way of a page's keys or values into a tile, by TMA.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return,assignment"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from headrace.kernels.triton.work_items import ITEM_SIZE

HALF = gl.constexpr(64)
"""Columns of a 128-byte row: the width of a box of keys or values, and of the matrix unit's swizzle."""

_ITEM_SIZE = gl.constexpr(ITEM_SIZE)
_fetch_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def num_turns(total):
    """How many of all pairs are this program's."""
    programs = gl.num_programs(0)
    rounds = total // programs
    return rounds + (_place(rounds) < total).to(gl.int32)


@gluon.jit
def _place(turn):
    """The pair of a program's turn: programs go there and back, for the longest pairs come first."""
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    if turn % 2 == 1:
        place = programs - 1 - place
    return turn * programs + place


@gluon.jit
def _find_pair(items, turn, turns, NUM_KV: gl.constexpr):
    """The item and the KV head of a turn; of the last one again where there are no more."""
    index = _place(gl.minimum(turn, turns - 1))
    return items + index // NUM_KV * _ITEM_SIZE, index % NUM_KV


@gluon.jit
def load_pair(items, turn, turns, NUM_KV: gl.constexpr):
    """Its rows (first token, number of tokens, KV head), range (first, end, position of the first token), and part."""
    item, head = _find_pair(items, turn, turns, NUM_KV)
    rows = (gl.load(item), gl.load(item + 1), head)
    return rows, (gl.load(item + 3), gl.load(item + 4), gl.load(item + 6)), gl.load(item + 5)


@gluon.jit
def _page_numbers(table, first, end, PAGE: gl.constexpr, PAGES: gl.constexpr):
    """Pages of the positions from `first` on; page 0, which is finite, behind the end."""
    pages = ()
    for place in gl.static_range(PAGES):
        position = first + place * PAGE
        page = gl.load(table + position // PAGE, mask=position < end, other=0)
        pages = pages + (page,)
    return pages


@gluon.jit
def _ask_for_queries(queries, rows, ROWS: gl.constexpr, HEAD_DIM: gl.constexpr, GQA: gl.constexpr):
    """Have a pair's query rows brought to the cache; nothing waits for them. For one warp."""
    q_ptr, q_stride = queries
    first_token, num_tokens, head = rows
    row = gl.minimum(gl.arange(0, ROWS, gl.BlockedLayout([1], [32], [1], [0])), num_tokens * GQA - 1)
    first = (first_token + row // GQA).to(gl.int64) * q_stride + (head * GQA + row % GQA) * HEAD_DIM
    for half in gl.static_range(HEAD_DIM // HALF):
        line = (q_ptr + first + half * HALF).to(gl.int64)
        gl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [line], dtype=gl.int32, is_pure=False, pack=1
        )


@gluon.jit
def _load_range(items, turn, turns, NUM_KV: gl.constexpr, BLOCK_N: gl.constexpr):
    """Page-table row, KV head, first and end position of a turn's pair, and where its last block begins."""
    item, head = _find_pair(items, turn, turns, NUM_KV)
    row, first, end = gl.load(item + 2), gl.load(item + 3), gl.load(item + 4)
    return row, head, first, end, first + (gl.cdiv(end - first, BLOCK_N) - 1) * BLOCK_N


@gluon.jit
def _fetch_block(pool, pages, head, count, NUM_KV: gl.constexpr, PAGE: gl.constexpr, BEHIND: gl.constexpr):
    """The `count`th tile of a program, when step `count + BEHIND - STAGES` has released its place."""
    boxes_of, tiles, ready, released = pool
    STAGES: gl.constexpr = ready.type.shape[0]
    BOXES: gl.constexpr = tiles.type.shape[0] // STAGES
    HALVES: gl.constexpr = BOXES // len(pages)
    bar, first = ready.index(count % STAGES), count % STAGES * BOXES
    mbarrier.wait(released.index((count + BEHIND) % STAGES), (count + BEHIND) // STAGES % 2 ^ 1)
    mbarrier.expect(bar, BOXES * PAGE * HALF * 2)
    for half in gl.static_range(HALVES):
        for place in gl.static_range(len(pages)):
            box = tiles.index(first + half * len(pages) + place)
            _fetch_box(boxes_of, [(pages[place] * NUM_KV + head) * PAGE, half * HALF], bar, box)


@gluon.jit
def fetch_tiles(
    pool, table, work, queries, NUM_KV: gl.constexpr, GQA: gl.constexpr, PAGE: gl.constexpr, BLOCK_N: gl.constexpr,
    ROWS: gl.constexpr, BEHIND: gl.constexpr,
):  # fmt: skip
    """Fill tiles with the keys (BEHIND 0) or the values (1) of all blocks of all pairs of this program."""
    table_ptr, table_stride = table
    items, turns = work
    PAGES: gl.constexpr = BLOCK_N // PAGE
    HEAD_DIM: gl.constexpr = pool[1].type.shape[0] // (pool[2].type.shape[0] * PAGES) * HALF
    count = 0
    if turns > 0:
        row, head, first, end, start = _load_range(items, 0, turns, NUM_KV, BLOCK_N)
        pages = _page_numbers(table_ptr + row.to(gl.int64) * table_stride, start, end, PAGE, PAGES)
        for turn in range(turns):
            next_row, next_head, next_first, next_end, next_start = _load_range(items, turn + 1, turns, NUM_KV, BLOCK_N)
            if BEHIND == 0:
                rows, _, _ = load_pair(items, turn + 1, turns, NUM_KV)
                _ask_for_queries(queries, rows, ROWS, HEAD_DIM, GQA)
            for at in range(start, first - 1, -BLOCK_N):
                is_last = at == first
                ahead_row, ahead_end = gl.where(is_last, next_row, row), gl.where(is_last, next_end, end)
                ahead_start = gl.where(is_last, next_start, at - BLOCK_N)
                ahead_table = table_ptr + ahead_row.to(gl.int64) * table_stride
                next_pages = _page_numbers(ahead_table, ahead_start, ahead_end, PAGE, PAGES)
                _fetch_block(pool, pages, head, count, NUM_KV, PAGE, BEHIND)
                count += 1
                pages = next_pages
            row, head, first, end, start = next_row, next_head, next_first, next_end, next_start
