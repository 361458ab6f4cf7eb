"""Root-mean-square norm over parameters owned elsewhere. What computes it belongs to the kernels that take it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RmsNorm(NamedTuple):
    """Norm over the last axis: weight [width], and what is added to the mean square."""

    weight: Tensor
    eps: float


class Normed(NamedTuple):
    """The norm of the residual stream [T, X], not computed yet: the product that takes it may do both at once."""

    stream_TX: Tensor
    norm: RmsNorm
