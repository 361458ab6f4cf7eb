"""Which kernel serves which product, and that a layer's products agree whichever is chosen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headrace.kernels import reference
from headrace.kernels.triton.fused_products import ProductTile, ProductWorkspace
from headrace.kernels.triton.layer_kernels import FastKernels
from headrace.kernels.triton.linear_rows import RowTile, row_tile
from headrace.kernels.triton.product_choice import ProductKind, choose_product

BF16 = torch.bfloat16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES: list[tuple[ProductKind, int, int]] = [
    ("plain", 4096, 1024), ("add", 1024, 2048), ("gate", 3072, 1024), ("add", 1024, 3072),
    ("plain", 6144, 4096), ("add", 4096, 4096), ("gate", 12288, 4096), ("add", 4096, 12288),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "num_outputs", "num_inputs"), SHAPES)
def test_a_tile_that_is_chosen_fits(kind: ProductKind, num_outputs: int, num_inputs: int) -> None:
    chosen = [choose_product(kind, num_rows, num_outputs, num_inputs, BF16) for num_rows in range(1, 513)]
    assert isinstance(chosen[0], RowTile)
    assert chosen[-1] is None
    tiles = {tile: num_rows for num_rows, tile in enumerate(chosen, 1) if isinstance(tile, ProductTile)}
    assert tiles
    for tile, most_rows in tiles.items():
        assert num_outputs % tile.block_n == 0 and num_inputs % (tile.splits * tile.block_k) == 0
        assert ProductWorkspace.serves(tile, most_rows, num_outputs)
        assert kind != "gate" or tile.splits == 1


def test_shapes_alike_are_served_and_others_left_to_the_library() -> None:
    measured = choose_product("add", 16, 4096, 12288, BF16)
    assert isinstance(measured, ProductTile)
    assert choose_product("add", 16, 4096, 14336, torch.float16) == measured
    assert choose_product("add", 16, 4096, 12288, torch.float32) is None
    assert choose_product("add", 16, 4096, 12288 + 32, BF16) is None, "not cut evenly"
    assert choose_product("add", 16, 2048, 12288, BF16) is None
    assert choose_product("plain", 16, 4096, 12288, BF16) is None
    assert choose_product("add", 1, 77, 99, torch.float32) == row_tile(77, 99)


@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("tile", [None, ProductTile(16, 32, 32, num_stages=2), row_tile(64, 64)])
def test_a_layer_agrees_whatever_is_chosen(tile: ProductTile | RowTile | None, has_bias: bool, num_rows: int) -> None:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    generator = torch.Generator().manual_seed(0)
    kernels = FastKernels(DEVICE, pdl=False, choose=lambda *_: tile)
    x, norm, residual = random(num_rows, 64), random(64), random(num_rows, 96)
    weight, bias, half_bias = random(192, 64), random(192), random(96)
    normed = reference.rms_norm(x, norm, 1e-6)
    full, half = (bias, half_bias) if has_bias else (None, None)
    expected = reference.linear(normed, weight, full)
    torch.testing.assert_close(kernels.normed_linear(x, norm, 1e-6, weight, full), expected, rtol=1e-4, atol=1e-4)
    gated = reference.silu_and_mul(expected)
    torch.testing.assert_close(kernels.normed_gate(x, norm, 1e-6, weight, full), gated, rtol=1e-4, atol=1e-4)
    expected = reference.linear(x, weight, full)
    torch.testing.assert_close(kernels.linear(x, weight, full), expected, rtol=1e-4, atol=1e-4)
    expected = residual + reference.linear(x, weight[:96], half)
    kernels.linear_add_(residual, x, weight[:96], half)
    torch.testing.assert_close(residual, expected, rtol=1e-4, atol=1e-4)
