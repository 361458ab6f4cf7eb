"""Products for a few rows on a device: every tile that is picked, launches that overlap and share one workspace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headrace.kernels.triton.fused_products import ProductTile, ProductWorkspace, multiply_fused
from headrace.kernels.triton.layer_kernels import FastKernels
from headrace.kernels.triton.product_choice import ProductKind, choose_product
from tests.kernels.oracles import reference_linear, reference_silu_and_mul

DEVICE = torch.device("cuda")
BF16 = torch.bfloat16
SHAPES: list[tuple[ProductKind, int, int]] = [
    ("plain", 4096, 1024), ("add", 1024, 2048), ("gate", 3072, 1024), ("add", 1024, 3072),
    ("plain", 6144, 4096), ("add", 4096, 4096), ("gate", 12288, 4096), ("add", 4096, 12288),
]  # fmt: skip
NUM_ROWS = (2, 3, 4, 8, 13, 16, 24, 32, 48, 64, 96, 128)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=BF16)


def error(found: Tensor, expected: Tensor) -> float:
    assert found.isfinite().all()
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(("kind", "num_outputs", "num_inputs"), SHAPES)
@pytest.mark.parametrize("pdl", [False, True])
def test_every_tile_that_is_picked(kind: ProductKind, num_outputs: int, num_inputs: int, pdl: bool) -> None:
    weight = random(num_outputs * (2 if kind == "gate" else 1), num_inputs) * num_inputs**-0.5
    workspace, num_tiles = ProductWorkspace(DEVICE), 0
    workspace.parts.fill_(float("nan"))
    for num_rows in NUM_ROWS:
        tile = choose_product(kind, num_rows, num_outputs, num_inputs, BF16)
        if not isinstance(tile, ProductTile):
            continue
        num_tiles += 1
        x, out = random(num_rows, num_inputs), random(num_rows, num_outputs)
        expected = reference_linear(x, weight, None)
        if kind == "gate":
            expected = reference_silu_and_mul(expected)
        elif kind == "add":
            expected += out.double()
        again = out.clone()
        for target in (out, again):
            multiply_fused(x, weight, None, target, tile, workspace, gated=kind == "gate", adds=kind == "add", pdl=pdl)
        assert error(out, expected) < 1e-2, f"{num_rows} rows"
        assert torch.equal(out, again), "the order of a split sum is fixed"
    assert num_tiles > 0
    assert not workspace.arrivals.any()


@pytest.mark.parametrize("num_rows", [2, 16, 32])
def test_a_graph_of_overlapping_layers_agrees_with_the_library(num_rows: int) -> None:
    hidden, inner, eps = 1024, 3072, 1e-6
    layers = [
        (random(hidden), random(4096, hidden) * 0.03, random(hidden, 2048) * 0.004, random(hidden),
         random(2 * inner, hidden) * 0.03, random(hidden, inner) * 0.004) for _ in range(12)
    ]  # fmt: skip
    start = random(num_rows, hidden)

    def run(kernels: FastKernels) -> Tensor:
        residual = start.clone()
        for norm1, qkv, o, norm2, gate_up, down in layers:
            attended = kernels.normed_linear(residual, norm1, eps, qkv, None)[:, :2048]
            kernels.linear_add_(residual, attended, o, None)
            kernels.linear_add_(residual, kernels.normed_gate(residual, norm2, eps, gate_up, None), down, None)
        return residual

    expected = run(FastKernels(DEVICE, pdl=False, choose=lambda *_: None))
    kernels = FastKernels(DEVICE, pdl=True)
    first = run(kernels)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(kernels)
    for _ in range(20):
        graph.replay()
        assert error(found, expected) < 1e-2
        assert torch.equal(found, first)
