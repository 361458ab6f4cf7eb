"""Products for one row and for any number of rows: against float64, and bit for bit in any batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headrace.kernels.triton.linear_rows import multiply_row
from headrace.kernels.triton.ordered_products import MatrixTile, multiply_tiles
from tests.kernels.oracles import reference_linear, reference_rms_norm, reference_silu_and_mul

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter's dot has no bfloat16
TOLERANCES = {torch.float32: 1e-5, HALF: 1e-2}


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def error(found: Tensor, expected: Tensor) -> float:
    assert found.isfinite().all()
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(33, 200), (9, 1030), (5, 4200), (6, 900)])
def test_one_row_with_everything_fused(num_outputs: int, num_inputs: int, dtype: torch.dtype) -> None:
    x, weight = random(2, num_inputs, dtype=dtype, seed=1), random(2 * num_outputs, num_inputs, dtype=dtype, seed=2)
    weight *= num_inputs**-0.5
    norm, bias = random(num_inputs, dtype=dtype, seed=3), random(num_outputs, dtype=dtype, seed=4)
    out = random(2, num_outputs, dtype=dtype, seed=5)
    before, half = out.clone(), weight[:num_outputs]
    multiply_row(x, half, out, bias_N=bias, adds=True)
    assert error(out, before + reference_linear(x, half, bias)) < TOLERANCES[dtype]
    multiply_row(x, weight, out, norm_K=norm, eps=1e-6, gated=True)
    normed = reference_rms_norm(x, norm, 1e-6)
    assert error(out, reference_silu_and_mul(reference_linear(normed, weight, None))) < TOLERANCES[dtype]


@pytest.mark.usefixtures("dot_by_rows")
@pytest.mark.parametrize(("dtype", "is_fetched"), [(torch.float32, False), (HALF, False), (HALF, True)])
def test_rows_have_the_same_bits_in_any_batch(dtype: torch.dtype, is_fetched: bool) -> None:
    x, weight = random(40, 200, dtype=dtype, seed=6), random(70, 200, dtype=dtype, seed=7) * 200**-0.5
    bias, residual = random(70, dtype=dtype, seed=8), random(40, 70, dtype=dtype, seed=9)
    tile = MatrixTile(64 if is_fetched else 16, 32, 64, 4, 3, is_fetched=is_fetched)
    whole = residual.clone()
    multiply_tiles(x, weight, bias, whole, adds=True, tile=tile)
    assert error(whole, residual + reference_linear(x, weight, bias)) < TOLERANCES[dtype]
    for rows in ([39], [3, 17], list(range(39, 9, -1))):
        found = residual[rows].clone()
        multiply_tiles(x[rows].contiguous(), weight, bias, found, adds=True, tile=tile)
        assert torch.equal(found, whole[rows])
