"""Layers over the live parameters of a model, which stay where they are. Owns how they are found by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from headrace.attention.base import HeadNorms
from headrace.kernels import LayerKernels
from headrace.layers.linear import GemmCounter, Linear
from headrace.layers.norm import RmsNorm


@dataclass(frozen=True)
class Params:
    """The parameters below `prefix`, and what every layer over them is made with."""

    tensors: Mapping[str, Tensor]
    kernels: LayerKernels
    counter: GemmCounter
    eps: float
    prefix: str = ""

    def below(self, name: str) -> Params:
        """Those whose names go on with `name` and a dot."""
        return replace(self, prefix=f"{self.prefix}{name}.")

    def linear(self, name: str) -> Linear:
        """With a bias where the model has one."""
        bias = self.tensors.get(f"{self.prefix}{name}.bias")
        return Linear(self.kernels, self.counter, self.tensors[f"{self.prefix}{name}.weight"], bias)

    def norm(self, name: str) -> RmsNorm:
        """The norm of that weight."""
        return RmsNorm(self.tensors[f"{self.prefix}{name}.weight"], self.eps)

    def head_norms(self, q_name: str, k_name: str) -> HeadNorms:
        """The norms of all query heads and all key heads."""
        return HeadNorms(self.norm(q_name).weight, self.norm(k_name).weight, self.eps)
