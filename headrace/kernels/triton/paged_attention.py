"""Paged attention over work items: one kernel family for decode, groups that share pages, and prefill.

Owns the kernels and their tile sizes. What an item is, and who makes it, is in `work_items`. The softmax is computed
online over blocks of positions (Milakov and Gimelshein, 2018; Dao et al., 2022), and parts of a context are merged by
their log-sum-exps in order of position (flash decoding: Dao et al., 2023).

With a fixed split, an item's parts are walked in order and merged with the very operations of the merge kernel, so a
token's bits are the same whether its context was cut, walked whole, shared with a group, or computed among the tokens
of a prompt. That both item classes round alike is a fact of the device, which a test on it holds to.

Keys and values may be float8_e4m3fn, unscaled: the kernels see such a pool as int16, two neighbouring dimensions per
element, and keep even and odd dimensions apart until the output. So everything up to the registers moves as 16-bit
elements, which a matrix unit's loads can transpose, and one conversion there widens two values. Legend: T packed
tokens, H query heads, G kv heads, D head size.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.paged_kv import AttentionShape
from headrace.kernels.triton.attended_ranges import (
    attend_in_parts,
    attend_range,
    log_sum,
    merge_part,
    page_numbers,
    widened,
)
from headrace.kernels.triton.dependent_launch import launch_options
from headrace.kernels.triton.float8 import as_pairs
from headrace.kernels.triton.hopper_prefill import HopperPrefill, HopperTile, choose_hopper_tile
from headrace.kernels.triton.work_cuts import FEW_PROGRAMS, TileSizes
from headrace.kernels.triton.work_items import DECODE, ITEM_SIZE, PREFILL, LaunchBounds, WorkLimits

MOST_MERGED_APART = 512
"""Of more leading tokens than these, most have no parts: a merge's programs then take several each."""

MERGING_PROGRAMS = 256
"""How many programs that is, beside each other for every few heads."""

_LOG2_E = 1.4426950408889634
_ITEM_SIZE = tl.constexpr(ITEM_SIZE)
_DECODE = tl.constexpr(DECODE)


@triton.jit
def _load_item(item, table_ptr, table_stride):
    """An item in the order in which `work_items` lays it out: first query token, number of query tokens, where its
    page-table row begins, first and end position, part, position of the first query token."""
    q_start, num_q, table_row = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    table = table_ptr + table_row.to(tl.int64) * table_stride
    return q_start, num_q, table, tl.load(item + 3), tl.load(item + 4), tl.load(item + 5), tl.load(item + 6)


