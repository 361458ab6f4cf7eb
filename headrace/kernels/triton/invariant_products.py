"""The batch-invariant product: a row's bits depend on the row and the weight, not on the other rows nor their number.

Owns one kernel and its tile sizes. Every tile size sums a row's products in the same steps of 16 along K. That the
narrow and the wide matrix instructions round alike is a fact of the device, which a test on it holds to. Where a weight
has too few outputs to keep a device busy, its sums are made in parts of fixed length, added in their order: by programs
of their own where there are few tiles, else by one, with the same bits.

Legend: M rows, K input features, N output features.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.triton.overlap import fetch_ahead, launch_options
from headrace.kernels.triton.split_sums import ProductWorkspace, sum_of_parts

_PART = 1024
_FEW_OUTPUTS = 2048


@triton.jit
def _part_sum(
    x_ptrs, w_ptrs, inputs, first, part_length, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] of the inputs of the part that begins at `first`."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(first, tl.minimum(first + part_length, K), BLOCK_K):
        inside = inputs < K - start
        x = tl.load(x_ptrs + start, mask=inside[None, :], other=0.0)
        w = tl.load(w_ptrs + start, mask=inside[:, None], other=0.0)
        acc = tl.dot(x, w, acc=acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["M"])
def _tile_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, parts_ptr, arrivals_ptr, x_stride, out_stride, M, N, K, part_length,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NUM_PARTS: tl.constexpr, SHARED: tl.constexpr,
    HAS_BIAS: tl.constexpr, ADDS: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One output tile, or one part of its sums (SHARED); programs that share a weight tile are neighbours."""
    num_tiles_m = tl.cdiv(M, BLOCK_M)
    tile, part = tl.program_id(0), tl.program_id(1)
    rows = tile % num_tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tile // num_tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    inputs = tl.arange(0, BLOCK_K)
    first = part * part_length
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        fetch_ahead(w_ptr, outputs % N, first, K, 2)  # weights do not come from the launch ahead
        tl.extra.cuda.gdc_wait()
    x_ptrs = x_ptr + (rows % M).to(tl.int64)[:, None] * x_stride + inputs[None, :]
    w_ptrs = w_ptr + (outputs % N).to(tl.int64)[None, :] * K + inputs[:, None]
    acc = _part_sum(x_ptrs, w_ptrs, inputs, first, part_length, K, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    if SHARED:
        parts_ptr += tile.to(tl.int64) * (NUM_PARTS * BLOCK_M * BLOCK_N)
        acc, is_last = sum_of_parts(acc, parts_ptr, arrivals_ptr + tile, part, NUM_PARTS, BLOCK_M, BLOCK_N)
        if is_last == 0:
            return
    else:
        for other in range(1, NUM_PARTS):
            first = other * part_length
            acc += _part_sum(x_ptrs, w_ptrs, inputs, first, part_length, K, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    dtype = out_ptr.dtype.element_ty
    if HAS_BIAS:
        acc += tl.load(bias_ptr + outputs, mask=outputs < N, other=0.0).to(tl.float32)[None, :]
    target = out_ptr + rows.to(tl.int64)[:, None] * out_stride + outputs[None, :]
    mask = (rows < M)[:, None] & (outputs < N)[None, :]
    if ADDS:
        acc = acc.to(dtype).to(tl.float32) + tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, acc.to(dtype), mask=mask)


@dataclass(frozen=True)
class MatrixTile:
    """Rows, outputs and inputs of a tile, warps, pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def matrix_tile(num_rows: int, num_outputs: int, dtype: torch.dtype) -> MatrixTile:
    """The fastest tile measured. All sum along K in the same steps, so a row's bits are the same with each of them."""
    if dtype == torch.float32:
        return MatrixTile(16, 64, 32, 4, 3)
    if num_rows <= 32:
        return MatrixTile(16, 64, 128, 4, 4) if num_outputs >= 4096 else MatrixTile(16, 32, 256, 4, 3)
    if triton.cdiv(num_rows, 128) * triton.cdiv(num_outputs, 128) >= 96 and num_rows > 128:
        return MatrixTile(128, 128, 64, 8 if num_outputs <= _FEW_OUTPUTS else 4, 4)  # parts take two sums at a time
    return MatrixTile(64, 128, 64, 4, 4) if num_outputs > 16384 else MatrixTile(64, 64, 128, 4, 3)


def part_length(num_outputs: int, num_inputs: int) -> int:
    """Inputs that are summed by themselves. Must never depend on the rows."""
    return _PART if num_outputs <= _FEW_OUTPUTS and num_inputs > _PART else num_inputs


def multiply_tiles(
    x_MK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    out_MN: Tensor,
    workspace: ProductWorkspace,
    *,
    adds: bool = False,
    overlap: bool = False,
    tile: MatrixTile | None = None,
) -> None:
    """out = x W^T + b (out += with `adds`), the same bits for a row whatever the other rows and their number.

    overlap  as in `linear_rows.multiply_row`
    """
    num_rows, num_inputs = x_MK.shape
    num_outputs = out_MN.shape[1]
    tile = tile or matrix_tile(num_rows, num_outputs, x_MK.dtype)
    part = part_length(num_outputs, num_inputs)
    num_tiles, num_parts = _count(num_rows, tile.block_m) * _count(num_outputs, tile.block_n), _count(num_inputs, part)
    shared = num_parts > 1 and workspace.holds(num_tiles, tile.block_m * tile.block_n, num_parts)
    _tile_kernel[(num_tiles, num_parts if shared else 1)](
        x_MK, weight_NK, weight_NK if bias_N is None else bias_N, out_MN, workspace.parts, workspace.arrivals,
        x_MK.stride(0), out_MN.stride(0), num_rows, num_outputs, num_inputs, part,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, NUM_PARTS=num_parts, SHARED=shared,
        HAS_BIAS=bias_N is not None, ADDS=adds, PRECISION="ieee" if x_MK.dtype == torch.float32 else "tf32",
        OVERLAP=overlap, num_warps=tile.num_warps, num_stages=tile.num_stages, **launch_options(overlap),
    )  # fmt: skip


def _count(size: int, block: int) -> int:
    return -(-size // block)
