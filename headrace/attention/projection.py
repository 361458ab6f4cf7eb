"""From the fused projection of a layer to queries in place and keys and values in the pool: for every device backend.

Owns one kernel's arguments. Must not know how a step attends.
"""

from __future__ import annotations

from torch import Tensor

from headrace.attention.base import DeviceTables, HeadNorms
from headrace.kernels.paged_kv import AttentionShape, KvPool
from headrace.kernels.rope_tables import RotaryTables
from headrace.kernels.triton.row_operations import rope_and_store


class HeadProjection:
    """Norms, rotates and stores heads. `pdl`: its launch may begin before the one ahead ends."""

    def __init__(self, shape: AttentionShape, pool: KvPool, rotary: RotaryTables, *, pdl: bool = False) -> None:
        self._shape = shape
        self._pool = pool
        self._rotary = rotary
        self._pdl = pdl

    def run(self, layer: int, qkv_TX: Tensor, norms: HeadNorms | None, tables: DeviceTables) -> Tensor:
        """Queries [T, H, D], normed and rotated, in their place in [T, (H + 2 G) * D]; keys and values are stored."""
        shape, rotary, num_tokens = self._shape, self._rotary, qkv_TX.shape[0]
        q_THD = qkv_TX.view(num_tokens, -1, shape.head_dim)[:, : shape.num_heads]
        weights = None if norms is None else (norms.q_weight, norms.k_weight)
        rope_and_store(
            qkv_TX, None, weights, 0.0 if norms is None else norms.eps, rotary.cos_PD, rotary.sin_PD,
            tables.positions[:num_tokens], tables.table_rows[:num_tokens], tables.page_table, shape,
            self._pool.geometry.page_size, q_THD, self._pool.keys[layer], self._pool.values[layer], pdl=self._pdl,
        )  # fmt: skip
        return q_THD
