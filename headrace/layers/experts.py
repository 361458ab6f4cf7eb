"""A router and the experts it picks from, over parameters owned elsewhere."""

from __future__ import annotations

from torch import Tensor

from headrace.kernels import ExpertKernels
from headrace.kernels.experts import Routed, RouterRule
from headrace.layers.linear import GemmCounter
from headrace.layers.norm import Normed


class Router:
    """Gives each token of a norm to some experts; weight [experts, hidden]."""

    def __init__(self, kernels: ExpertKernels, counter: GemmCounter, weight: Tensor, rule: RouterRule) -> None:
        self.kernels = kernels
        self.counter = counter
        self.weight = weight
        self.rule = rule

    def __call__(self, x: Normed) -> Routed:
        """[T, hidden] -> its norm, and who is to transform it."""
        self.counter.num_calls += 1
        return self.kernels.normed_route(*x, self.weight, self.rule)


class Experts:
    """Gated blocks; weights [experts, gates then ups, hidden] and [experts, hidden, intermediate]. What they make of
    the tokens that are given to them is added to the stream by `Residual.add_experts`."""

    def __init__(self, kernels: ExpertKernels, counter: GemmCounter, gate_up: Tensor, down: Tensor) -> None:
        self.kernels = kernels
        self.counter = counter
        self.gate_up = gate_up
        self.down = down
