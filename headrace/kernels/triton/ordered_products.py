"""Products whose bits do not depend on the batch. Owns two kernels and their tile sizes.

Every tile sums a row's products in the same steps of 16 along K, one accumulator, no split, so a row's bits never
depend on the number of rows, nor on the tile that this picks. That the narrow and the wide matrix instructions round
alike is a fact of the device, which a test on it holds to. On Hopper tiles come by the tensor memory accelerator (TMA),
which takes an eighth to a third off; for few rows, and elsewhere, by loads of the program's own.

Legend: M rows, K input features, N output features.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-any-return"

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from headrace.kernels.triton.dependent_launch import fetch_ahead, launch_options

NUM_PROCESSORS = 132
"""Of an H100 or H200; what tiles are chosen for. Bits do not depend on it."""


@triton.jit
def _store_tile(
    acc, out_ptr, bias_ptr, rows, outputs, out_stride, M, N, HAS_BIAS: tl.constexpr, ADDS: tl.constexpr
):  # fmt: skip
    dtype = out_ptr.dtype.element_ty
    if HAS_BIAS:
        acc += tl.load(bias_ptr + outputs, mask=outputs < N, other=0.0).to(tl.float32)[None, :]
    target = out_ptr + rows.to(tl.int64)[:, None] * out_stride + outputs[None, :]
    mask = (rows < M)[:, None] & (outputs < N)[None, :]
    if ADDS:
        acc = acc.to(dtype).to(tl.float32) + tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, acc.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _tile_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, x_stride, out_stride, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, ADDS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One output tile; programs that share a weight tile are neighbours."""
    num_tiles_m = tl.cdiv(M, BLOCK_M)
    program = tl.program_id(0)
    rows = program % num_tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = program // num_tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    inputs = tl.arange(0, BLOCK_K)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        fetch_ahead(w_ptr, outputs % N, 0, K, 2)  # weights do not come from the launch ahead
        tl.extra.cuda.gdc_wait()
    x_ptrs = x_ptr + (rows % M).to(tl.int64)[:, None] * x_stride + inputs[None, :]
    w_ptrs = w_ptr + (outputs % N).to(tl.int64)[None, :] * K + inputs[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = inputs < K - start
        x = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=inside[:, None], other=0.0)
        acc = tl.dot(x, w, acc=acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    _store_tile(acc, out_ptr, bias_ptr, rows, outputs, out_stride, M, N, HAS_BIAS, ADDS)


@triton.jit(do_not_specialize=["M"])
def _fetched_tile_kernel(
    x_desc, w_desc, w_ptr, bias_ptr, out_ptr, out_stride, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
    HAS_BIAS: tl.constexpr, ADDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `_tile_kernel`, of descriptors. What is behind a last row, output or input is zero.

    Programs go through bands of BAND tiles of rows: the weight tiles that a band's neighbours share, and the band's
    rows, stay in the cache.
    """
    num_tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_per_band = BAND * tl.cdiv(N, BLOCK_N)
    band, place = tl.program_id(0) // tiles_per_band, tl.program_id(0) % tiles_per_band
    height = tl.minimum(num_tiles_m - band * BAND, BAND)
    first_row = (band * BAND + place % height) * BLOCK_M
    first_output = place // height * BLOCK_N
    outputs = first_output + tl.arange(0, BLOCK_N)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        fetch_ahead(w_ptr, outputs % N, 0, K, 2)
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        x = x_desc.load([first_row, start])
        w = w_desc.load([first_output, start])
        acc = tl.dot(x, w.T, acc=acc)
    rows = first_row + tl.arange(0, BLOCK_M)
    _store_tile(acc, out_ptr, bias_ptr, rows, outputs, out_stride, M, N, HAS_BIAS, ADDS)


@dataclass(frozen=True)
class MatrixTile:
    """Rows, outputs and inputs of a tile, warps, pipeline stages; whether it is fetched by TMA."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    is_fetched: bool = False


_FETCHED = (
    (MatrixTile(64, 64, 128, 4, 4, is_fetched=True), 0.52),
    (MatrixTile(64, 128, 128, 4, 4, is_fetched=True), 0.68),
    (MatrixTile(128, 128, 64, 8, 6, is_fetched=True), 0.95),
    (MatrixTile(256, 128, 64, 8, 4, is_fetched=True), 1.0),
)
"""Each fills a processor, and how fast that goes through its products beside the fastest: from times of 8B's products
on an H200, whole and in halves, of 64 to 8,192 rows (docs/benchmarks.md)."""


def matrix_tile(num_rows: int, num_outputs: int, dtype: torch.dtype, *, fetches: bool = False) -> MatrixTile:
    """The fastest tile measured. All sum along K in the same steps, so a row's bits are the same with each of them.
    `fetches`: the device has TMA, and the operands are as it needs them."""
    if dtype == torch.float32:
        return MatrixTile(16, 64, 32, 4, 3)
    if num_rows <= 32:
        return MatrixTile(16, 64, 128, 4, 4) if num_outputs >= 4096 else MatrixTile(16, 32, 256, 4, 3)
    if fetches:
        return _fetched_tile(num_rows, num_outputs)
    if triton.cdiv(num_rows, 128) * triton.cdiv(num_outputs, 128) >= 96 and num_rows > 128:
        return MatrixTile(128, 128, 64, 4, 4)
    return MatrixTile(64, 128, 64, 4, 4) if num_outputs > 16384 else MatrixTile(64, 64, 128, 4, 3)


def _fetched_tile(num_rows: int, num_outputs: int) -> MatrixTile:
    """The one with which the last processor is done first. Sizes between those that a start runs choose as the next
    such does."""
    if num_rows > 1024:
        return _FETCHED[-1][0]
    step = 64 if num_rows <= 256 else 128
    rows = triton.cdiv(num_rows, step) * step

    def cost(choice: tuple[MatrixTile, float]) -> float:
        tile, speed = choice
        num_tiles = triton.cdiv(rows, tile.block_m) * triton.cdiv(num_outputs, tile.block_n)
        return triton.cdiv(num_tiles, NUM_PROCESSORS) * tile.block_m * tile.block_n / speed

    return min(_FETCHED, key=cost)[0]


def multiply_tiles(
    x_MK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    out_MN: Tensor,
    *,
    adds: bool = False,
    pdl: bool = False,
    tile: MatrixTile | None = None,
) -> None:
    """out = x W^T + b (out += with `adds`), the same bits for a row whatever the other rows and their number.

    pdl      as in `linear_rows.multiply_row`
    """
    num_rows, num_inputs = x_MK.shape
    num_outputs = out_MN.shape[1]
    tile = tile or matrix_tile(num_rows, num_outputs, x_MK.dtype, fetches=_are_fetched(x_MK, weight_NK))
    grid = (triton.cdiv(num_rows, tile.block_m) * triton.cdiv(num_outputs, tile.block_n),)
    bias = weight_NK if bias_N is None else bias_N
    if tile.is_fetched:
        x_desc = TensorDescriptor.from_tensor(x_MK, [tile.block_m, tile.block_k])
        w_desc = TensorDescriptor.from_tensor(weight_NK, [tile.block_n, tile.block_k])
        _fetched_tile_kernel[grid](
            x_desc, w_desc, weight_NK, bias, out_MN, out_MN.stride(0), num_rows, num_outputs, num_inputs,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BAND=16, HAS_BIAS=bias_N is not None,
            ADDS=adds, PDL=pdl, num_warps=tile.num_warps, num_stages=tile.num_stages, **launch_options(pdl),
        )  # fmt: skip
        return
    _tile_kernel[grid](
        x_MK, weight_NK, bias, out_MN, x_MK.stride(0), out_MN.stride(0), num_rows, num_outputs, num_inputs,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, HAS_BIAS=bias_N is not None, ADDS=adds,
        PRECISION="ieee" if x_MK.dtype == torch.float32 else "tf32", PDL=pdl, num_warps=tile.num_warps,
        num_stages=tile.num_stages, **launch_options(pdl),
    )  # fmt: skip


def _are_fetched(*operands: Tensor) -> bool:
    """Whether TMA takes them: rows that begin at multiples of 16 bytes, on a device that has it."""
    return operands[0].is_cuda and _has_tma(operands[0].device) and all(map(_is_aligned, operands))


def _is_aligned(x_MK: Tensor) -> bool:
    return not (x_MK.data_ptr() % 16 or x_MK.stride(0) * x_MK.element_size() % 16 or x_MK.stride(1) != 1)


@functools.cache
def _has_tma(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)
