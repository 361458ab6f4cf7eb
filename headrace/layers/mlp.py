"""The gated feed-forward block."""

from __future__ import annotations

from torch import Tensor

from headrace.kernels import KernelSet
from headrace.layers.linear import Linear


class GatedMlp:
    """down(silu(gate(x)) * up(x)); `gate_up` yields both halves at once."""

    def __init__(self, kernels: KernelSet, gate_up: Linear, down: Linear) -> None:
        self._silu_and_mul = kernels.silu_and_mul
        self._gate_up = gate_up
        self._down = down

    def add_to(self, residual_TX: Tensor, x_TX: Tensor) -> None:
        """residual += mlp(x), in place."""
        self._down.add_to(residual_TX, self._silu_and_mul(self._gate_up(x_TX)))
