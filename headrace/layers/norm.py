"""Root-mean-square norm over parameters owned elsewhere."""

from __future__ import annotations

from torch import Tensor

from headrace.kernels import KernelSet


class RmsNorm:
    """Norm over the last axis, weight [width]."""

    def __init__(self, kernels: KernelSet, weight: Tensor, eps: float) -> None:
        self._kernels = kernels
        self._weight = weight
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """[..., width] -> the same shape."""
        return self._kernels.rms_norm(x, self._weight, self._eps)
