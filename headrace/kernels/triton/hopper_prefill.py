"""Attention of prompts on Hopper: the prefill items of `work_items`, as its matrix units want them fed.

Owns the kernel, its tile sizes and what it can run. The algorithm is FlashAttention-3's (Shah et al., 2024): warps that
only fetch, and groups of four warps that multiply, 64 query rows each. A group asks for the scores of a block together
with the values of the one before, and while it computes weights, the matrix unit is another group's. Keys and values
come by TMA, a page of one KV head at a time, into tiles of BLOCK_N positions that are held as halves of 64 columns: so
the rows of a page are one run of 128-byte rows, swizzled as the unit reads them. A program walks several (item, KV
head) pairs, its fetching warps ahead of the others.

Blocks go from the last to the first: what has to be masked comes first. Steps are counted over all pairs of a program:
step `count` has the scores of one block and the values of the block before, and releases both of their tiles.
Legend: T packed tokens, H query heads, G kv heads, D head size.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return,assignment"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from headrace.kernels.paged_kv import AttentionShape
from headrace.kernels.triton.dependent_launch import launch_options
from headrace.kernels.triton.hopper_fetch import HALF, fetch_tiles, load_pair, num_turns
from headrace.kernels.triton.work_items import ITEM_SIZE, PREFILL, WorkLimits

HEAD_DIMS = (64, 128)
PAGE_SIZES = (16, 32, 64)
DTYPES = (torch.bfloat16, torch.float16)
"""What the kernel can run: of queries, and of the pools that it meets."""

_REGISTERS = {2: (232, 40, 168), 3: (160, 32, 128)}
"""Of a thread that multiplies, of one that fetches, and of each as the kernel is built: by the number of groups."""

_LOG2_E = 1.4426950408889634

_ITEM_SIZE = gl.constexpr(ITEM_SIZE)
_HEADER = gl.constexpr(2 * PREFILL)
_ROWS = gl.constexpr(64)  # query rows of a group of warps


@builtin
def _seen_as(memory, shape, _semantic=None):
    """The same bytes as tiles of another shape."""
    sizes = [getattr(size, "value", size) for size in shape]
    return _semantic.memdesc_reinterpret(memory, memory.dtype, sizes, memory.layout)


@gluon.jit
def _multiply_keys(queries, keys):
    """Scores of a tile of keys, to be waited for."""
    BLOCK_N: gl.constexpr = keys.type.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    zeros = gl.zeros([_ROWS, BLOCK_N], gl.float32, layout)
    return hopper.warpgroup_mma(queries, keys.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _weights(scores, m, mass, scale_log2, last, MASKED: gl.constexpr):
    """Weights of one block of scores, and the new maximum and sum with the factor of what was summed before. MASKED:
    `last` is the last column that each row sees."""
    layout: gl.constexpr = scores.type.layout
    BLOCK_N: gl.constexpr = scores.type.shape[1]
    if MASKED:
        columns = gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
        scores = gl.where(columns[None, :] <= last[:, None], scores, -1e30)
    new_m = gl.maximum(m, gl.max(scores, 1) * scale_log2)  # never below -1e20: a masked score has weight 0 exactly
    weights = gl.exp2(scores * scale_log2 - new_m[:, None])
    factor = gl.exp2(m - new_m)
    return weights, new_m, mass * factor + gl.sum(weights, 1), factor


@gluon.jit
def _narrowed(wide, dtype: gl.constexpr):
    """In 16 bits, two neighbours by one instruction: so they stay in one register."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [wide], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [wide], dtype=gl.float16, is_pure=True, pack=2
        )


@gluon.jit
def _step(queries, tiles, bars, state, count, last, scale_log2, MASKED: gl.constexpr):
    """The scores of a block, the `count`th of this program, and meanwhile the values of the one before.

    state   (weights of the block before, maximum, sum, weighted values without that block)
    """
    keys, values = tiles
    keys_ready, values_ready, released = bars
    weights, m, mass, acc = state
    STAGES: gl.constexpr = keys.type.shape[0]
    stage, old = count % STAGES, (count - 1) % STAGES
    mbarrier.wait(keys_ready.index(stage), count // STAGES % 2)
    scores = _multiply_keys(queries, keys.index(stage))
    mbarrier.wait(values_ready.index(old), (count - 1) // STAGES % 2)
    acc = hopper.warpgroup_mma(weights, values.index(old), acc, is_async=True)
    scores = hopper.warpgroup_mma_wait(1, deps=[scores])
    wide, m, mass, factor = _weights(scores, m, mass, scale_log2, last, MASKED)
    acc = hopper.warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(released.index(stage), count=1)
    acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, acc.type.layout))[:, None]
    weights = gl.convert_layout(_narrowed(wide, weights.dtype), weights.type.layout)
    return weights, m, mass, acc


