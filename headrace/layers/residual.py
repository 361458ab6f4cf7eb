"""The residual stream of one step. Owns adding to it and norming it, and so what of that is fused, or shared by ranks.

Legend: T tokens, S tokens kept, X hidden size, I input features.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from headrace.kernels.experts import Routed
from headrace.layers.experts import Experts
from headrace.layers.linear import Linear
from headrace.layers.norm import Normed, RmsNorm


@dataclass(eq=False, slots=True)
class Residual:
    """A stream [T, X], changed in place until `keep`."""

    stream_TX: Tensor

    def normed(self, norm: RmsNorm) -> Normed:
        """The norm of what the stream is now; to be used before the stream changes."""
        return self.stream_TX, norm

    def add(self, linear: Linear, x_TI: Tensor) -> None:
        """Add x W^T + b, in place."""
        linear.counter.num_calls += 1
        linear.kernels.linear_add_(self.stream_TX, x_TI, linear.weight, linear.bias)

    def add_experts(self, experts: Experts, routed: Routed) -> None:
        """Add what each token's experts make of it, in place."""
        experts.counter.num_calls += 2
        experts.kernels.experts_add_(self.stream_TX, routed, experts.gate_up, experts.down)

    def keep(self, tokens_S: Tensor | None, x_TI: Tensor) -> Tensor:
        """Go on with these tokens only (None: all): the stream is theirs from here on, and so is what is returned."""
        if tokens_S is None:
            return x_TI
        self.stream_TX = self.stream_TX.index_select(0, tokens_S)
        return x_TI.index_select(0, tokens_S)
