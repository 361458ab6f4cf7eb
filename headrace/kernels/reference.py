"""The oracle: each row operation written as its definition, in float32. Slow on purpose; shapes as in `KernelSet`."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.experts import Routed
from headrace.kernels.products import PLAIN, Products


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, products: Products = PLAIN) -> Tensor:
    """x W^T + b."""
    y_TO = products.compound(torch.einsum, "ti,oi->to", x_TI.float(), weight_OI.float())
    return (y_TO if bias_O is None else y_TO + bias_O.float()).to(x_TI.dtype)


def linear_add_(
    residual_TO: Tensor, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, products: Products = PLAIN
) -> None:
    """residual += x W^T + b."""
    residual_TO.copy_(residual_TO + linear(x_TI, weight_OI, bias_O, products))


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, 2019)."""
    wide = x.float()
    scale = 1.0 / torch.sqrt((wide * wide).sum(-1, keepdim=True) / x.shape[-1] + eps)
    return (wide * scale).to(x.dtype) * weight_D


def rope(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + D/2]) by the position's angles (Su et al., 2021; half-rotation layout)."""
    half = x_THD.shape[-1] // 2
    rotated = torch.cat([-x_THD[..., half:], x_THD[..., :half]], dim=-1)
    return x_THD * cos_TD[:, None] + rotated * sin_TD[:, None]


def silu_and_mul(x_T2F: Tensor) -> Tensor:
    """x1 * sigmoid(x1) * x2 (SwiGLU; Shazeer, 2020)."""
    gate, up = x_T2F.float().chunk(2, dim=-1)
    return (gate / (1.0 + torch.exp(-gate)) * up).to(x_T2F.dtype)


def experts_add_(
    residual_TX: Tensor, routed: Routed, gate_up_E2FX: Tensor, down_EXF: Tensor, products: Products = PLAIN
) -> None:
    """residual += sum of w_e W_down,e SwiGLU(W_gate_up,e h) over a token's experts e (Shazeer et al., 2017)."""
    total_TX = torch.zeros_like(residual_TX, dtype=torch.float32)
    for expert in range(gate_up_E2FX.shape[0]):
        tokens, ranks = torch.where(routed.experts_TK == expert)
        gated = silu_and_mul(linear(routed.hidden_TX[tokens], gate_up_E2FX[expert], None, products))
        part = linear(gated, down_EXF[expert], None, products)
        total_TX.index_add_(0, tokens, (part * routed.weights_TK[tokens, ranks, None]).float())
    residual_TX.copy_(residual_TX + total_TX.to(residual_TX.dtype))
