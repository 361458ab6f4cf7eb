"""From the fused projection of a layer to its heads, by the row operations of a CPU. Must not know what attends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headrace.attention.base import HeadNorms
from headrace.kernels import KernelSet
from headrace.kernels.paged_kv import AttentionShape
from headrace.kernels.rope_tables import RotaryTables


class Heads(NamedTuple):
    """The heads of every layer of a KV group, and what norms and rotates them."""

    shape: AttentionShape
    kernels: KernelSet
    rotary: RotaryTables

    def at(self, positions_T: Tensor) -> StepHeads:
        """Those of one step's tokens: cosines and sines are looked up once for all layers."""
        cos_PD, sin_PD = self.rotary
        return StepHeads(self, cos_PD.index_select(0, positions_T), sin_PD.index_select(0, positions_T))


class StepHeads(NamedTuple):
    """The heads of one step, whose tokens have these cosines and sines."""

    heads: Heads
    cos_TD: Tensor
    sin_TD: Tensor

    def split(self, qkv_TX: Tensor, norms: HeadNorms | None) -> tuple[Tensor, Tensor, Tensor]:
        """[T, (H + 2 G) * D] -> queries [T, H, D], keys [T, G, D] and, as they are, values [T, G, D]."""
        shape, kernels, _ = self.heads
        num_heads, num_rotated = shape.num_heads, shape.num_heads + shape.num_kv_heads
        qkv = qkv_TX.view(qkv_TX.shape[0], num_rotated + shape.num_kv_heads, shape.head_dim)
        qk = qkv[:, :num_rotated]
        if norms is not None:
            q = kernels.rms_norm(qk[:, :num_heads], norms.q_weight, norms.eps)
            qk = torch.cat([q, kernels.rms_norm(qk[:, num_heads:], norms.k_weight, norms.eps)], dim=1)
        rotated = kernels.rope(qk, self.cos_TD, self.sin_TD)
        return rotated[:, :num_heads], rotated[:, num_heads:], qkv[:, num_rotated:]
