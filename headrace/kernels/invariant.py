"""The batch-invariant CPU path: a row's bits depend on that row alone. Shapes as in `KernelSet`.

What would break that, and what is done about it:
- A GEMM picks its kernel by the number of rows (one row is a GEMV): every GEMM here has exactly `TILE_ROWS` rows.
- It may also pick by alignment: every tile starts at a cache line.
- An element-wise exp is vectorised, with a scalar tail that rounds differently, and the tail moves with the tensor's
  end and with the split between threads: exp runs on strided blocks too small to be split, so that a value's place
  in its row alone decides which code computes it.
- A fused multiply-add rounds once where two operations round twice, and the compiler may fuse in the tail only:
  products and sums are separate operations, each correctly rounded.
- Reductions over the last axis run row by row, in one order for each width.
The bits may differ between thread counts, machines and torch versions.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.kernels.experts import Routed, add_grouped_
from headrace.kernels.products import PLAIN, Products

TILE_ROWS = 16
_CACHE_LINE = 64
_UNSPLIT_ELEMENTS = 32767  # torch splits element-wise work between threads from 32768 elements on
_UNSPLIT_COLUMNS = 32736  # the same in one row, as a multiple of 32, the widest vectorised step


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, products: Products = PLAIN) -> Tensor:
    """One GEMM of `TILE_ROWS` rows per tile; the last tile is padded with zero rows."""
    num_tokens = x_TI.shape[0]
    num_padded = -(-num_tokens // TILE_ROWS) * TILE_ROWS
    x_tiles = F.pad(x_TI, (0, 0, 0, num_padded - num_tokens)) if num_padded > num_tokens else _aligned(x_TI)
    y_TO = x_TI.new_empty(num_padded, weight_OI.shape[0])
    for first in range(0, num_padded, TILE_ROWS):
        tile = slice(first, first + TILE_ROWS)
        products.linear_out(x_tiles[tile], weight_OI, y_TO[tile])
    y_TO = y_TO[:num_tokens]
    return y_TO if bias_O is None else y_TO.add_(bias_O)


def _aligned(x_TI: Tensor) -> Tensor:
    """Rows in memory that starts at a cache line, as every allocation does: a slice may not."""
    return (
        x_TI.contiguous() if x_TI.data_ptr() % _CACHE_LINE == 0 else x_TI.clone(memory_format=torch.contiguous_format)
    )


def linear_add_(
    residual_TO: Tensor, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, products: Products = PLAIN
) -> None:
    """The tiled GEMM, then one sum."""
    residual_TO.add_(linear(x_TI, weight_OI, bias_O, products))


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm, each row reduced in the order its width fixes."""
    wide = x.float().contiguous()
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * scale).to(x.dtype).mul_(weight_D)


def rope(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Half-rotation with every product and sum rounded by itself."""
    half = x_THD.shape[-1] // 2
    rotated = x_THD * cos_TD.unsqueeze(1)
    sin_T1h = sin_TD[:, :half].unsqueeze(1)
    rotated[..., :half].sub_(x_THD[..., half:] * sin_T1h)
    rotated[..., half:].add_(x_THD[..., :half] * sin_T1h)
    return rotated


def silu_and_mul(x_T2F: Tensor) -> Tensor:
    """The gate's exp runs on blocks that torch neither flattens nor splits."""
    num_tokens, num_features = x_T2F.shape[0], x_T2F.shape[1] // 2
    gate_TF = x_T2F.new_empty(num_tokens, num_features)
    block_rows = max(1, _UNSPLIT_ELEMENTS // num_features)
    for first_row in range(0, num_tokens, block_rows):
        for first in range(0, num_features, _UNSPLIT_COLUMNS):
            last = min(first + _UNSPLIT_COLUMNS, num_features)
            gate_TF[first_row : first_row + block_rows, first:last] = F.silu(
                x_T2F[first_row : first_row + block_rows, first:last]
            )
    return gate_TF.mul_(x_T2F[:, num_features:])


def experts_add_(
    residual_TX: Tensor, routed: Routed, gate_up_E2FX: Tensor, down_EXF: Tensor, products: Products = PLAIN
) -> None:
    """Each expert's rows in tiles of their own, and a token's experts summed in one order."""
    add_grouped_(residual_TX, routed, gate_up_E2FX, down_EXF, partial(linear, products=products), silu_and_mul)
