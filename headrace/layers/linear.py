"""Linear layers and token embedding over parameters owned elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels import LayerKernels
from headrace.layers.norm import Normed


class GemmCounter:
    """How many linear layers have run: a step's count must not depend on its number of sequences."""

    def __init__(self) -> None:
        self.num_calls = 0


class Linear:
    """x W^T + b of a norm; weight [out, in], bias [out] or None. What is added to the stream is `Residual.add`'s."""

    def __init__(self, kernels: LayerKernels, counter: GemmCounter, weight: Tensor, bias: Tensor | None = None) -> None:
        self.kernels = kernels
        self.counter = counter
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Normed) -> Tensor:
        """[T, in] -> [T, out]."""
        self.counter.num_calls += 1
        return self.kernels.normed_linear(*x, self.weight, self.bias)

    def gate(self, x: Normed) -> Tensor:
        """silu(gate) * up, gates being the first half of the outputs: [T, in] -> [T, out / 2]."""
        self.counter.num_calls += 1
        return self.kernels.normed_gate(*x, self.weight, self.bias)

    def logits(self, x: Normed, kernels: LayerKernels | None = None) -> Tensor:
        """In float32; without bias. `kernels`: by these, and not the layer's."""
        self.counter.num_calls += 1
        return (kernels or self.kernels).normed_logits(*x, self.weight)


class Embedding:
    """Rows of a table [vocab, hidden] by token id."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, token_ids: Tensor) -> Tensor:
        """int64 [T] -> a new tensor [T, hidden]."""
        return torch.index_select(self.weight, 0, token_ids)
