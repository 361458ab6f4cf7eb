"""Times the products of whole decoder layers, the library's against what is chosen for few rows.

A section of `gpu_kernels.py`. Every layer has weights of its own, so they come from memory as they do in a step.
"""

from __future__ import annotations

import torch
from gpu_timing import BF16, DEVICE, Table, relative_error, time_us

from headrace.kernels.triton.layer_kernels import FastKernels, ProductChoice
from headrace.kernels.triton.product_choice import choose_product


class Products:
    """The products of a decoder's layers one after the other, each on weights of its own."""

    def __init__(self, layers: int, hidden: int, inner: int, heads: int) -> None:
        def weight(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=DEVICE, dtype=BF16) * 0.2 * shape[-1] ** -0.5

        self.hidden, self.width = hidden, heads * 128
        self.layers = [
            (1 + weight(hidden), weight((heads + 16) * 128, hidden), weight(hidden, self.width), 1 + weight(hidden),
             weight(2 * inner, hidden), weight(hidden, inner)) for _ in range(layers)
        ]  # fmt: skip

    @property
    def bytes_per_layer(self) -> float:
        return sum(weight.nbytes for weight in self.layers[0])

    def run(self, kernels: FastKernels, residual: torch.Tensor) -> None:
        for norm1, qkv, o, norm2, gate_up, down in self.layers:
            attended = kernels.normed_linear(residual, norm1, 1e-6, qkv, None)[:, : self.width]
            kernels.linear_add_(residual, attended, o, None)
            kernels.linear_add_(residual, kernels.normed_gate(residual, norm2, 1e-6, gate_up, None), down, None)


def products(table: Table) -> None:
    """Microseconds per layer, with the library's products and with ours where they are chosen."""
    for name, sizes in (("0.6B", (28, 1024, 3072, 16)), ("8B", (36, 4096, 12288, 32))):
        case = Products(*sizes)
        for num_rows in (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 256):
            _compare(table, case, f"products of a layer, {name}, {num_rows} rows", num_rows)


def _compare(table: Table, case: Products, label: str, num_rows: int) -> None:
    start = torch.randn(num_rows, case.hidden, device=DEVICE, dtype=BF16)
    choices: dict[str, ProductChoice] = {"library": lambda *_: None, "chosen": choose_product}
    expected: torch.Tensor | None = None
    for kind, choose in choices.items():
        kernels, residual = FastKernels(DEVICE, pdl=True, choose=choose), start.clone()
        case.run(kernels, residual)
        found = residual.clone()
        expected = found if expected is None else expected
        us = time_us(lambda k=kernels, r=residual: case.run(k, r), repeats=1) / len(case.layers)
        error = relative_error(found, expected)
        table.add(f"{label}, {kind}", us, case.bytes_per_layer, case.bytes_per_layer * num_rows, error)
