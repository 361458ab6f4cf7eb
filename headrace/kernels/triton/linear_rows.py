"""Products of one row, or very few, by a weight. Owns `multiply_row` and its tile sizes.

It streams the weight once, has the norm before it and the residual sum or the gate after it inside, and so makes a
decoder layer at batch 1 a handful of launches. With `pdl` a launch may begin before the one ahead of it ends and fetch
its weights meanwhile (programmatic dependent launch).

Legend: M rows, K input features, N output features.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.triton.dependent_launch import launch_options


@triton.jit
def _weight_tile(w_ptr, outputs, inputs, N, K: tl.constexpr):
    mask = (outputs < N)[:, None] & (inputs < K)[None, :]
    return tl.load(w_ptr + outputs.to(tl.int64)[:, None] * K + inputs[None, :], mask=mask, other=0.0)


@triton.jit
def _row_kernel(
    x_ptr, w_ptr, norm_ptr, bias_ptr, out_ptr, x_stride, out_stride, eps, N,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, GATED: tl.constexpr, ADDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of one row."""
    row = tl.program_id(1).to(tl.int64)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inputs = tl.arange(0, BLOCK_K)
    dtype = out_ptr.dtype.element_ty
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    w = _weight_tile(w_ptr, outputs, inputs, N, K)  # weights do not come from the launch ahead: fetched before the wait
    up = w
    if GATED:
        up = _weight_tile(w_ptr + N.to(tl.int64) * K, outputs, inputs, N, K)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x_ptr += row * x_stride
    scale = 1.0
    if HAS_NORM:
        squares = tl.zeros([BLOCK_K], tl.float32)
        for start in tl.static_range(0, K, BLOCK_K):
            x = tl.load(x_ptr + start + inputs, mask=start + inputs < K, other=0.0).to(tl.float32)
            squares += x * x
        scale = tl.rsqrt(tl.sum(squares, 0) / K + eps)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up_acc = acc
    for start in tl.static_range(0, K, BLOCK_K):
        columns = start + inputs
        x = tl.load(x_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)
        if HAS_NORM:
            weight = tl.load(norm_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)
            x = ((x * scale).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
        if start > 0:
            w = _weight_tile(w_ptr, outputs, columns, N, K)
            if GATED:
                up = _weight_tile(w_ptr + N.to(tl.int64) * K, outputs, columns, N, K)
        acc += w.to(tl.float32) * x[None, :]
        if GATED:
            up_acc += up.to(tl.float32) * x[None, :]
    y = tl.sum(acc, 1)
    mask = outputs < N
    if HAS_BIAS:
        y += tl.load(bias_ptr + outputs, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        gate = y.to(dtype).to(tl.float32)
        y = gate / (1.0 + tl.exp(-gate)) * tl.sum(up_acc, 1).to(dtype).to(tl.float32)
    target = out_ptr + row * out_stride + outputs
    if ADDS:
        y = y.to(dtype).to(tl.float32) + tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, y.to(dtype), mask=mask)


@dataclass(frozen=True)
class RowTile:
    """Outputs per program, inputs at a time, warps."""

    block_n: int
    block_k: int
    num_warps: int


SMALL_PRODUCT = 1 << 23
"""A product of one row by up to so many weights waits for the launch ahead rather than for its weights."""


def row_tile(num_outputs: int, num_inputs: int, *, gated: bool = False) -> RowTile:
    """A tile whose loads are all in flight at once: about 16,384 weights per program, whole rows where they fit.

    Small products have programs of few outputs, of longer rows with more warps: won in chains of whole decoder layers
    of Qwen3-0.6B and Qwen2.5-0.5B on one H200 (`bench/gpu_one_row.py`).
    """
    block_k = triton.next_power_of_2(num_inputs)
    if num_outputs * num_inputs <= SMALL_PRODUCT and block_k <= 8192:
        if block_k > 1024:
            return RowTile(4, block_k, 4 if block_k == 2048 else 8)
        if gated and block_k == 1024:
            return RowTile(4, block_k, 2)
    if num_inputs > 4096:
        return RowTile(4, 2048, 8)
    block_n = min(16, max(4, 16384 // block_k // (2 if gated else 1)))
    return RowTile(block_n, block_k, 8 if num_inputs <= 1024 and not gated else 4)


def multiply_row(
    x_MK: Tensor,
    weight_NK: Tensor,
    out_MN: Tensor,
    *,
    norm_K: Tensor | None = None,
    eps: float = 0.0,
    bias_N: Tensor | None = None,
    gated: bool = False,
    adds: bool = False,
    pdl: bool = False,
    tile: RowTile | None = None,
) -> None:
    """out = x W^T for one row or very few; each row streams the weight again, from the cache if it fits.

    norm_K   weight of an RMS norm of x that comes first
    gated    the weight is [2 N, K], gates first: out = silu(gate) * up
    adds     out += instead (the residual stream)
    pdl      launch with programmatic dependence; every kernel ahead of it in the stream must wait for its own
             predecessor before it ends, as ours do
    """
    num_rows, num_inputs = x_MK.shape
    num_outputs = out_MN.shape[1]
    tile = tile or row_tile(num_outputs, num_inputs, gated=gated)
    _row_kernel[(triton.cdiv(num_outputs, tile.block_n), num_rows)](
        x_MK, weight_NK, weight_NK if norm_K is None else norm_K, weight_NK if bias_N is None else bias_N, out_MN,
        x_MK.stride(0), out_MN.stride(0), eps, num_outputs,
        K=num_inputs, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, HAS_NORM=norm_K is not None,
        HAS_BIAS=bias_N is not None, GATED=gated, ADDS=adds, PDL=pdl, num_warps=tile.num_warps,
        **launch_options(pdl),
    )  # fmt: skip
