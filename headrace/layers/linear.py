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
    """x W^T + b; weight [out, in], bias [out] or None."""

    def __init__(self, kernels: LayerKernels, counter: GemmCounter, weight: Tensor, bias: Tensor | None = None) -> None:
        self._kernels = kernels
        self._counter = counter
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Normed) -> Tensor:
        """[T, in] -> [T, out]."""
        self._counter.num_calls += 1
        return self._kernels.normed_linear(x.stream_TX, *x.norm, self._weight, self._bias)

    def gate(self, x: Normed) -> Tensor:
        """silu(gate) * up, gates being the first half of the outputs: [T, in] -> [T, out / 2]."""
        self._counter.num_calls += 1
        return self._kernels.normed_gate(x.stream_TX, *x.norm, self._weight, self._bias)

    def logits(self, x: Normed) -> Tensor:
        """In float32; without bias."""
        self._counter.num_calls += 1
        return self._kernels.normed_logits(x.stream_TX, *x.norm, self._weight)

    def add_to(self, stream_TO: Tensor, x_TI: Tensor) -> None:
        """stream += x W^T + b, in place."""
        self._counter.num_calls += 1
        self._kernels.linear_add_(stream_TO, x_TI, self._weight, self._bias)


class Embedding:
    """Rows of a table [vocab, hidden] by token id."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, token_ids: Tensor) -> Tensor:
        """int64 [T] -> a new tensor [T, hidden]."""
        return torch.index_select(self.weight, 0, token_ids)
