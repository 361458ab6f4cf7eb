"""The fast CPU path of each row operation: few calls, few temporaries. Shapes as in `KernelSet`.

A linear layer is one product over all rows: `Products.linear` and `linear_add_` themselves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.kernels.experts import Routed, add_grouped_
from headrace.kernels.products import PLAIN, Products


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis; narrow dtypes are reduced in float32."""
    wide = x.float()
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * scale).to(x.dtype).mul_(weight_D)


def rope(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Half-rotation in three passes over the output."""
    half = x_THD.shape[-1] // 2
    rotated = x_THD.new_empty(x_THD.shape)
    torch.mul(x_THD, cos_TD.unsqueeze(1), out=rotated)
    sin_T1h = sin_TD[:, :half].unsqueeze(1)
    rotated[..., :half].addcmul_(x_THD[..., half:], sin_T1h, value=-1.0)
    rotated[..., half:].addcmul_(x_THD[..., :half], sin_T1h)
    return rotated


def silu_and_mul(x_T2F: Tensor) -> Tensor:
    """Two passes, one temporary."""
    num_features = x_T2F.shape[-1] // 2
    return F.silu(x_T2F[:, :num_features]).mul_(x_T2F[:, num_features:])


def experts_add_(
    residual_TX: Tensor, routed: Routed, gate_up_E2FX: Tensor, down_EXF: Tensor, products: Products = PLAIN
) -> None:
    """One product per expert and projection, over the rows of all tokens that are given to it."""
    add_grouped_(residual_TX, routed, gate_up_E2FX, down_EXF, products.linear, silu_and_mul)
