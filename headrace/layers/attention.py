"""Self-attention: fused projection, optional per-head norms, rotary embedding, and a backend's step in between.

Legend: T tokens, H query heads, G kv heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.attention.base import AttentionShape, AttentionStep
from headrace.kernels import KernelSet
from headrace.layers.linear import Linear
from headrace.layers.norm import RmsNorm


@dataclass(frozen=True)
class RopeRows:
    """Cosines and sines of a step's tokens, [T, D] each: looked up once for all layers."""

    cos_TD: Tensor
    sin_TD: Tensor


class SelfAttention:
    """`qkv` yields H query, G key and G value heads per token, in this order.

    `output` maps H * D back to hidden; it is the caller's to apply, to the tokens that need it.
    """

    def __init__(
        self,
        kernels: KernelSet,
        shape: AttentionShape,
        qkv: Linear,
        output: Linear,
        q_norm: RmsNorm | None,
        k_norm: RmsNorm | None,
    ) -> None:
        self._rope = kernels.rope
        self._shape = shape
        self._qkv = qkv
        self.output = output
        self._q_norm = q_norm
        self._k_norm = k_norm

    def attend(self, x_TX: Tensor, layer: int, rope: RopeRows, step: AttentionStep) -> Tensor:
        """[T, hidden] -> heads' outputs [T, H * D], to be mapped by `output`."""
        shape = self._shape
        num_rotated = shape.num_heads + shape.num_kv_heads
        qkv = self._qkv(x_TX).view(x_TX.shape[0], num_rotated + shape.num_kv_heads, shape.head_dim)
        rotated = self._rope(self._normed(qkv[:, :num_rotated]), rope.cos_TD, rope.sin_TD)
        q_THD, k_TGD, v_TGD = rotated[:, : shape.num_heads], rotated[:, shape.num_heads :], qkv[:, num_rotated:]
        return step.run(layer, q_THD, k_TGD, v_TGD)

    def _normed(self, qk: Tensor) -> Tensor:
        if self._q_norm is None or self._k_norm is None:
            return qk
        num_heads = self._shape.num_heads
        return torch.cat([self._q_norm(qk[:, :num_heads]), self._k_norm(qk[:, num_heads:])], dim=1)
