"""Root-mean-square norm over parameters owned elsewhere. What computes it belongs to the kernels that take it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RmsNorm(NamedTuple):
    """Norm over the last axis: weight [width], and what is added to the mean square."""

    weight: Tensor
    eps: float


class Normed(NamedTuple):
    """The norm of a stream [T, X], not computed yet: the product that takes it may do both at once. Without a weight
    `values_TX` is the norm itself, which came with what was added to the stream."""

    values_TX: Tensor
    weight_X: Tensor | None
    eps: float
