"""Self-attention: fused projection, optional per-head norms, rotary embedding, and a backend's step in between.

Two forms of the middle, chosen when the model is built: `SelfAttention` norms and rotates heads itself and hands
queries, keys and values to the step; `ProjectedAttention` hands the projection as it is to a step that does the rest.

Legend: T tokens, H query heads, G kv heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.attention.base import AttentionShape, AttentionStep, HeadNorms, ProjectedStep
from headrace.kernels import KernelSet
from headrace.layers.linear import Linear
from headrace.layers.norm import RmsNorm


@dataclass(frozen=True)
class RotatedStep:
    """One step's attention with the cosines and sines of its tokens, [T, D] each: looked up once for all layers."""

    attention: AttentionStep
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
        norm: RmsNorm,
        qkv: Linear,
        output: Linear,
        heads: HeadNorms | None,
    ) -> None:
        self._kernels = kernels
        self._shape = shape
        self._norm = norm
        self._qkv = qkv
        self.output = output
        self._heads = heads

    def attend(self, x_TX: Tensor, layer: int, step: RotatedStep) -> Tensor:
        """[T, hidden] -> heads' outputs [T, H * D], to be mapped by `output`."""
        shape = self._shape
        num_rotated = shape.num_heads + shape.num_kv_heads
        projected = self._qkv.of_normed(x_TX, self._norm)
        qkv = projected.view(x_TX.shape[0], num_rotated + shape.num_kv_heads, shape.head_dim)
        rotated = self._kernels.rope(self._normed(qkv[:, :num_rotated]), step.cos_TD, step.sin_TD)
        q_THD, k_TGD, v_TGD = rotated[:, : shape.num_heads], rotated[:, shape.num_heads :], qkv[:, num_rotated:]
        return step.attention.run(layer, q_THD, k_TGD, v_TGD)

    def _normed(self, qk: Tensor) -> Tensor:
        heads, num_heads = self._heads, self._shape.num_heads
        if heads is None:
            return qk
        q = self._kernels.rms_norm(qk[:, :num_heads], heads.q_weight, heads.eps)
        return torch.cat([q, self._kernels.rms_norm(qk[:, num_heads:], heads.k_weight, heads.eps)], dim=1)


class ProjectedAttention:
    """As `SelfAttention`, over a step that norms, rotates, stores and attends by itself."""

    def __init__(self, norm: RmsNorm, qkv: Linear, output: Linear, heads: HeadNorms | None) -> None:
        self._norm = norm
        self._qkv = qkv
        self.output = output
        self._heads = heads

    def attend(self, x_TX: Tensor, layer: int, step: ProjectedStep) -> Tensor:
        """[T, hidden] -> heads' outputs [T, H * D], to be mapped by `output`."""
        return step.run(layer, self._qkv.of_normed(x_TX, self._norm), self._heads)
