"""The attention oracle: one sequence at a time, written as its definition in float32. Runs on any device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headrace.attention.base import AttentionInputs, HeadNorms, Int64Array
from headrace.attention.heads import Heads, StepHeads
from headrace.kernels.paged_kv import AttentionShape, KvPool
from headrace.kernels.products import PLAIN, Products

_MAX_SCORES = 1 << 26
"""Scores held at once, over all heads: 256 MiB of float32, and a few copies of it."""


@dataclass(frozen=True)
class _Locations:
    """Where tokens are in the pool: page and offset, int64 [n] each, on the pool's device."""

    pages: Tensor
    offsets: Tensor


@dataclass(frozen=True)
class _Row:
    """`length` packed tokens from `first` on, at positions from `start`; its whole context is at `context`."""

    first: int
    length: int
    start: int
    context: _Locations


class ReferenceAttention:
    """Gathers each row's whole context and attends in float32. A narrow pool rounds what is stored, nothing else."""

    def __init__(self, heads: Heads, pool: KvPool, products: Products = PLAIN) -> None:
        self._heads = heads
        self._pool = pool
        self._products = products

    def plan(self, inputs: AttentionInputs) -> ReferenceStep:
        """Look up where every token and every context is; the page table may be on any device."""
        pool = self._pool
        device, page_size = pool.keys[0].device, pool.geometry.page_size

        def locate(slots: Int64Array | int, positions: Int64Array) -> _Locations:
            where = torch.from_numpy(positions).to(inputs.page_table.device)
            rows = slots if isinstance(slots, int) else torch.from_numpy(slots).to(where.device)
            pages = inputs.page_table[rows, where // page_size]
            return _Locations(pages.to(device, torch.int64), (where % page_size).to(device))

        rows, first = [], 0
        for slot, start, length in zip(
            inputs.row_slots.tolist(), inputs.row_starts.tolist(), inputs.row_lengths.tolist(), strict=True
        ):
            rows.append(_Row(first, length, start, locate(slot, np.arange(start + length))))
            first += length
        tokens = locate(inputs.token_slots, inputs.token_positions)
        return ReferenceStep(self._heads.at(inputs.rope_positions), pool, tokens, rows, self._products)


class ReferenceStep:
    """One step of the oracle."""

    def __init__(
        self, heads: StepHeads, pool: KvPool, tokens: _Locations, rows: list[_Row], products: Products
    ) -> None:
        self._heads = heads
        self._products = products
        self._pool = pool
        self._tokens = tokens
        self._rows = rows

    def run(self, layer: int, qkv_TX: Tensor, norms: HeadNorms | None) -> Tensor:
        """As `AttentionStep.run`."""
        q_THD, k_TGD, v_TGD = self._heads.split(qkv_TX, norms)
        keys, values = self._pool.pages(layer)
        _write(keys, self._tokens, k_TGD)
        _write(values, self._tokens, v_TGD)
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        for row in self._rows:
            tokens = slice(row.first, row.first + row.length)
            k_LGD, v_LGD = _read(keys, row.context), _read(values, row.context)
            q_BHD = q_THD[tokens].float()
            found_BHD = attend(q_BHD, k_LGD, v_LGD, row.start, self._heads.heads.shape, products=self._products)
            out_THD[tokens] = found_BHD.to(q_THD.dtype)
        return out_THD.view(q_THD.shape[0], -1)


def attend(
    q_THD: Tensor,
    k_LGD: Tensor,
    v_LGD: Tensor,
    start: int,
    shape: AttentionShape,
    max_scores: int = _MAX_SCORES,
    products: Products = PLAIN,
) -> Tensor:
    """softmax(scale * q k^T) v, query i seeing positions up to start + i (Vaswani et al., 2017); float32 [T, H, D].

    Queries are taken a block at a time, so that no more than `max_scores` scores are held at once.
    """
    group_size = shape.num_heads // shape.num_kv_heads
    k_LHD, v_LHD = k_LGD.repeat_interleave(group_size, 1), v_LGD.repeat_interleave(group_size, 1)
    positions_L = torch.arange(k_LGD.shape[0], dtype=torch.int64, device=k_LGD.device)
    out_THD = torch.empty_like(q_THD)
    block = max(1, max_scores // (shape.num_heads * len(positions_L)))
    for first in range(0, q_THD.shape[0], block):
        q_BHD = q_THD[first : first + block]
        last_seen_B = start + first + torch.arange(q_BHD.shape[0], dtype=torch.int64, device=q_BHD.device)
        scores_HBL = products.compound(torch.einsum, "bhd,lhd->hbl", q_BHD, k_LHD) * shape.scale
        scores_HBL.masked_fill_(positions_L > last_seen_B[:, None], float("-inf"))
        weights_HBL = torch.softmax(scores_HBL, dim=-1)
        out_THD[first : first + block] = products.compound(torch.einsum, "hbl,lhd->bhd", weights_HBL, v_LHD)
    return out_THD


def _write(pages: Tensor, locations: _Locations, values_TGD: Tensor) -> None:
    """Put one vector per token and KV head into the pool, in its dtype."""
    if pages.element_size() == 1:  # 8-bit floats have no infinity: too large a value is stored as the largest
        limit = torch.finfo(pages.dtype).max
        values_TGD = values_TGD.clamp(-limit, limit)
    _bits(pages)[locations.pages, :, locations.offsets] = _bits(values_TGD.to(pages.dtype))


def _read(pages: Tensor, locations: _Locations) -> Tensor:
    """The vectors at `locations`, float32 [n, G, D]."""
    return _bits(pages)[locations.pages, :, locations.offsets].view(pages.dtype).float()


def _bits(values: Tensor) -> Tensor:
    """The same memory as integers where torch cannot index the dtype (8-bit floats)."""
    return values.view(torch.uint8) if values.element_size() == 1 else values
