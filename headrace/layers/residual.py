"""The residual stream of one step. Owns adding to it and norming it, and so what of that is fused, or shared by ranks.

Legend: T tokens, S tokens kept, X hidden size, I input features.
"""

from __future__ import annotations

from torch import Tensor

from headrace.kernels import PartialSum
from headrace.kernels.experts import Routed
from headrace.layers.experts import Experts
from headrace.layers.linear import Linear
from headrace.layers.norm import Normed, RmsNorm


class Residual:
    """A stream [T, X], changed in place until `keep`. What ranks have to sum is added when it is asked for next: the
    launch that sums can then leave the norm as well."""

    def __init__(self, stream_TX: Tensor) -> None:
        self._stream_TX = stream_TX
        self._unsummed: PartialSum | None = None

    def stream(self) -> Tensor:
        """With all that was added to it."""
        unsummed, self._unsummed = self._unsummed, None
        if unsummed is not None:
            unsummed.add_(self._stream_TX)
        return self._stream_TX

    def normed(self, norm: RmsNorm) -> Normed:
        """The norm of what the stream is now; to be used before the stream changes."""
        unsummed, self._unsummed = self._unsummed, None
        normed_TX = None if unsummed is None else unsummed.add_(self._stream_TX, norm)
        return Normed(self._stream_TX, *norm) if normed_TX is None else Normed(normed_TX, None, 0.0)

    def add(self, linear: Linear, x_TI: Tensor) -> None:
        """Add x W^T + b."""
        linear.counter.num_calls += 1
        self._unsummed = linear.kernels.linear_add_(self.stream(), x_TI, linear.weight, linear.bias)

    def add_experts(self, experts: Experts, routed: Routed) -> None:
        """Add what each token's experts make of it."""
        experts.counter.num_calls += 2
        self._unsummed = experts.kernels.experts_add_(self.stream(), routed, experts.gate_up, experts.down)

    def keep(self, tokens_S: Tensor | None, x_TI: Tensor) -> Tensor:
        """Go on with these tokens only (None: all): the stream is theirs from here on, and so is what is returned."""
        if tokens_S is None:
            return x_TI
        self._stream_TX = self.stream().index_select(0, tokens_S)
        return x_TI.index_select(0, tokens_S)
