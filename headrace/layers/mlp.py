"""The gated feed-forward block."""

from __future__ import annotations

from torch import Tensor

from headrace.layers.linear import Linear
from headrace.layers.norm import RmsNorm


class GatedMlp:
    """down(silu(gate(norm(x))) * up(norm(x))); `gate_up` yields both halves at once."""

    def __init__(self, norm: RmsNorm, gate_up: Linear, down: Linear) -> None:
        self._norm = norm
        self._gate_up = gate_up
        self._down = down

    def add_to(self, residual_TX: Tensor) -> None:
        """residual += mlp(residual), in place."""
        self._down.add_to(residual_TX, self._gate_up.gate_of_normed(residual_TX, self._norm))
