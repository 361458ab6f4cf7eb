"""Which implementation of the row operations a model is built with. Owns the choice; must not know models or plans.

Shape legend: T tokens, I input features, O output features, F half of a gated projection, H heads, D head size,
V vocabulary, X hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor

from headrace.kernels import fast, invariant, reference
from headrace.kernels.experts import Routed, RouterRule, route
from headrace.kernels.products import PLAIN, Products
from headrace.types.errors import ConfigError


class PartialSum(Protocol):
    """A rank's part of a sum over ranks, until it is added to the stream; every rank has one."""

    def add_(self, residual_TX: Tensor, norm: tuple[Tensor, float] | None = None) -> Tensor | None:
        """residual += the sum, in place, once. `norm` (weight [X], eps): what is done with the residual next; its norm
        [T, X] is returned where the same launch can compute it, and else None."""


class LayerKernels(Protocol):
    """What a decoder layer is made of: products over the normed residual stream, and products added back to it.

    A set may fuse what each of these says. All tensors have one dtype unless stated; outputs are new tensors. Where the
    weight of a norm is None, x is normed already. What follows the projection of heads is the attention backend's.
    """

    def linear(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        """x W^T + b -> [T, O]: of a rank whose part of a sum this is."""

    def normed_linear(
        self, x_TI: Tensor, norm_I: Tensor | None, eps: float, weight_OI: Tensor, bias_O: Tensor | None
    ) -> Tensor:
        """rms_norm(x) W^T + b -> [T, O]."""

    def normed_gate(
        self, x_TI: Tensor, norm_I: Tensor | None, eps: float, weight_OI: Tensor, bias_O: Tensor | None
    ) -> Tensor:
        """silu(gate) * up of rms_norm(x) W^T + b, whose first half are the gates -> [T, F]."""

    def linear_add_(
        self, residual_TO: Tensor, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None
    ) -> PartialSum | None:
        """residual += x W^T + b, in place; or returned is what is still to be added for that."""

    def normed_logits(self, x_TI: Tensor, norm_I: Tensor | None, eps: float, weight_VI: Tensor) -> Tensor:
        """rms_norm(x) W^T -> float32 [T, V]."""

    @property
    def experts(self) -> ExpertKernels | None:
        """What layers of experts are made of; None where this set has nothing for them."""


class ExpertKernels(Protocol):
    """As `LayerKernels`, for layers whose tokens are given to a few of many gated blocks."""

    def normed_route(
        self, x_TX: Tensor, norm_X: Tensor | None, eps: float, router_EX: Tensor, rule: RouterRule
    ) -> Routed:
        """rms_norm(x), and the experts that a router picks for it."""

    def experts_add_(
        self, residual_TX: Tensor, routed: Routed, gate_up_E2FX: Tensor, down_EXF: Tensor
    ) -> PartialSum | None:
        """residual += the weighted sum of W_down silu_and_mul(W_gate_up hidden) over each token's experts, in place; or
        returned is what is still to be added for that."""


@dataclass(frozen=True)
class KernelSet:
    """The row operations of a decoder and its attention on a CPU. All are of one dtype unless stated.

    linear(x_TI, weight_OI, bias_O or None) -> [T, O]
    linear_add_(residual_TO, x_TI, weight_OI, bias_O or None): residual += linear, in place
    rms_norm(x_..D, weight_D, eps) -> [..., D], reduced in float32
    rope(x_THD, cos_TD, sin_TD) -> [T, H, D] contiguous; half-rotation convention, tables from `rope_tables`
    silu_and_mul(x_T2F) -> silu(x[:, :F]) * x[:, F:]
    experts_add_(residual_TX, routed, gate_up_E2FX, down_EXF): as `ExpertKernels.experts_add_`
    """

    name: str
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    linear_add_: Callable[[Tensor, Tensor, Tensor, Tensor | None], None]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rope: Callable[[Tensor, Tensor, Tensor], Tensor]
    silu_and_mul: Callable[[Tensor], Tensor]
    experts_add_: Callable[[Tensor, Routed, Tensor, Tensor], None]

    @property
    def experts(self) -> ExpertKernels:
        return self

    def normed_linear(
        self, x_TI: Tensor, norm_I: Tensor | None, eps: float, weight_OI: Tensor, bias_O: Tensor | None
    ) -> Tensor:
        return self.linear(self._normed(x_TI, norm_I, eps), weight_OI, bias_O)

    def normed_gate(
        self, x_TI: Tensor, norm_I: Tensor | None, eps: float, weight_OI: Tensor, bias_O: Tensor | None
    ) -> Tensor:
        return self.silu_and_mul(self.linear(self._normed(x_TI, norm_I, eps), weight_OI, bias_O))

    def normed_logits(self, x_TI: Tensor, norm_I: Tensor | None, eps: float, weight_VI: Tensor) -> Tensor:
        return self.linear(self._normed(x_TI, norm_I, eps), weight_VI, None).float()

    def normed_route(
        self, x_TX: Tensor, norm_X: Tensor | None, eps: float, router_EX: Tensor, rule: RouterRule
    ) -> Routed:
        hidden_TX = self._normed(x_TX, norm_X, eps)
        return route(hidden_TX, self.linear(hidden_TX, router_EX, None), rule)

    def _normed(self, x: Tensor, norm_D: Tensor | None, eps: float) -> Tensor:
        return x if norm_D is None else self.rms_norm(x, norm_D, eps)


_MODULES = {"reference": reference, "fast": fast, "invariant": invariant}


def select_kernels(name: str, products: Products = PLAIN) -> KernelSet:
    """The kernel set called "reference", "fast" or "invariant". Raises `ConfigError` for another name."""
    module = _MODULES.get(name)
    if module is None:
        raise ConfigError(f"numerics {name!r} is not one of {', '.join(_MODULES)}", field="numerics")
    if module is fast:
        linear, linear_add_ = products.linear, products.linear_add_
    else:
        linear, linear_add_ = partial(module.linear, products=products), partial(module.linear_add_, products=products)
    experts_add_ = partial(module.experts_add_, products=products)
    return KernelSet(name, linear, linear_add_, module.rms_norm, module.rope, module.silu_and_mul, experts_add_)
