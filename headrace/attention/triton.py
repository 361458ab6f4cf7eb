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
    DeviceTables,
    HeadNorms,
    Launch,
    ProjectedStep,
    RotaryTables,
    StepRows,
)
from headrace.kernels.paged_kv import KvPool
from headrace.kernels.triton.paged_attention import PagedAttention
from headrace.kernels.triton.row_operations import HeadLayout, rope_and_store
from headrace.kernels.triton.work_items import AttentionPlanner, LaunchBounds, WorkLimits
from headrace.types.request import Int32Array

FIXED_SPLIT = 256
"""Positions per part of a context in invariant mode: as fast as 512, and shared prompts of 256 tokens still count."""

_MAX_ITEMS = 8192
_MAX_SLOTS = 16384


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
        self._rotary = rotary
        self._layout = HeadLayout(shape.num_heads, shape.num_kv_heads, shape.head_dim, geometry.page_size)
        split = FIXED_SPLIT if invariant else None
        limits = WorkLimits(max_tokens, _MAX_ITEMS, _MAX_SLOTS)
        sizes = (shape.num_heads, shape.num_kv_heads, shape.head_dim, geometry.page_size)
        overlap = device.type == "cuda"
        self._attention = PagedAttention(*sizes, limits, dtype, device, split, overlap=overlap)
        self._overlap = overlap
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

    def step(self, tables: DeviceTables, launch: Launch) -> ProjectedStep:
        """The launches of every step of this size."""
        bounds = self._planner.bounds(launch.num_rows, launch.num_tokens, is_decode=launch.is_decode)
        return _TritonStep(
            self._pool, self._rotary, tables, self._layout, self._attention, bounds, overlap=self._overlap
        )


class _TritonStep:
    """As `ProjectedStep`."""

    def __init__(
        self,
        pool: KvPool,
        rotary: RotaryTables,
        tables: DeviceTables,
        layout: HeadLayout,
        attention: PagedAttention,
        bounds: LaunchBounds,
        *,
        overlap: bool,
    ) -> None:
        self._pool = pool
        self._rotary = rotary
        self._tables = tables
        self._layout = layout
        self._attention = attention
        self._bounds = bounds
        self._overlap = overlap

    def run(self, layer: int, qkv_TX: Tensor, heads: HeadNorms | None) -> Tensor:
        """As `ProjectedStep.run`."""
        layout, tables, rotary = self._layout, self._tables, self._rotary
        num_tokens = qkv_TX.shape[0]
        keys, values = self._pool.keys[layer], self._pool.values[layer]
        q_THD = qkv_TX.view(num_tokens, -1, layout.head_dim)[:, : layout.num_heads]
        norms = None if heads is None else (heads.q_weight, heads.k_weight)
        rope_and_store(
            qkv_TX, None, norms, 0.0 if heads is None else heads.eps, rotary.cos_PD, rotary.sin_PD,
            tables.positions[:num_tokens], tables.table_rows[:num_tokens], tables.page_table, layout, q_THD,
            keys, values, overlap=self._overlap,
        )  # fmt: skip
        out_THD = qkv_TX.new_empty(num_tokens, layout.num_heads, layout.head_dim)
        self._attention.run(
            q_THD, keys, values, tables.page_table, tables.words, out_THD,
            num_narrow=self._bounds.narrow, num_wide=self._bounds.wide, num_merged=self._bounds.merged,
        )  # fmt: skip
        return out_THD.view(num_tokens, -1)
