"""The oracle equals attention computed by hand in float64, one query at a time, whatever its blocks and page table."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.attention import AttentionInputs, AttentionShape, Heads
from headrace.attention.reference import ReferenceAttention, attend
from headrace.kernels import select_kernels
from headrace.kernels.paged_kv import KvGeometry, KvPool
from headrace.kernels.rope_tables import RotaryTables
from tests.kernels.oracles import ScaledShape

SHAPE = AttentionShape(num_heads=6, num_kv_heads=2, head_dim=16)
SCALE = 1 / math.sqrt(SHAPE.head_dim)
PAGE_SIZE, NUM_COLUMNS, NUM_SLOTS = 4, 8, 3


def by_hand(q_THD: Tensor, k_LGD: Tensor, v_LGD: Tensor, start: int, scale: float = SCALE) -> Tensor:
    """Attention as nested loops over queries and heads."""
    out = torch.zeros(q_THD.shape, dtype=torch.float64)
    for token in range(q_THD.shape[0]):
        for head in range(SHAPE.num_heads):
            group = head // (SHAPE.num_heads // SHAPE.num_kv_heads)
            seen = start + token + 1
            scores = (k_LGD[:seen, group].double() @ q_THD[token, head].double()) * scale
            out[token, head] = torch.softmax(scores, 0) @ v_LGD[:seen, group].double()
    return out


def inputs_of(page_table: Tensor, rows: list[tuple[int, int, int]]) -> AttentionInputs:
    """Rows as (slot, start, length)."""
    slots, starts, lengths = (np.array(values, np.int64) for values in zip(*rows, strict=True))
    positions = np.concatenate([np.arange(start, start + length) for _, start, length in rows])
    token_slots = np.repeat(slots, lengths)
    return AttentionInputs(page_table, slots, starts, lengths, positions, token_slots, torch.from_numpy(positions))


def pool_of(dtype: torch.dtype) -> tuple[KvPool, Tensor]:
    num_pages = NUM_SLOTS * NUM_COLUMNS + 1
    pages = np.random.default_rng(0).permutation(np.arange(1, num_pages)).astype(np.int32)
    geometry = KvGeometry(2, num_pages, SHAPE.num_kv_heads, PAGE_SIZE, SHAPE.head_dim)
    return KvPool(geometry, dtype), torch.from_numpy(pages.reshape(NUM_SLOTS, NUM_COLUMNS))


def over(pool: KvPool) -> ReferenceAttention:
    """Heads are turned by no angle at any position."""
    still = RotaryTables(torch.ones(40, SHAPE.head_dim), torch.zeros(40, SHAPE.head_dim))
    return ReferenceAttention(Heads(SHAPE, select_kernels("reference"), still), pool)


def fused(*heads: Tensor) -> Tensor:
    """As the projection of a layer holds them."""
    return torch.cat(heads, dim=1).flatten(1)


@pytest.mark.parametrize("max_scores", [1, 6 * 30 * 4, 1 << 26])
def test_attend_is_its_definition_in_any_blocks(max_scores: int) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(13, SHAPE.num_heads, SHAPE.head_dim, generator=generator)
    k, v = torch.randn(2, 30, SHAPE.num_kv_heads, SHAPE.head_dim, generator=generator)
    found = attend(q, k, v, 17, SHAPE, max_scores)
    torch.testing.assert_close(found.double(), by_hand(q, k, v, 17), atol=1e-6, rtol=0)
    scaled = ScaledShape(SHAPE.num_heads, SHAPE.num_kv_heads, SHAPE.head_dim)
    found = attend(q, k, v, 17, scaled, max_scores)
    torch.testing.assert_close(found.double(), by_hand(q, k, v, 17, scaled.scale), atol=3e-6, rtol=0)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02), (torch.float8_e4m3fn, 0.3)])
def test_rows_attend_to_what_their_pages_hold(dtype: torch.dtype, atol: float) -> None:
    """Two steps of two sequences; the second step's rows attend to keys that the first one stored."""
    pool, page_table = pool_of(dtype)
    backend = over(pool)
    generator = torch.Generator().manual_seed(2)
    known: dict[int, tuple[Tensor, Tensor]] = {slot: (torch.zeros(0, 2, 16), torch.zeros(0, 2, 16)) for slot in (0, 2)}
    for rows in ([(2, 0, 9), (0, 0, 5)], [(0, 5, 1), (2, 9, 14)]):
        num_tokens = sum(length for _, _, length in rows)
        q = torch.randn(num_tokens, SHAPE.num_heads, SHAPE.head_dim, generator=generator)
        k, v = torch.randn(2, num_tokens, SHAPE.num_kv_heads, SHAPE.head_dim, generator=generator)
        found = backend.plan(inputs_of(page_table, rows)).run(1, fused(q, k, v), None).view(q.shape)
        first = 0
        for slot, start, length in rows:
            row = slice(first, first + length)
            known[slot] = (torch.cat([known[slot][0], k[row]]), torch.cat([known[slot][1], v[row]]))
            expected = by_hand(q[row], *known[slot], start)
            torch.testing.assert_close(found[row].double(), expected, atol=atol, rtol=0)
            first += length
    assert not any(values.float().any() for values in (pool.keys[0], pool.values[0])), "another layer was written"


def test_an_8_bit_pool_saturates() -> None:
    pool, page_table = pool_of(torch.float8_e4m3fn)
    q, k = torch.zeros(1, SHAPE.num_heads, SHAPE.head_dim), torch.zeros(1, SHAPE.num_kv_heads, SHAPE.head_dim)
    found = over(pool).plan(inputs_of(page_table, [(1, 0, 1)])).run(0, fused(q, k, k + 1e6), None)
    assert torch.equal(found, torch.full_like(found, 448.0))
