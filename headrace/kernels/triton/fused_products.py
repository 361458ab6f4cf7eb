"""Matrix products for a few rows, each one launch with what follows it: a bias, a gate, or the sum with the residual.

Owns one kernel and its workspace; which shapes it serves, and with which tile, belongs to `product_choice`. Weights are
the matrix instruction's long side, so that a tile of 16 rows wastes little. Long sums are split among programs: each
leaves its part in a workspace, and the last to come adds them in the order of the parts, so results never depend on
who that was. With `pdl` a launch begins before the one ahead of it ends (programmatic dependent launch).

Legend: M rows, K input features, N output features.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.triton.dependent_launch import fetch_ahead, launch_options


@triton.jit
def _sum_of_parts(acc, parts_ptr, arrivals_ptr, part, SPLITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(sum, whether this program is the last of its tile and has it); leaves the tile's arrivals at 0."""
    sums_ptr = parts_ptr + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(sums_ptr + part * (ROWS * COLUMNS), acc)
    tl.debug_barrier()  # every thread's part is written before one thread says so
    is_last = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == SPLITS - 1
    if is_last:
        tl.store(arrivals_ptr, 0)
        acc = tl.load(sums_ptr, cache_modifier=".cg")
        for other in tl.static_range(1, SPLITS):
            acc += tl.load(sums_ptr + other * (ROWS * COLUMNS), cache_modifier=".cg")
    return acc, is_last


@triton.jit
def _store_outputs(
    y, up, out_ptr, bias_ptr, out_stride, rows, outputs, M,
    HAS_BIAS: tl.constexpr, GATED: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    """[rows, outputs], rounded where a library's product would be."""
    dtype = out_ptr.dtype.element_ty
    target = out_ptr + rows.to(tl.int64)[:, None] * out_stride + outputs[None, :]
    mask = (rows < M)[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + outputs).to(tl.float32)[None, :]
    if GATED:
        gate = y.to(dtype).to(tl.float32)
        y = gate / (1.0 + tl.exp(-gate)) * up.to(dtype).to(tl.float32)
    if ADDS:
        y += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, y.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _product_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, parts_ptr, arrivals_ptr, x_stride, out_stride, M,
    N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, LINES: tl.constexpr, HAS_BIAS: tl.constexpr, GATED: tl.constexpr,
    ADDS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One part of the sums of one output tile; programs that share weights are neighbours."""
    num_tiles_m = tl.cdiv(M, BLOCK_M)
    m, rest = tl.program_id(0) % num_tiles_m, tl.program_id(0) // num_tiles_m
    n, part = rest % (N // BLOCK_N), rest // (N // BLOCK_N)
    rows, outputs = m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N)
    DEPTH: tl.constexpr = K // SPLITS
    first = part * DEPTH
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if LINES > 0:  # weights do not come from the launch ahead
            fetch_ahead(w_ptr, outputs, first, K, LINES)
        tl.extra.cuda.gdc_wait()
    inputs = first + tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * x_stride + inputs[None, :]
    w_ptrs = w_ptr + outputs.to(tl.int64)[:, None] * K + inputs[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up_acc = acc
    for k in tl.range(0, DEPTH, BLOCK_K, num_stages=STAGES):
        x = tl.load(x_ptrs + k, mask=(rows < M)[:, None], other=0.0)
        w = tl.load(w_ptrs + k)
        acc = tl.dot(w, tl.trans(x), acc=acc, input_precision=PRECISION)
        if GATED:
            up = tl.load(w_ptrs + N * K + k)
            up_acc = tl.dot(up, tl.trans(x), acc=up_acc, input_precision=PRECISION)
    is_last = True
    if SPLITS > 1:
        tile = n * num_tiles_m + m
        parts_ptr += tile.to(tl.int64) * (SPLITS * BLOCK_N * BLOCK_M)
        acc, is_last = _sum_of_parts(acc, parts_ptr, arrivals_ptr + tile, part, SPLITS, BLOCK_N, BLOCK_M)
    if is_last:
        _store_outputs(
            tl.trans(acc), tl.trans(up_acc), out_ptr, bias_ptr, out_stride, rows, outputs, M, HAS_BIAS, GATED, ADDS
        )


@dataclass(frozen=True)
class ProductTile:
    """How a product is cut.

    block_m, block_n, block_k   rows, outputs and inputs of a tile; N and K / splits are multiples of the last two
    splits                      programs that share the sums of a tile, at most one for a gate
    num_stages                  tiles on their way at a time
    ahead                       cache lines of each output's weights asked for before the launch ahead has ended
    """

    block_m: int
    block_n: int
    block_k: int
    splits: int = 1
    num_stages: int = 4
    num_warps: int = 4
    ahead: int = 0

    def num_tiles(self, num_rows: int, num_outputs: int) -> int:
        """Tiles that cover a product's outputs."""
        return triton.cdiv(num_rows, self.block_m) * (num_outputs // self.block_n)


class ProductWorkspace:
    """Where split sums meet, for all products of one stream: each leaves it as it found it, and starts to use it only
    once the one ahead has ended."""

    NUM_SUMS = 1 << 20
    NUM_TILES = 1 << 12

    def __init__(self, device: torch.device) -> None:
        self.parts = torch.empty(self.NUM_SUMS, dtype=torch.float32, device=device)
        self.arrivals = torch.zeros(self.NUM_TILES, dtype=torch.int32, device=device)

    @classmethod
    def serves(cls, tile: ProductTile, num_rows: int, num_outputs: int) -> bool:
        """Whether a product fits."""
        num_tiles = tile.num_tiles(num_rows, num_outputs)
        num_sums = num_tiles * tile.block_m * tile.block_n * tile.splits
        return tile.splits == 1 or (num_tiles <= cls.NUM_TILES and num_sums <= cls.NUM_SUMS)


def multiply_fused(
    x_MK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    out_MN: Tensor,
    tile: ProductTile,
    workspace: ProductWorkspace,
    *,
    gated: bool = False,
    adds: bool = False,
    pdl: bool = False,
) -> None:
    """out = x W^T + b, in a dtype that all share; weight and x with contiguous last axes, float32 sums.

    gated    the weight is [2 N, K], gates first, without bias: out = silu(gate) * up
    adds     out += instead (the residual stream), rounded once
    pdl      as in `linear_rows.multiply_row`
    """
    num_rows, num_inputs = x_MK.shape
    num_outputs = out_MN.shape[1]
    assert num_outputs % tile.block_n == 0 and num_inputs % (tile.splits * tile.block_k) == 0
    assert workspace.serves(tile, num_rows, num_outputs)
    assert not gated or (tile.splits == 1 and bias_N is None)
    grid = (tile.num_tiles(num_rows, num_outputs) * tile.splits,)
    _product_kernel[grid](
        x_MK, weight_NK, weight_NK if bias_N is None else bias_N, out_MN, workspace.parts,
        workspace.arrivals, x_MK.stride(0), out_MN.stride(0), num_rows,
        N=num_outputs, K=num_inputs, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        SPLITS=tile.splits, STAGES=tile.num_stages, LINES=tile.ahead, HAS_BIAS=bias_N is not None, GATED=gated,
        ADDS=adds, PRECISION="ieee" if x_MK.dtype == torch.float32 else "tf32", PDL=pdl,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **launch_options(pdl),
    )  # fmt: skip