@gluon.jit
def _row_places(rows, stride, HEAD_DIM: gl.constexpr, GQA: gl.constexpr, GROUP: gl.constexpr):
    """Where a group's rows are in an array [T, H, D], 16 bytes a thread, and which there are. rows: (first token,
    number of tokens, KV head)."""
    first_token, num_tokens, head = rows
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    row = GROUP * _ROWS + gl.arange(0, _ROWS, gl.SliceLayout(1, layout))
    dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
    first = (first_token + row // GQA).to(gl.int64) * stride + (head * GQA + row % GQA) * HEAD_DIM
    return first[:, None] + dims[None, :], (row < num_tokens * GQA)[:, None]


@gluon.jit
def _load_queries(queries, rows, HEAD_DIM: gl.constexpr, GQA: gl.constexpr, GROUP: gl.constexpr):
    """A group's query rows; zeros where there are none."""
    q_ptr, q_stride = queries
    places, valid = _row_places(rows, q_stride, HEAD_DIM, GQA, GROUP)
    return gl.load(q_ptr + places, mask=valid, other=0.0)


@gluon.jit
def _write(tile, outputs, rows, part, m, mass, acc, NUM_KV: gl.constexpr, GQA: gl.constexpr, GROUP: gl.constexpr):
    """The rows' outputs, by way of a tile, or their partial results."""
    out_ptr, out_stride, partial_ptr, lse_ptr, first_partials = outputs
    HEAD_DIM: gl.constexpr = acc.type.shape[1]
    layout: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    seen = mass > 0
    divisor = gl.where(seen, mass, 1.0)
    acc = acc * gl.convert_layout(1.0 / divisor, layout)[:, None]
    if part < 0:
        places, valid = _row_places(rows, out_stride, HEAD_DIM, GQA, GROUP)
        tile.store(acc.to(tile.dtype))
        gl.store(out_ptr + places, tile.load(places.type.layout), mask=valid)
    else:
        first_token, num_tokens, head = rows
        row = GROUP * _ROWS + gl.arange(0, _ROWS, layout)
        dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, acc.type.layout))
        there = row < num_tokens * GQA
        lse = gl.convert_layout(gl.where(seen, m + gl.log2(divisor), -1e30), layout)
        partial = gl.load(first_partials + first_token + row // GQA, mask=there, other=0) + part
        result = partial.to(gl.int64) * (NUM_KV * GQA) + head * GQA + row % GQA
        gl.store(partial_ptr + result[:, None] * HEAD_DIM + dims[None, :], acc, mask=there[:, None])
        gl.store(lse_ptr + result, lse, mask=there)


@gluon.jit
def _attend_blocks(scores, queries, tiles, bars, count, positions, scale_log2, GQA: gl.constexpr, GROUP: gl.constexpr):
    """All of a pair but the values of its first block: greatest scores, masses, weighted values, the weights of that
    block, and the blocks counted on. `scores` are those of its last block."""
    BLOCK_N: gl.constexpr = scores.type.shape[1]
    HEAD_DIM: gl.constexpr = tiles[0].type.shape[2]
    rows: gl.constexpr = gl.SliceLayout(1, scores.type.layout)
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    first, end, first_position = positions
    q_position = first_position + (GROUP * _ROWS + gl.arange(0, _ROWS, rows)) // GQA
    last = gl.minimum(q_position, end - 1)
    num_blocks = gl.cdiv(end - first, BLOCK_N)
    num_unmasked = gl.maximum(gl.minimum(end, first_position + 1) - first, 0) // BLOCK_N
    m = gl.full([_ROWS], -1e20, gl.float32, rows)
    mass = gl.zeros([_ROWS], gl.float32, rows)
    acc = gl.zeros([_ROWS, HEAD_DIM], gl.float32, o_layout)
    start = first + (num_blocks - 1) * BLOCK_N
    wide, m, mass, _ = _weights(scores, m, mass, scale_log2, last - start, True)
    weights = gl.convert_layout(_narrowed(wide, tiles[0].dtype), gl.DotOperandLayout(0, o_layout, 2))
    for start in range(first + (num_blocks - 2) * BLOCK_N, first + num_unmasked * BLOCK_N - 1, -BLOCK_N):
        state = (weights, m, mass, acc)
        weights, m, mass, acc = _step(queries, tiles, bars, state, count, last - start, scale_log2, True)
        count += 1
    for _ in range(gl.minimum(num_blocks - 1, num_unmasked)):
        state = (weights, m, mass, acc)
        weights, m, mass, acc = _step(queries, tiles, bars, state, count, last, scale_log2, False)
        count += 1
    return m, mass, acc, weights, count


@gluon.jit
def _attend(step, NUM_KV: gl.constexpr, GQA: gl.constexpr, GROUP: gl.constexpr):
    """The rows of one group of warps, of all pairs of this program. The first scores of a pair are asked for before
    the outputs of the one before are written."""
    queries, outputs, scale_log2, work, q_tiles, out_tiles, tiles, bars = step
    items, turns = work
    keys, values = tiles
    keys_ready, values_ready, released = bars
    STAGES: gl.constexpr = keys.type.shape[0]
    HEAD_DIM: gl.constexpr = keys.type.shape[2]
    q_tile = q_tiles.index(GROUP)
    if turns > 0:
        rows, positions, part = load_pair(items, 0, turns, NUM_KV)
        q_tile.store(_load_queries(queries, rows, HEAD_DIM, GQA, GROUP))
        hopper.fence_async_shared()
        mbarrier.wait(keys_ready.index(0), 0)
        scores = hopper.warpgroup_mma_wait(0, deps=[_multiply_keys(q_tile, keys.index(0))])
        mbarrier.arrive(released.index(0), count=1)
        count = 1
        for turn in range(turns):
            has_next = turn + 1 < turns
            next_rows, next_positions, next_part = load_pair(items, turn + 1, turns, NUM_KV)
            m, mass, acc, weights, count = _attend_blocks(
                scores, q_tile, tiles, bars, count, positions, scale_log2, GQA, GROUP
            )
            next_q = _load_queries(queries, next_rows, HEAD_DIM, GQA, GROUP)
            old, stage = (count - 1) % STAGES, count % STAGES
            mbarrier.wait(values_ready.index(old), (count - 1) // STAGES % 2)
            acc = hopper.warpgroup_mma(weights, values.index(old), acc, is_async=True)
            q_tile.store(next_q)
            hopper.fence_async_shared()
            mbarrier.wait(keys_ready.index(stage), count // STAGES % 2, pred=has_next)  # else of what is there
            scores = _multiply_keys(q_tile, keys.index(stage))
            acc = hopper.warpgroup_mma_wait(1, deps=[acc])
            _write(out_tiles.index(GROUP), outputs, rows, part, m, mass, acc, NUM_KV, GQA, GROUP)
            scores = hopper.warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(released.index(stage), count=1, pred=has_next)
            rows, positions, part = next_rows, next_positions, next_part
            count += 1


@gluon.jit
def hopper_prefill_kernel(
    q_ptr, key_pages, value_pages, table_ptr, metadata_ptr, partial_ptr, lse_ptr, out_ptr, scale_log2,
    q_stride, out_stride, table_stride, partials_at, items_at,
    NUM_KV: gl.constexpr, GQA: gl.constexpr, HEAD_DIM: gl.constexpr, PAGE: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, GROUPS: gl.constexpr, PDL: gl.constexpr,
    WIDE: gl.constexpr, NARROW: gl.constexpr,
):  # fmt: skip
    """All prefill items of a step, for every KV head."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    dtype: gl.constexpr = key_pages.dtype
    BOXES: gl.constexpr = STAGES * BLOCK_N // PAGE * (HEAD_DIM // HALF)
    key_boxes = gl.allocate_shared_memory(dtype, [BOXES, PAGE, HALF], swizzled)
    value_boxes = gl.allocate_shared_memory(dtype, [BOXES, PAGE, HALF], swizzled)
    keys = _seen_as(key_boxes, [STAGES, BLOCK_N, HEAD_DIM])
    values = _seen_as(value_boxes, [STAGES, BLOCK_N, HEAD_DIM])
    q_tiles = gl.allocate_shared_memory(dtype, [GROUPS, _ROWS, HEAD_DIM], swizzled)
    out_tiles = gl.allocate_shared_memory(dtype, [GROUPS, _ROWS, HEAD_DIM], swizzled)
    keys_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    released = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(keys_ready.index(stage), count=1)
        mbarrier.init(values_ready.index(stage), count=1)
        mbarrier.init(released.index(stage), count=GROUPS)
    if PDL:
        tl.extra.cuda.gdc_wait()
    header = metadata_ptr + _HEADER
    items = metadata_ptr + items_at + gl.load(header) * _ITEM_SIZE
    work, queries = (items, num_turns(gl.load(header + 1) * NUM_KV)), (q_ptr, q_stride)
    outputs = (out_ptr, out_stride, partial_ptr, lse_ptr, metadata_ptr + partials_at)
    tiles, bars = (keys, values), (keys_ready, values_ready, released)
    keys_of, values_of = (
        (key_pages, key_boxes, keys_ready, released),
        (value_pages, value_boxes, values_ready, released),
    )
    table = (table_ptr, table_stride)
    ROWS: gl.constexpr = 128 if GROUPS == 2 else 256  # a power of two
    step = (queries, outputs, scale_log2, work, q_tiles, out_tiles, tiles, bars)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_attend, (step, NUM_KV, GQA, 0)),
                (_attend, (step, NUM_KV, GQA, 1)),
                (fetch_tiles, (keys_of, table, work, queries, NUM_KV, GQA, PAGE, BLOCK_N, ROWS, 0)),
                (fetch_tiles, (values_of, table, work, queries, NUM_KV, GQA, PAGE, BLOCK_N, ROWS, 1)),
            ],
            [4, 1, 1],
            [WIDE, NARROW, NARROW],
        )
    else:
        gl.warp_specialize(
            [
                (_attend, (step, NUM_KV, GQA, 0)),
                (_attend, (step, NUM_KV, GQA, 1)),
                (_attend, (step, NUM_KV, GQA, 2)),
                (fetch_tiles, (keys_of, table, work, queries, NUM_KV, GQA, PAGE, BLOCK_N, ROWS, 0)),
                (fetch_tiles, (values_of, table, work, queries, NUM_KV, GQA, PAGE, BLOCK_N, ROWS, 1)),
            ],
            [4, 4, 1, 1],
            [WIDE, WIDE, NARROW, NARROW],
        )


@dataclass(frozen=True)
class HopperTile:
    """One variant: `groups` of 64 query rows, BLOCK_N positions at a time, `stages` of keys and of values held."""

    groups: int
    block_n: int
    stages: int

    @property
    def rows(self) -> int:
        """Query rows of an item."""
        return 64 * self.groups


def choose_hopper_tile(
    shape: AttentionShape, page_size: int, dtype: torch.dtype, device: torch.device
) -> HopperTile | None:
    """The variant for a model, where the kernel can run it: None elsewhere."""
    fits = shape.head_dim in HEAD_DIMS and page_size in PAGE_SIZES and dtype in DTYPES
    fits &= shape.num_heads <= 128 * shape.num_kv_heads
    if not fits or device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    # Of heads of 64 the exponentials take as long as the products: a third group fills in.
    return HopperTile(2, 128, 2) if shape.head_dim == 128 else HopperTile(3, 128, 4)


class HopperPrefill:
    """Launches of the kernel for one model's layers. Owns nothing but their sizes.

    num_programs   that share the items of a launch: as many as the device holds at once
    """

    def __init__(
        self,
        tile: HopperTile,
        shape: AttentionShape,
        page_size: int,
        limits: WorkLimits,
        device: torch.device,
        *,
        pdl: bool,
    ) -> None:
        self._tile = tile
        self._shape = shape
        self._page_size = page_size
        self._limits = limits
        self._pdl = pdl
        self.num_programs = torch.cuda.get_device_properties(device).multi_processor_count

    def launch(
        self, num_items: int, q: Tensor, keys: Tensor, values: Tensor, page_table: Tensor, metadata: Tensor,
        partial: Tensor, lse: Tensor, out: Tensor,
    ) -> None:  # fmt: skip
        """As `PagedAttention.run`, for up to `num_items` prefill items; keys and values in the dtype of queries."""
        shape, tile, limits = self._shape, self._tile, self._limits
        wide, narrow, most = _REGISTERS[tile.groups]
        layout = gl.NVMMASharedLayout(128, 16, 2)
        pages = [TensorDescriptor.from_tensor(pool, [self._page_size, 64], layout) for pool in (keys, values)]
        programs = min(self.num_programs, num_items * shape.num_kv_heads)
        hopper_prefill_kernel[(programs,)](
            q, *pages, page_table, metadata, partial, lse, out, shape.scale * _LOG2_E,
            q.stride(0), out.stride(0), page_table.stride(0), limits.partials_at, limits.items_at,
            NUM_KV=shape.num_kv_heads, GQA=shape.num_heads // shape.num_kv_heads, HEAD_DIM=shape.head_dim,
            PAGE=self._page_size, BLOCK_N=tile.block_n, STAGES=tile.stages, GROUPS=tile.groups,
            PDL=self._pdl, WIDE=wide, NARROW=narrow,
            num_warps=4, maxnreg=most, **launch_options(self._pdl),
        )  # fmt: skip
