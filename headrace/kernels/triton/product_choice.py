"""Which kernel multiplies a few rows by a weight: a tile of ours, or None where a library's product is as fast.

Only data and a lookup. What stands here won in chains of whole decoder layers of Qwen3-0.6B and Qwen3-8B on one H200,
in bfloat16 (`bench/gpu_kernels.py --only products`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from headrace.kernels.triton.fused_products import ProductTile, ProductWorkspace
from headrace.kernels.triton.linear_rows import RowTile, row_tile

ProductKind = Literal["plain", "gate", "add"]
"""A product as it is, one whose two halves become silu(gate) * up, one that is added to the residual stream."""


@dataclass(frozen=True)
class _Measured:
    """A shape (N counts the outputs that remain, so half the rows of a gate's weight) and the winner up to each number
    of rows; above the last it is the library. `_ROW`: the kernel for one row, which streams the weight once per row."""

    kind: ProductKind
    num_outputs: int
    num_inputs: int
    winners: tuple[tuple[int, ProductTile | Literal["row"] | None], ...]


_ROW: Literal["row"] = "row"
_MEASURED = (
    _Measured(
        "plain", 4096, 1024,
        ((8, None), (16, ProductTile(16, 64, 256, num_stages=3)), (48, ProductTile(32, 64, 256, num_stages=3))),
    ),
    _Measured(
        "add", 1024, 2048,
        ((4, _ROW), (16, ProductTile(16, 64, 128, splits=4, ahead=4)),
         (64, ProductTile(32, 64, 256, splits=4, num_stages=3, ahead=4)),
         (96, ProductTile(32, 64, 128, splits=4, ahead=4))),
    ),
    _Measured("gate", 3072, 1024, ((16, ProductTile(16, 64, 128)), (64, ProductTile(32, 64, 128)))),
    _Measured(
        "add", 1024, 3072,
        ((2, _ROW), (16, ProductTile(16, 64, 256, splits=6, num_stages=3, ahead=4)),
         (64, ProductTile(32, 64, 256, splits=4, num_stages=3, ahead=4)),
         (128, ProductTile(64, 64, 128, splits=4, ahead=4))),
    ),
    _Measured(
        "plain", 6144, 4096,
        ((16, ProductTile(16, 64, 128, num_stages=6)), (32, ProductTile(32, 64, 128, num_stages=6))),
    ),
    _Measured(
        "add", 4096, 4096,
        ((16, ProductTile(16, 64, 128, splits=4)), (32, ProductTile(32, 64, 128, splits=2, num_stages=5))),
    ),
    _Measured("gate", 12288, 4096, ((16, ProductTile(16, 32, 128)),)),
    _Measured(
        "add", 4096, 12288,
        ((16, ProductTile(16, 64, 256, splits=2, num_stages=3)),
         (32, ProductTile(32, 64, 128, splits=2, num_stages=5)),
         (64, ProductTile(64, 64, 128, splits=2, num_stages=5))),
    ),
)  # fmt: skip


def choose_product(
    kind: ProductKind, num_rows: int, num_outputs: int, num_inputs: int, dtype: torch.dtype
) -> ProductTile | RowTile | None:
    """The tile for `multiply_fused` or `multiply_row`, or None for the library. Depends on nothing but its arguments.

    A shape that nobody measured is served as one whose sides are both within a quarter of its own, if the tile fits;
    else by the library. One row is always streamed.
    """
    if num_rows == 1:
        return row_tile(num_outputs, num_inputs, gated=kind == "gate")
    if dtype == torch.float32:
        return None
    for measured in _MEASURED:
        alike = _near(num_outputs, measured.num_outputs) and _near(num_inputs, measured.num_inputs)
        if measured.kind == kind and alike:
            tile = next((tile for max_rows, tile in measured.winners if num_rows <= max_rows), None)
            if tile == _ROW:
                return row_tile(num_outputs, num_inputs, gated=kind == "gate")
            return tile if tile is not None and _fits(tile, num_rows, num_outputs, num_inputs) else None
    return None


def _near(size: int, measured: int) -> bool:
    return 4 * measured <= 5 * size and 4 * size <= 5 * measured


def _fits(tile: ProductTile, num_rows: int, num_outputs: int, num_inputs: int) -> bool:
    is_cut_evenly = num_outputs % tile.block_n == 0 and num_inputs % (tile.splits * tile.block_k) == 0
    return is_cut_evenly and ProductWorkspace.serves(tile, num_rows, num_outputs)