@triton.jit
def attention_items_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, metadata_ptr, partial_ptr, lse_ptr, out_ptr, scale_log2,
    q_stride, out_stride, table_stride, page_stride, partials_at, items_at,
    NUM_KV: tl.constexpr, GQA: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, TILE_CLASS: tl.constexpr, PEEL: tl.constexpr,
    PRECISION: tl.constexpr, PACKED: tl.constexpr, PDL: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One (kv head, item): the queries of its tokens and of the GQA heads that share a kv head, over its positions.

    BLOCK_M query rows, BLOCK_N positions at a time; SPLIT 0 walks the item's range at once, else part by part, merging.
    PEEL: blocks that every query sees whole are not masked. PACKED: pools are int16, pairs of float8 values, and
    `page_stride` is in pairs. An item that is one part of a context leaves a partial result, else the output.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(0)
    index = tl.program_id(1)
    header = metadata_ptr + 2 * TILE_CLASS  # first and number of the class's items
    if TILE_CLASS != _DECODE:  # decode items are the first: no need to wait for the header
        index += tl.load(header)
    item = metadata_ptr + items_at + index * _ITEM_SIZE
    q_start, num_q, table, first, end, part, first_position = _load_item(item, table_ptr, table_stride)
    if tl.program_id(1) >= tl.load(header + 1):
        if PDL:  # a grid that ends early must not let the next one overtake the one before
            tl.extra.cuda.gdc_wait()
        return

    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, DIM_BLOCK)
    token = q_start + rows // GQA
    valid = rows < num_q * GQA
    q_head = head * GQA + rows % GQA
    q_mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
    q_offset = token.to(tl.int64) * q_stride + q_head * HEAD_DIM
    WIDTH: tl.constexpr = HEAD_DIM // 2 if PACKED else HEAD_DIM
    WIDTH_BLOCK: tl.constexpr = DIM_BLOCK // 2 if PACKED else DIM_BLOCK
    pool = (k_ptr, v_ptr, table, page_stride, head * PAGE * WIDTH)
    page = first
    first_partials = metadata_ptr + partials_at + token
    if AHEAD:  # for the launch ahead is still at work
        page = page_numbers(table, first, end, PAGE, BLOCK_N, True)
        partial = tl.load(first_partials, mask=valid, other=0)
    if PDL:  # the plan is older than the step; queries, keys and values come from the launch ahead
        tl.extra.cuda.gdc_wait()
    q = tl.load(q_ptr + q_offset[:, None] + dims[None, :], mask=q_mask, other=0.0)
    position = first_position + rows // GQA
    q_odd = q
    if PACKED:
        q, q_odd = tl.split(tl.reshape(widened(q), [BLOCK_M, WIDTH_BLOCK, 2]))
    queries = (q, q_odd, position, scale_log2)

    if SPLIT == 0:
        unmasked_end = first + (tl.minimum(end, first_position + 1) - first) // BLOCK_N * BLOCK_N
        m, mass, acc, acc_odd = attend_range(
            queries, pool, page, first, unmasked_end, end,
            WIDTH, WIDTH_BLOCK, PAGE, BLOCK_M, BLOCK_N, PEEL, PRECISION, PACKED, AHEAD,
        )  # fmt: skip
    else:
        m, mass, acc, acc_odd = attend_in_parts(
            queries, pool, first, end, SPLIT, WIDTH, WIDTH_BLOCK, PAGE, BLOCK_M, BLOCK_N, PRECISION, PACKED
        )
    if PACKED:
        acc = tl.interleave(acc, acc_odd)

    if part < 0:
        out = acc / mass[:, None]
        out_offset = token.to(tl.int64) * out_stride + q_head * HEAD_DIM
        tl.store(out_ptr + out_offset[:, None] + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=q_mask)
    else:
        if not AHEAD:
            partial = tl.load(first_partials, mask=valid, other=0)
        divisor, lse = log_sum(m, mass)
        row = (partial + part).to(tl.int64) * (NUM_KV * GQA) + q_head
        tl.store(partial_ptr + row[:, None] * HEAD_DIM + dims[None, :], acc / divisor[:, None], mask=q_mask)
        tl.store(lse_ptr + row, lse, mask=valid)


