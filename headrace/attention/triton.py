"""The CUDA backend of our own kernels: a step is a list of work items, whatever its mix of prompts and decode rows.

Owns the planner that cuts a step and the launches that run it; the words between travel in the step buffer. Rows that
share leading pages read them once. With `numerics="invariant"` every context is cut at fixed positions. Must not know
scheduling or layers. Legend: T packed tokens, X width of the fused projection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.attention.base import (
    AttentionShape,
    AttentionStep,
    DeviceTables,
    HeadNorms,
    Launch,
    StepRows,
)
from headrace.attention.projection import HeadProjection
from headrace.kernels.paged_kv import KvPool
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
        geometry, device = pool.geometry, rotary.cos_PD.device
        self._pool = pool
        split = FIXED_SPLIT if invariant else None
        limits = WorkLimits.of_steps(max_tokens)
        sizes = (shape.num_heads, shape.num_kv_heads, shape.head_dim, geometry.page_size)
        overlap = device.type == "cuda"
        self._attention = PagedAttention(*sizes, limits, dtype, device, split, overlap=overlap)
        self._projection = HeadProjection(shape, pool, rotary, overlap=overlap)
        tiles, max_positions = self._attention.tile_sizes, rotary.cos_PD.shape[0]
        self._planner = AttentionPlanner(
            limits, tiles, geometry.page_size, shape.num_kv_heads, split, max_positions=max_positions
        )
        self.num_words = limits.num_words

    def fill(self, words: Int32Array, rows: StepRows, launch: Launch) -> int:
        """Write a step's work items; returns how many words are in use."""
        bounds = self._planner.bounds(launch.num_rows, launch.num_tokens, is_decode=launch.is_decode)
        summary = self._planner.fill(words, rows.slots, rows.starts, rows.lengths, rows.prefix_groups, bounds=bounds)
        return summary.num_words

    def step(self, tables: DeviceTables, launch: Launch) -> AttentionStep:
        """The launches of every step of this size."""
        bounds = self._planner.bounds(launch.num_rows, launch.num_tokens, is_decode=launch.is_decode)
        return _TritonStep(self._projection, self._pool, tables, self._attention, bounds)


class _TritonStep:
    """As `AttentionStep`."""

    def __init__(
        self,
        projection: HeadProjection,
        pool: KvPool,
        tables: DeviceTables,
        attention: PagedAttention,
        bounds: LaunchBounds,
    ) -> None:
        self._projection = projection
        self._pool = pool
        self._tables = tables
        self._attention = attention
        self._bounds = bounds

    def run(self, layer: int, qkv_TX: Tensor, heads: HeadNorms | None) -> Tensor:
        """As `AttentionStep.run`."""
        tables, bounds = self._tables, self._bounds
        q_THD = self._projection.run(layer, qkv_TX, heads, tables)
        out_THD = qkv_TX.new_empty(q_THD.shape)
        self._attention.run(
            q_THD, self._pool.keys[layer], self._pool.values[layer], tables.page_table, tables.words, out_THD,
            num_narrow=bounds.narrow, num_wide=bounds.wide, num_merged=bounds.merged,
        )  # fmt: skip
        return out_THD.view(len(q_THD), -1)
