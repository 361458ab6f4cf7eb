"""The attention oracle: one sequence at a time, written as its definition. Slow on purpose."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.attention.base import AttentionInputs, AttentionShape
from headrace.kernels.paged_kv import KvPool


class ReferenceAttention:
    """Gathers each row's keys position by position and attends in float32."""

    def __init__(self, shape: AttentionShape, pool: KvPool) -> None:
        self._shape = shape
        self._pool = pool

    def plan(self, inputs: AttentionInputs) -> ReferenceStep:
        """Nothing to prepare: every layer reads the page table again."""
        return ReferenceStep(self._shape, self._pool, inputs)


class ReferenceStep:
    """One step of the oracle."""

    def __init__(self, shape: AttentionShape, pool: KvPool, inputs: AttentionInputs) -> None:
        self._shape = shape
        self._pool = pool
        self._inputs = inputs

    def run(self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        """As `AttentionStep.run`."""
        keys, values = self._pages(self._pool.keys[layer]), self._pages(self._pool.values[layer])
        for token, (slot, position) in enumerate(
            zip(self._inputs.token_slots, self._inputs.token_positions, strict=True)
        ):
            page, offset = self._locate(int(slot), int(position))
            keys[page, :, offset] = k_TGD[token]
            values[page, :, offset] = v_TGD[token]
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype)
        first = 0
        for slot, start, length in zip(
            self._inputs.row_slots, self._inputs.row_starts, self._inputs.row_lengths, strict=True
        ):
            places = [self._locate(int(slot), position) for position in range(int(start + length))]
            k_LGD = torch.stack([keys[page, :, offset] for page, offset in places]).float()
            v_LGD = torch.stack([values[page, :, offset] for page, offset in places]).float()
            row_q = q_THD[first : first + int(length)].float()
            out_THD[first : first + int(length)] = _attend(row_q, k_LGD, v_LGD, int(start), self._shape).to(q_THD.dtype)
            first += int(length)
        return out_THD.view(q_THD.shape[0], -1)

    def _pages(self, flat: Tensor) -> Tensor:
        geometry = self._pool.geometry
        return flat.view(geometry.num_pages, geometry.num_kv_heads, geometry.page_size, geometry.head_dim)

    def _locate(self, slot: int, position: int) -> tuple[int, int]:
        page_size = self._pool.geometry.page_size
        return int(self._inputs.page_table[slot, position // page_size]), position % page_size


def _attend(q_THD: Tensor, k_LGD: Tensor, v_LGD: Tensor, start: int, shape: AttentionShape) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, query i seeing positions up to start + i (Vaswani et al., 2017)."""
    group_size = shape.num_heads // shape.num_kv_heads
    k_LHD, v_LHD = k_LGD.repeat_interleave(group_size, 1), v_LGD.repeat_interleave(group_size, 1)
    scores_HTL = torch.einsum("thd,lhd->htl", q_THD, k_LHD) * shape.scale
    seen_TL = torch.arange(k_LGD.shape[0]) <= start + torch.arange(q_THD.shape[0])[:, None]
    weights_HTL = torch.softmax(scores_HTL.masked_fill(~seen_TL, float("-inf")), dim=-1)
    return torch.einsum("htl,lhd->thd", weights_HTL, v_LHD)
