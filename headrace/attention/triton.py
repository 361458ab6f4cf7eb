"""The CUDA backend of our own kernels: a step is a list of work items, whatever its mix of prompts and decode rows.

Owns the planner that cuts a step and the launches that run it; the words between travel in the step buffer. Rows that
share leading pages read them once. With `numerics="invariant"` every context is cut at fixed positions. Must not know
scheduling or layers. Legend: T packed tokens, X width of the fused projection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.attention.base import AttentionStep, Bucket, DeviceTables, HeadNorms, StepRows
from headrace.attention.projection import HeadProjection
from headrace.kernels.paged_kv import AttentionShape, KvPool
from headrace.kernels.rope_tables import RotaryTables
from headrace.kernels.triton.paged_attention import PagedAttention
from headrace.kernels.triton.work_items import AttentionPlanner, LaunchBounds, WorkLimits
from headrace.types.request import Int32Array

FIXED_SPLIT = 256
"""Positions per part of a context in invariant mode: as fast as 512, and shared prompts of 256 tokens still count."""


class TritonAttention:
    """Plans and launches over one pool, for steps of at most `max_tokens`.

    `dtype` is that of queries; the pool's may be narrower."""

    captures = True

    def __init__(
        self,
        shape: AttentionShape,
        pool: KvPool,
        rotary: RotaryTables,
        dtype: torch.dtype,
        max_tokens: int,
        *,
        invariant: bool,
    ) -> None:
        page_size, device = pool.geometry.page_size, rotary.cos_PD.device
        split = FIXED_SPLIT if invariant else None
        limits = WorkLimits.of_steps(max_tokens)
        pdl = device.type == "cuda"
        self.pool = pool
        self.attention = PagedAttention(shape, page_size, limits, dtype, device, split, kv_dtype=pool.dtype, pdl=pdl)
        self.projection = HeadProjection(shape, pool, rotary, pdl=pdl)
        self.metadata_size = limits.size
        self._planner = AttentionPlanner(
            limits, self.attention.tile_sizes, page_size, shape.num_kv_heads, split, max_positions=len(rotary.cos_PD)
        )

    def fill(self, metadata: Int32Array, rows: StepRows, bucket: Bucket) -> int:
        """Write a step's work items; returns how many words are in use."""
        bounds = self._bounds(bucket)
        return self._planner.fill(metadata, rows.slots, rows.starts, rows.lengths, rows.prefix_groups, bounds).size

    def steps(self, tables: DeviceTables, bucket: Bucket) -> list[AttentionStep]:
        """The launches of every step of this size, for its one group."""
        return [_TritonStep(self, tables, self._bounds(bucket))]

    def _bounds(self, bucket: Bucket) -> LaunchBounds:
        return self._planner.bounds(bucket.num_rows, bucket.num_tokens, is_decode=bucket.is_decode)


class _TritonStep:
    """As `AttentionStep`."""

    def __init__(self, backend: TritonAttention, tables: DeviceTables, bounds: LaunchBounds) -> None:
        self._backend = backend
        self._tables = tables
        self._bounds = bounds

    def run(self, layer: int, qkv_TX: Tensor, norms: HeadNorms | None) -> Tensor:
        """As `AttentionStep.run`."""
        backend, tables = self._backend, self._tables
        q_THD = backend.projection.run(layer, qkv_TX, norms, tables)
        out_THD = qkv_TX.new_empty(q_THD.shape)
        keys, values = backend.pool.keys[layer], backend.pool.values[layer]
        backend.attention.run(q_THD, keys, values, tables.page_table, tables.metadata, out_THD, self._bounds)
        return out_THD.view(len(q_THD), -1)
