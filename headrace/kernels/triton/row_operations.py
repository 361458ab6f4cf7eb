"""The element-wise work of a decoder layer, fused: between two matrix products there is at most one of these.

Every program owns whole rows and reduces in an order that the row's width fixes, so results never depend on the batch.
Arithmetic is float32; a value is rounded where `headrace.kernels` rounds it. Rows beyond a step's tokens may be given:
they compute something and harm nothing. Legend: T tokens, X hidden, F half of a gated projection, H and G query and kv
heads, D head size, P positions.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.paged_kv import AttentionShape
from headrace.kernels.triton.dependent_launch import launch_options, take_turn
from headrace.kernels.triton.float8 import as_bytes, to_float8_bytes


@triton.jit
def normed_row(value, weight, eps, WIDTH: tl.constexpr, dtype: tl.constexpr):
    """The norm of a row, all of it float32 and 0 beyond the width, rounded as it is stored."""
    scale = tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
    return ((value * scale).to(dtype).to(tl.float32) * weight).to(dtype)


def norm_warps(block: int) -> int:
    """Of a program that norms a row in a block: as many, and the sum of squares has the same bits."""
    return max(1, min(8, block // 512))


@triton.jit
def _norm_kernel(
    x_ptr, weight_ptr, out_ptr, x_stride, out_stride, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    take_turn(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    dtype = out_ptr.dtype.element_ty
    value = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_stride + columns, normed_row(value, weight, eps, WIDTH, dtype), mask=mask)


def rms_norm(x_TX: Tensor, weight_X: Tensor, eps: float, out_TX: Tensor, *, pdl: bool = False) -> None:
    """out = rms_norm(x) * weight. Last axes contiguous."""
    num_rows, width = out_TX.shape
    block = triton.next_power_of_2(width)
    _norm_kernel[(num_rows,)](
        x_TX, weight_X, out_TX, x_TX.stride(0), out_TX.stride(0), eps,
        WIDTH=width, BLOCK=block, PDL=pdl, num_warps=norm_warps(block), **launch_options(pdl),
    )  # fmt: skip


@triton.jit
def _silu_mul_kernel(
    x_ptr, out_ptr, x_stride, out_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    take_turn(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    gate = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * out_stride + columns, value.to(out_ptr.dtype.element_ty), mask=mask)


def silu_and_mul(x_T2F: Tensor, out_TF: Tensor, *, pdl: bool = False) -> None:
    """out = silu(x[:, :F]) * x[:, F:]. Last axes contiguous."""
    num_rows, width = out_TF.shape
    block = min(1024, triton.next_power_of_2(width))
    _silu_mul_kernel[(num_rows, triton.cdiv(width, block))](
        x_T2F, out_TF, x_T2F.stride(0), out_TF.stride(0),
        WIDTH=width, BLOCK=block, PDL=pdl, num_warps=4, **launch_options(pdl),
    )  # fmt: skip


@triton.jit
def _norm_half_pair(first, second, weight_ptr, halves, half_mask, eps, HALF: tl.constexpr, dtype: tl.constexpr):
    """RMS norm over the two halves of each head, [HEADS, HALF_BLOCK] each."""
    scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF) + eps)[:, None]
    first_weight = tl.load(weight_ptr + halves, mask=half_mask, other=0.0).to(tl.float32)[None, :]
    second_weight = tl.load(weight_ptr + HALF + halves, mask=half_mask, other=0.0).to(tl.float32)[None, :]
    first = ((first * scale).to(dtype).to(tl.float32) * first_weight).to(dtype).to(tl.float32)
    second = ((second * scale).to(dtype).to(tl.float32) * second_weight).to(dtype).to(tl.float32)
    return first, second


@triton.jit
def _rope_store_kernel(
    qkv_ptr, bias_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, positions_ptr, rows_ptr, table_ptr,
    q_ptr, keys_ptr, values_ptr, qkv_stride, q_stride, rope_stride, table_stride, eps,
    NUM_Q: tl.constexpr, NUM_KV: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, HEADS: tl.constexpr,
    PAGE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0)
    table_row = tl.load(rows_ptr + token)
    if table_row < 0:
        if PDL:
            tl.extra.cuda.gdc_wait()
        return
    position = tl.load(positions_ptr + token)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    dim: tl.constexpr = 2 * HALF
    first_head = tl.program_id(1) * HEADS  # all of a program's heads are of one kind
    heads = first_head + tl.arange(0, HEADS)
    halves = tl.arange(0, HALF_BLOCK)
    half_mask = halves < HALF
    mask = half_mask[None, :]
    offsets = heads[:, None] * dim + halves[None, :]
    source = qkv_ptr + token.to(tl.int64) * qkv_stride + offsets
    cos = tl.load(cos_ptr + position * rope_stride + halves, mask=half_mask, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + position * rope_stride + halves, mask=half_mask, other=0.0).to(tl.float32)[None, :]
    page = tl.load(table_ptr + table_row.to(tl.int64) * table_stride + position // PAGE).to(tl.int64)
    if PDL:  # positions and tables are older than the step; the projection comes from the launch ahead
        tl.extra.cuda.gdc_wait()
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        first = (first + tl.load(bias_ptr + offsets, mask=mask, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
        second += tl.load(bias_ptr + HALF + offsets, mask=mask, other=0.0).to(tl.float32)
        second = second.to(dtype).to(tl.float32)
    rotated_x, rotated_y = first.to(dtype), second.to(dtype)
    if first_head < NUM_Q + NUM_KV:
        if HAS_NORM:
            weight_ptr = q_weight_ptr
            if first_head >= NUM_Q:
                weight_ptr = k_weight_ptr
            first, second = _norm_half_pair(first, second, weight_ptr, halves, half_mask, eps, HALF, dtype)
        rotated_x, rotated_y = (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)
    if first_head < NUM_Q:
        q_target = q_ptr + token.to(tl.int64) * q_stride + offsets
        tl.store(q_target, rotated_x, mask=mask)
        tl.store(q_target + HALF, rotated_y, mask=mask)
        return
    pool_ptr = keys_ptr
    kv_head = heads[:, None] - NUM_Q
    if first_head >= NUM_Q + NUM_KV:
        pool_ptr = values_ptr
        kv_head -= NUM_KV
    target = pool_ptr + ((page * NUM_KV + kv_head) * PAGE + position % PAGE) * dim + halves[None, :]
    if keys_ptr.dtype.element_ty == tl.uint8:
        tl.store(target, to_float8_bytes(rotated_x.to(tl.float32)), mask=mask)
        tl.store(target + HALF, to_float8_bytes(rotated_y.to(tl.float32)), mask=mask)
    else:
        tl.store(target, rotated_x, mask=mask)
        tl.store(target + HALF, rotated_y, mask=mask)


def rope_and_store(
    qkv_TX: Tensor,
    bias_X: Tensor | None,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    cos_PD: Tensor,
    sin_PD: Tensor,
    positions_T: Tensor,
    table_rows_T: Tensor,
    page_table: Tensor,
    shape: AttentionShape,
    page_size: int,
    q_THD: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    pdl: bool = False,
) -> None:
    """Bias, per-head RMS norms of queries and keys, rotary embedding; queries to `q_THD`, the rest to its page.

    qkv_TX         [T, (H + 2 G) * D]: H query, then G key, then G value heads
    norms          weights [D] of the query and the key norm, or None
    cos_PD, sin_PD tables by position, as `rope_tables` makes them, in any dtype
    positions_T, table_rows_T   int32: absolute position and page-table row; a row below 0 skips the token
    q_THD          [T, H, D], contiguous but for the stride of T; may be the queries' part of qkv itself
    keys, values   flat pools of one layer, in the dtype of queries or float8_e4m3fn: then unscaled, saturated at 448
    """
    num_heads, num_kv, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    total = num_heads + 2 * num_kv
    heads = math.gcd(8, num_heads, num_kv)
    q_weight, k_weight = norms or (qkv_TX, qkv_TX)
    _rope_store_kernel[(positions_T.shape[0], total // heads)](
        qkv_TX, qkv_TX if bias_X is None else bias_X, q_weight, k_weight, cos_PD, sin_PD, positions_T, table_rows_T,
        page_table, q_THD, *as_bytes(keys, values),
        qkv_TX.stride(0), q_THD.stride(0), cos_PD.stride(0), page_table.stride(0), eps,
        NUM_Q=num_heads, NUM_KV=num_kv, HALF=dim // 2, HALF_BLOCK=triton.next_power_of_2(dim // 2), HEADS=heads,
        PAGE=page_size, HAS_BIAS=bias_X is not None, HAS_NORM=norms is not None, PDL=pdl,
        num_warps=2, **launch_options(pdl),
    )  # fmt: skip