@triton.jit
def _merge_token(
    partial_ptr, lse_ptr, out_ptr, out_stride, token, first, num_parts,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, HEADS: tl.constexpr,
    PARTS: tl.constexpr, IN_ORDER: tl.constexpr,
):  # fmt: skip
    """HEADS heads of a token from its partial results."""
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dims = tl.arange(0, DIM_BLOCK)
    mask = (heads < NUM_HEADS)[:, None] & (dims < HEAD_DIM)[None, :]
    total_m = tl.full([HEADS], -1e20, tl.float32)
    total_mass = tl.zeros([HEADS], tl.float32)
    total_acc = tl.zeros([HEADS, DIM_BLOCK], tl.float32)
    if IN_ORDER:
        for part in range(num_parts):
            row = (first + part) * NUM_HEADS + heads
            lse = tl.load(lse_ptr + row, mask=heads < NUM_HEADS, other=0.0)
            acc = tl.load(partial_ptr + row[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
            total_m, total_mass, old_factor, factor = merge_part(total_m, total_mass, lse)
            total_acc = tl.fma(total_acc, old_factor[:, None], acc * factor[:, None])
    else:
        parts = tl.arange(0, PARTS)
        for start in range(0, num_parts, PARTS):
            row = (first + start + parts)[:, None] * NUM_HEADS + heads[None, :]
            inside = (start + parts < num_parts)[:, None] & (heads < NUM_HEADS)[None, :]
            lse = tl.load(lse_ptr + row, mask=inside, other=-1e30)
            offsets = row[:, :, None] * HEAD_DIM + dims[None, None, :]
            acc = tl.load(partial_ptr + offsets, mask=inside[:, :, None] & (dims < HEAD_DIM)[None, None, :], other=0.0)
            new_m = tl.maximum(total_m, tl.max(lse, 0))
            factor = tl.exp2(lse - new_m[None, :])
            old_factor = tl.exp2(total_m - new_m)
            total_mass = total_mass * old_factor + tl.sum(factor, 0)
            total_acc = total_acc * old_factor[:, None] + tl.sum(acc * factor[:, :, None], 0)
            total_m = new_m
    out = total_acc / tl.where(total_mass > 0, total_mass, 1.0)[:, None]
    offset = tl.cast(token, tl.int64) * out_stride + heads * HEAD_DIM
    tl.store(out_ptr + offset[:, None] + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def merge_parts_kernel(
    partial_ptr, lse_ptr, metadata_ptr, out_ptr, out_stride, partials_at, parts_at, num_tokens,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, HEADS: tl.constexpr,
    PARTS: tl.constexpr, IN_ORDER: tl.constexpr, TURNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """(A token, HEADS heads): the output from the parts of a context that was cut.

    IN_ORDER merges one part after the other, as the items kernel does; else PARTS at a time, for few tokens.
    TURNS above 1: programs take at most so many tokens each, as far apart as there are programs.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0)
    if TURNS == 1:
        num_parts = tl.load(metadata_ptr + parts_at + token)
        first = tl.load(metadata_ptr + partials_at + token).to(tl.int64)
        if PDL:
            tl.extra.cuda.gdc_wait()
        if num_parts > 1:
            _merge_token(
                partial_ptr, lse_ptr, out_ptr, out_stride, token, first, num_parts,
                NUM_HEADS, HEAD_DIM, DIM_BLOCK, HEADS, PARTS, IN_ORDER,
            )  # fmt: skip
    else:
        turns = token + tl.arange(0, TURNS) * tl.num_programs(0)
        most_parts = tl.max(tl.load(metadata_ptr + parts_at + turns, mask=turns < num_tokens, other=0), 0)
        if PDL:
            tl.extra.cuda.gdc_wait()
        if most_parts > 1:
            for place in range(token, num_tokens, tl.num_programs(0)):
                num_parts = tl.load(metadata_ptr + parts_at + place)
                if num_parts > 1:
                    first = tl.load(metadata_ptr + partials_at + place).to(tl.int64)
                    _merge_token(
                        partial_ptr, lse_ptr, out_ptr, out_stride, place, first, num_parts,
                        NUM_HEADS, HEAD_DIM, DIM_BLOCK, HEADS, PARTS, IN_ORDER,
                    )  # fmt: skip


@dataclass(frozen=True)
class AttentionTile:
    """One kernel variant: BLOCK_M query rows (tokens x heads of a kv group), BLOCK_N positions at a time.

    ahead   pages are looked up a block ahead: a block's copies then need a stage less, and begin sooner. Of decode
            items without a fixed split
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    ahead: bool = False


@dataclass(frozen=True)
class AttentionTiles:
    """The variants of both item classes, and of launches of few decode items (same BLOCK_M as `decode`). `hopper` is
    that of the kernel which runs prefill items where it can, instead of `prefill`."""

    decode: AttentionTile
    prefill: AttentionTile
    few: AttentionTile | None = None
    hopper: HopperTile | None = None

    def tokens(self, group_size: int) -> TileSizes:
        """Query tokens per item of each class, for `group_size` query heads per kv head."""
        prefill_m = self.prefill.block_m if self.hopper is None else self.hopper.rows
        return TileSizes(self.decode.block_m // group_size, prefill_m // group_size)


def choose_tiles(
    group_size: int, head_dim: int, dtype: torch.dtype, *, invariant: bool, packed: bool = False
) -> AttentionTiles:
    """The variants for a model of the kernel that runs anywhere; `packed` for float8 pools.

    With `invariant` both classes walk blocks of one size and give every row's columns to one warp in one layout, so
    that their sums are the same to the bit.
    """
    decode_m = max(16, triton.next_power_of_2(group_size))
    prefill_m = max(128, decode_m)
    if dtype == torch.float32:
        tile = AttentionTile(decode_m, 32, 4, 2)
        return AttentionTiles(tile, tile)
    if invariant:
        return AttentionTiles(AttentionTile(decode_m, 32, 1, 4), AttentionTile(prefill_m, 32, 8 if packed else 4, 3))
    # One buffer of keys and one of values, up to three programs on a multiprocessor: what is on its way at once then
    # comes of programs, not of stages. More than 48 KB each would cost the overlap with the launches around.
    few = AttentionTile(decode_m, 64, 4, 2, ahead=True)
    if packed:  # half the bytes per position: as many in flight with twice the positions
        return AttentionTiles(AttentionTile(decode_m, 64, 2, 3), AttentionTile(prefill_m, 64, 8, 3), few)
    return AttentionTiles(AttentionTile(decode_m, 32, 1, 2, ahead=True), AttentionTile(prefill_m, 32, 4, 3), few)


class PagedAttention:
    """Attention of one model's layers. Owns the workspace of partial results; allocates nothing after construction.

    fixed_split   None, or the split size of batch-invariant results; the planner must be given the same
    kv_dtype      of the pools; None: that of queries
    pdl           launch with programmatic dependence (see `linear_rows.multiply_row`)
    """

    def __init__(
        self,
        shape: AttentionShape,
        page_size: int,
        limits: WorkLimits,
        dtype: torch.dtype,
        device: torch.device,
        fixed_split: int | None = None,
        tiles: AttentionTiles | None = None,
        *,
        kv_dtype: torch.dtype | None = None,
        pdl: bool = False,
    ) -> None:
        self._pdl = pdl
        self._options = launch_options(pdl)
        self.group_size = shape.num_heads // shape.num_kv_heads
        self.limits = limits
        self._kv_dtype = kv_dtype or dtype
        if tiles is None:
            invariant, packed = fixed_split is not None, self._kv_dtype == torch.float8_e4m3fn
            tiles = choose_tiles(self.group_size, shape.head_dim, dtype, invariant=invariant, packed=packed)
            if not invariant and not packed:
                tiles = replace(tiles, hopper=choose_hopper_tile(shape, page_size, dtype, device))
        self._tiles = tiles
        hopper = tiles.hopper
        self._hopper = None if hopper is None else HopperPrefill(hopper, shape, page_size, limits, device, pdl=pdl)
        self._shape = shape
        self._page_size = page_size
        self._split = fixed_split or 0
        self._precision = "ieee" if dtype == torch.float32 else "tf32"
        partials = limits.max_partials, shape.num_heads
        self._partial = torch.empty(*partials, shape.head_dim, dtype=torch.float32, device=device)
        self._lse = torch.empty(partials, dtype=torch.float32, device=device)

    @property
    def tile_sizes(self) -> TileSizes:
        """What the planner needs to know."""
        walkers = 0 if self._hopper is None else self._hopper.num_programs
        return replace(self._tiles.tokens(self.group_size), walkers=walkers)

    def run(
        self,
        q_THD: Tensor,
        keys: Tensor,
        values: Tensor,
        page_table: Tensor,
        metadata: Tensor,
        out_THD: Tensor,
        bounds: LaunchBounds,
    ) -> None:
        """Attend, causally, to keys and values already stored.

        q_THD, out_THD   [T, H, D] with contiguous [H, D]; tokens of no item are left as they are
        keys, values     flat pools [rows, D] of one layer, rows (page * G + head) * page_size + offset
        page_table       int32 [rows, columns]
        metadata         the planner's buffer, int32 on the device
        bounds           at least the items of each class and the tokens; programs beyond what `metadata` holds leave
                         at once. 0 launches nothing
        """
        if keys.dtype != self._kv_dtype:
            raise ValueError(f"made for keys of {self._kv_dtype}, not {keys.dtype}")
        tiles = self._tiles
        operands = (q_THD, *as_pairs(keys, values), page_table, metadata, out_THD)
        if bounds.decode:
            few = tiles.few if bounds.decode * self._shape.num_kv_heads <= FEW_PROGRAMS else None
            self._launch(few or tiles.decode, DECODE, bounds.decode, *operands)
        if bounds.prefill and self._hopper is not None:
            self._hopper.launch(
                bounds.prefill, q_THD, keys, values, page_table, metadata, self._partial, self._lse, out_THD
            )
        elif bounds.prefill:
            self._launch(tiles.prefill, PREFILL, bounds.prefill, *operands)
        if bounds.merged:
            self._merge(bounds.merged, metadata, out_THD)

    def _merge(self, num_tokens: int, metadata: Tensor, out: Tensor) -> None:
        num_heads, head_dim = self._shape.num_heads, self._shape.head_dim
        heads = 1 if num_tokens < 16 else min(4, triton.next_power_of_2(num_heads))
        programs, turns = num_tokens, 1
        if num_tokens > MOST_MERGED_APART:
            programs, turns = MERGING_PROGRAMS, triton.cdiv(self.limits.max_tokens, MERGING_PROGRAMS)
        merge_parts_kernel[(programs, triton.cdiv(num_heads, heads))](
            self._partial, self._lse, metadata, out, out.stride(0), self.limits.partials_at, self.limits.parts_at,
            num_tokens,
            NUM_HEADS=num_heads, HEAD_DIM=head_dim, DIM_BLOCK=triton.next_power_of_2(head_dim),
            HEADS=heads, PARTS=64 if heads == 1 else 16, IN_ORDER=self._split > 0 or heads > 1,
            TURNS=triton.next_power_of_2(turns), PDL=self._pdl, num_warps=4, **self._options,
        )  # fmt: skip

    def _launch(
        self, tile: AttentionTile, tile_class: int, num_items: int, q: Tensor, keys: Tensor, values: Tensor,
        page_table: Tensor, metadata: Tensor, out: Tensor,
    ) -> None:  # fmt: skip
        shape, packed = self._shape, keys.dtype == torch.int16
        page_stride = shape.num_kv_heads * self._page_size * keys.shape[1]
        attention_items_kernel[(shape.num_kv_heads, num_items)](
            q, keys, values, page_table, metadata, self._partial, self._lse, out, shape.scale * _LOG2_E,
            q.stride(0), out.stride(0), page_table.stride(0), page_stride, self.limits.partials_at,
            self.limits.items_at,
            NUM_KV=shape.num_kv_heads, GQA=self.group_size, HEAD_DIM=shape.head_dim,
            DIM_BLOCK=max(32 if packed else 16, triton.next_power_of_2(shape.head_dim)), PAGE=self._page_size,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, SPLIT=self._split, TILE_CLASS=tile_class,
            PEEL=tile_class == PREFILL and self._split == 0, PRECISION=self._precision, PACKED=packed, PDL=self._pdl,
            AHEAD=tile.ahead, num_warps=tile.num_warps, num_stages=tile.num_stages, **self._options,
        )  # fmt: skip
