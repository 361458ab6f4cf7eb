"""What the kernels of a device compute, by definition: float64 between the roundings. For tests and benchmarks.

Legend: T tokens, X hidden, F half of a gated projection, M rows, K inputs and N outputs of a product, H query and G kv
heads, D head size, P positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.paged_kv import AttentionShape


class ScaledShape(AttentionShape):
    """Heads whose scores have a factor of their own, as those of a family with a constant for it would."""

    @property
    def scale(self) -> float:
        return 0.8


def reference_rms_norm(x_TX: Tensor, weight_X: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, 2019)."""
    wide = x_TX.double()
    scale = 1.0 / torch.sqrt((wide * wide).mean(-1, keepdim=True) + eps)
    return ((wide * scale).to(x_TX.dtype).double() * weight_X.double()).to(x_TX.dtype)


def reference_silu_and_mul(x_T2F: Tensor) -> Tensor:
    """x1 * sigmoid(x1) * x2 (SwiGLU; Shazeer, 2020)."""
    gate, up = x_T2F.double().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(x_T2F.dtype)


def reference_rope(
    qkv_TX: Tensor, bias_X: Tensor | None, norms: tuple[Tensor, Tensor] | None, eps: float,
    cos_PD: Tensor, sin_PD: Tensor, positions_T: Tensor, shape: AttentionShape,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Queries [T, H, D], keys and values [T, G, D] by definition, in float64 between the roundings."""
    num_heads, num_kv, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    x = qkv_TX if bias_X is None else (qkv_TX.double() + bias_X.double()).to(qkv_TX.dtype)
    heads = x.view(len(x), -1, dim)
    q, k, v = heads[:, :num_heads], heads[:, num_heads : num_heads + num_kv], heads[:, num_heads + num_kv :]
    if norms is not None:
        q, k = (reference_rms_norm(part, weight, eps) for part, weight in zip((q, k), norms, strict=True))
    cos, sin = (table[positions_T.long()].double()[:, None] for table in (cos_PD, sin_PD))

    def turn(part: Tensor) -> Tensor:
        wide = part.double()
        first, second = wide.chunk(2, dim=-1)
        return (wide * cos + torch.cat([-second, first], -1) * sin).to(part.dtype)

    return turn(q), turn(k), v


def reference_linear(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """x W^T + b in float64."""
    y = x_MK.double() @ weight_NK.double().T
    return y if bias_N is None else y + bias_N.double()


def reference_attention(
    q_THD: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    rows: list[tuple[int, int, int]],
    num_kv: int,
    page_size: int,
    scale: float | None = None,
) -> Tensor:
    """The oracle in float64: rows are (page-table row, first position, number of tokens), packed in order.

    Keys and values count as the pools hold them. `scale` is 1 / sqrt(D) unless given.
    """
    num_heads, head_dim = q_THD.shape[1:]
    scale = head_dim**-0.5 if scale is None else scale
    outputs, first = [], 0
    for table_row, start, length in rows:
        positions = torch.arange(start + length, dtype=torch.int64, device=q_THD.device)
        pages = page_table[table_row].long()[positions // page_size]
        heads = torch.arange(num_kv, dtype=torch.int64, device=q_THD.device)
        flat = (pages[None] * num_kv + heads[:, None]) * page_size + positions % page_size
        k, v = (pool[flat].double().repeat_interleave(num_heads // num_kv, 0) for pool in (keys, values))
        q = q_THD[first : first + length].double().transpose(0, 1)
        scores = q @ k.transpose(1, 2) * scale
        seen = positions[None] <= start + torch.arange(length, dtype=torch.int64, device=q_THD.device)[:, None]
        weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1)
        outputs.append((weights @ v).transpose(0, 1))
        first += length
    return torch.cat(outputs)
