"""From the fused projection of a layer to its heads, by the row operations of a CPU. Must not know what attends."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.attention.base import AttentionShape, HeadNorms
from headrace.kernels import KernelSet
from headrace.kernels.rope_tables import RotaryTables


class StepHeads:
    """Norms and rotates the heads of one step, whose cosines and sines are looked up once for all layers."""

    def __init__(self, shape: AttentionShape, kernels: KernelSet, rotary: RotaryTables, positions_T: Tensor) -> None:
        self._shape = shape
        self._kernels = kernels
        self._cos_TD = rotary.cos_PD.index_select(0, positions_T)
        self._sin_TD = rotary.sin_PD.index_select(0, positions_T)

    def split(self, qkv_TX: Tensor, norms: HeadNorms | None) -> tuple[Tensor, Tensor, Tensor]:
        """[T, (H + 2 G) * D] -> queries [T, H, D], keys [T, G, D] and, as they are, values [T, G, D]."""
        kernels, shape, num_heads = self._kernels, self._shape, self._shape.num_heads
        num_rotated = num_heads + shape.num_kv_heads
        qkv = qkv_TX.view(qkv_TX.shape[0], num_rotated + shape.num_kv_heads, shape.head_dim)
        qk = qkv[:, :num_rotated]
        if norms is not None:
            q = kernels.rms_norm(qk[:, :num_heads], norms.q_weight, norms.eps)
            qk = torch.cat([q, kernels.rms_norm(qk[:, num_heads:], norms.k_weight, norms.eps)], dim=1)
        rotated = kernels.rope(qk, self._cos_TD, self._sin_TD)
        return rotated[:, :num_heads], rotated[:, num_heads:], qkv[:, num_rotated:]
