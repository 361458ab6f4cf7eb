"""Which implementation of the row operations a model is built with. Owns the choice; must not know models or plans.

Shape legend: T tokens, I input features, O output features, F half of a gated projection, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from headrace.kernels import fast, invariant, reference
from headrace.types.errors import ConfigError


@dataclass(frozen=True)
class KernelSet:
    """The row operations of a decoder. All take and return tensors of one dtype unless stated.

    linear(x_TI, weight_OI, bias_O or None) -> [T, O]
    linear_add_(residual_TO, x_TI, weight_OI, bias_O or None): residual += linear, in place
    rms_norm(x_..D, weight_D, eps) -> [..., D], reduced in float32
    rope(x_THD, cos_TD, sin_TD) -> [T, H, D] contiguous; half-rotation convention, tables from `rope_tables`
    silu_and_mul(x_T2F) -> silu(x[:, :F]) * x[:, F:]
    """

    name: str
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    linear_add_: Callable[[Tensor, Tensor, Tensor, Tensor | None], None]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rope: Callable[[Tensor, Tensor, Tensor], Tensor]
    silu_and_mul: Callable[[Tensor], Tensor]


_MODULES = {"reference": reference, "fast": fast, "invariant": invariant}


def select_kernels(name: str) -> KernelSet:
    """The kernel set called "reference", "fast" or "invariant". Raises `ConfigError` for another name."""
    module = _MODULES.get(name)
    if module is None:
        raise ConfigError(f"numerics {name!r} is not one of {', '.join(_MODULES)}", field="numerics")
    return KernelSet(name, module.linear, module.linear_add_, module.rms_norm, module.rope, module.silu_and_mul)
