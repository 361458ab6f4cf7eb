"""Layers over the live parameters of a model, which stay where they are. Owns how they are found by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from headrace.attention.base import HeadNorms
from headrace.config.layer_spec import ExpertsSpec
from headrace.kernels import ExpertKernels, LayerKernels
from headrace.kernels.experts import RouterRule
from headrace.layers.experts import Experts, Router
from headrace.layers.linear import GemmCounter, Linear
from headrace.layers.norm import RmsNorm
from headrace.types.errors import UnsupportedModelError


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

    def router(self, name: str, spec: ExpertsSpec, *, rounds: bool) -> Router:
        """Over that weight, by the rule of `spec`; `rounds` as in `RouterRule`."""
        rule = RouterRule(spec.num_per_token, spec.normalizes, rounds)
        return Router(self._expert_kernels, self.counter, self.tensors[f"{self.prefix}{name}.weight"], rule)

    def experts(self, gate_up: str, down: str) -> Experts:
        """Over the weights of all experts."""
        gate_up_E2FX, down_EXF = (self.tensors[f"{self.prefix}{name}.weight"] for name in (gate_up, down))
        return Experts(self._expert_kernels, self.counter, gate_up_E2FX, down_EXF)

    @property
    def _expert_kernels(self) -> ExpertKernels:
        if self.kernels.experts is None:
            raise UnsupportedModelError("these kernels compute no layers of experts", field="architectures")
        return self.kernels.experts
