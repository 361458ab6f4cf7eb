"""Root-mean-square norm over parameters owned elsewhere. What computes it belongs to the kernels that take it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RmsNorm:
    """Norm over the last axis: weight [width], and what is added to the mean square."""

    weight: Tensor
    eps: float
