"""Products with what follows them in one launch: against float64, at any number of rows, with sums split or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headrace.kernels.triton.fused_products import ProductTile, ProductWorkspace, multiply_fused
from tests.kernels.oracles import reference_linear, reference_silu_and_mul

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter's dot has no bfloat16
TOLERANCES = {torch.float32: 1e-5, HALF: 1e-2}
TILES = [
    ProductTile(16, 32, 64, num_stages=2),
    ProductTile(16, 64, 32, splits=3, num_stages=2),
    ProductTile(32, 64, 64, splits=2, num_stages=2, ahead=1),
]
NUM_OUTPUTS, NUM_INPUTS = 128, 384


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def error(found: Tensor, expected: Tensor) -> float:
    assert found.isfinite().all()
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(scope="module")
def workspace() -> ProductWorkspace:
    space = ProductWorkspace(DEVICE)
    space.parts.fill_(float("nan"))
    return space


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("tile", TILES)
def test_products_and_sums_with_the_residual(
    tile: ProductTile, dtype: torch.dtype, workspace: ProductWorkspace
) -> None:
    weight = random(NUM_OUTPUTS, NUM_INPUTS, dtype=dtype, seed=1) * NUM_INPUTS**-0.5
    bias = random(NUM_OUTPUTS, dtype=dtype, seed=2)
    for num_rows in (1, 16, 37):
        x = random(num_rows, NUM_INPUTS, dtype=dtype, seed=3)
        whole = random(num_rows + 1, NUM_OUTPUTS, dtype=dtype, seed=4)
        before, out = whole.clone(), whole[:num_rows]
        expected = reference_linear(x, weight, bias)
        multiply_fused(x, weight, bias, out, tile, workspace, adds=True)
        assert error(out, before[:num_rows].double() + expected) < TOLERANCES[dtype]
        multiply_fused(x, weight, bias, out, tile, workspace)
        assert error(out, expected) < TOLERANCES[dtype]
        assert torch.equal(whole[num_rows], before[num_rows]), "a row beyond the last is nobody's"
    assert not workspace.arrivals.any(), "the next product finds the workspace as this one did"


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_gates(dtype: torch.dtype, workspace: ProductWorkspace) -> None:
    weight = random(2 * NUM_OUTPUTS, NUM_INPUTS, dtype=dtype, seed=1) * NUM_INPUTS**-0.5
    x, out = random(19, NUM_INPUTS, dtype=dtype, seed=3), random(19, NUM_OUTPUTS, dtype=dtype, seed=4)
    multiply_fused(x, weight, None, out, ProductTile(16, 64, 64, num_stages=2), workspace, gated=True)
    expected = reference_silu_and_mul(reference_linear(x, weight, None))
    assert error(out, expected) < TOLERANCES[dtype]


def test_split_sums_have_the_same_bits_each_time(workspace: ProductWorkspace) -> None:
    x, weight = random(16, NUM_INPUTS, dtype=HALF, seed=1), random(NUM_OUTPUTS, NUM_INPUTS, dtype=HALF, seed=2)
    outs = [torch.empty(16, NUM_OUTPUTS, dtype=HALF, device=DEVICE) for _ in range(8)]
    for out in outs:
        multiply_fused(x, weight, None, out, TILES[1], workspace)
    assert all(torch.equal(out, outs[0]) for out in outs)
