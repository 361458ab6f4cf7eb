"""The batched backend equals the oracle on random plans; what each backend can do is data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.attention import (
    AttentionBackend,
    AttentionInputs,
    AttentionShape,
    Heads,
    build_backend,
    refusals,
)
from headrace.attention import cpu as cpu_backend
from headrace.attention.base import HeadNorms, Int64Array
from headrace.attention.cpu import CausalMask, split_tokens
from headrace.config import RopeSpec
from headrace.kernels import select_kernels
from headrace.kernels.paged_kv import KvGeometry, KvPool
from headrace.kernels.rope_tables import rope_tables
from headrace.types.errors import ConfigError
from tests.kernels.oracles import ScaledShape

SHAPES = {
    "gqa": AttentionShape(6, 2, 16),
    "mha": AttentionShape(4, 4, 10),
    "mqa": AttentionShape(8, 1, 32),
}
NUM_SLOTS, CONTEXT = 12, 400


class Table:
    """Sequences of a few slots that grow by random rows, the pages of each leased at random."""

    def __init__(self, page_size: int, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.page_size = page_size
        self.num_columns = -(-CONTEXT // page_size)
        self.num_pages = NUM_SLOTS * self.num_columns + 1
        pages = self.random.permutation(np.arange(1, self.num_pages)).astype(np.int32)
        self.page_table = torch.from_numpy(pages.reshape(NUM_SLOTS, self.num_columns))
        self.lengths = np.zeros(NUM_SLOTS, np.int64)

    def rows(self, choices: tuple[int, ...]) -> AttentionInputs:
        slots = self.random.permutation(NUM_SLOTS)[: self.random.integers(1, NUM_SLOTS + 1)].astype(np.int64)
        lengths = np.minimum(self.random.choice(choices, len(slots)), CONTEXT - self.lengths[slots])
        slots, lengths = slots[lengths > 0], lengths[lengths > 0]
        starts = self.lengths[slots].copy()
        self.lengths[slots] += lengths
        firsts = np.cumsum(lengths) - lengths
        positions = np.arange(lengths.sum()) + np.repeat(starts - firsts, lengths)
        return inputs_of(self.page_table, slots, starts, lengths, positions, np.repeat(slots, lengths))


def inputs_of(
    page_table: Tensor,
    slots: Int64Array,
    starts: Int64Array,
    lengths: Int64Array,
    positions: Int64Array,
    token_slots: Int64Array,
) -> AttentionInputs:
    """Heads are rotated by the positions of their pages."""
    return AttentionInputs(page_table, slots, starts, lengths, positions, token_slots, torch.from_numpy(positions))


def backend(
    name: str, shape: AttentionShape, table: Table, numerics: str = "fast", dtype: torch.dtype = torch.float32
) -> AttentionBackend:
    geometry = KvGeometry(2, table.num_pages, shape.num_kv_heads, table.page_size, shape.head_dim)
    return over(name, shape, KvPool(geometry, dtype), numerics)


def over(name: str, shape: AttentionShape, pool: KvPool, numerics: str = "fast") -> AttentionBackend:
    """Both backends take the oracle's row operations, so that only what attends differs."""
    rotary = rope_tables(RopeSpec(), shape.head_dim, CONTEXT, pool.dtype)
    return build_backend(name, numerics, Heads(shape, select_kernels("reference"), rotary), pool)


def projection(inputs: AttentionInputs, shape: AttentionShape, dtype: torch.dtype, seed: int) -> Tensor:
    """Of the step's tokens, as layers pass it."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens, num_heads = len(inputs.token_slots), shape.num_heads + 2 * shape.num_kv_heads
    return torch.randn(num_tokens, num_heads * shape.head_dim, generator=generator).to(dtype)


def norms(shape: AttentionShape, dtype: torch.dtype) -> HeadNorms:
    weights = torch.rand(2, shape.head_dim, generator=torch.Generator().manual_seed(0)).to(dtype) + 0.5
    return HeadNorms(weights[0], weights[1], 1e-6)


@pytest.mark.parametrize("numerics", ["fast", "invariant"])
@pytest.mark.parametrize("page_size", [1, 16, 24, 64])
@pytest.mark.parametrize("heads", SHAPES)
def test_cpu_equals_reference_on_random_plans(heads: str, page_size: int, numerics: str) -> None:
    shape, table = SHAPES[heads], Table(page_size, seed=page_size)
    fast, oracle = backend("cpu", shape, table, numerics), backend("reference", shape, table)
    for step in range(9):
        inputs = table.rows((1, 1, 1, 2, 16, 17, 40, 90) if step < 6 else (1,))
        qkv = projection(inputs, shape, torch.float32, step)
        layer, weights = step % 2, norms(shape, torch.float32) if step % 4 > 1 else None
        found, expected = fast.plan(inputs).run(layer, qkv, weights), oracle.plan(inputs).run(layer, qkv, weights)
        # Both layers must hold the whole context: the other one stores the same keys and values.
        fast.plan(inputs).run(1 - layer, qkv, weights), oracle.plan(inputs).run(1 - layer, qkv, weights)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numerics", ["fast", "invariant"])
def test_narrow_pools(dtype: torch.dtype, numerics: str) -> None:
    shape, table = SHAPES["gqa"], Table(16, seed=3)
    fast, oracle = backend("cpu", shape, table, numerics, dtype), backend("reference", shape, table, dtype=dtype)
    for step in range(6):
        inputs = table.rows((1, 3, 20, 40))
        qkv = projection(inputs, shape, dtype, step)
        found, expected = fast.plan(inputs).run(0, qkv, None), oracle.plan(inputs).run(0, qkv, None)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected.float(), atol=2e-2, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("page_size", [1, 2, 4])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_a_short_context_in_a_few_rows_of_a_pool(num_kv_heads: int, page_size: int, dtype: torch.dtype) -> None:
    """Contexts are padded to 16 positions, which may be more than the pages that they are in have rows."""
    shape = AttentionShape(4, num_kv_heads, 16)
    num_pages = -(-18 // page_size) + 1
    geometry = KvGeometry(1, num_pages, num_kv_heads, page_size, 16)
    table = torch.arange(1, num_pages, dtype=torch.int32)[None]
    pools = [over(name, shape, KvPool(geometry, dtype)) for name in ("cpu", "reference")]
    zero = np.zeros(1, np.int64)
    for position in range(18):
        inputs = inputs_of(table, zero, zero + position, zero + 1, zero + position, zero)
        qkv = projection(inputs, shape, dtype, position)
        found, expected = (pool.plan(inputs).run(0, qkv, None) for pool in pools)
        tolerance = 2e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found.float(), expected.float(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("numerics", ["fast", "invariant"])
def test_scores_are_scaled_as_the_shape_says(numerics: str) -> None:
    """Prompts short and long, chunks that go on, decode rows: none takes the factor from the size of heads."""
    shape, table = ScaledShape(6, 2, 16), Table(16, seed=6)
    fast, oracle = backend("cpu", shape, table, numerics), backend("reference", shape, table)
    for step, lengths in enumerate([(3,), (90,), (3, 90, 130), (90,), (1,)]):
        inputs = table.rows(lengths)
        qkv = projection(inputs, shape, torch.float32, step)
        found, expected = fast.plan(inputs).run(0, qkv, None), oracle.plan(inputs).run(0, qkv, None)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_where_keys_are_kept_is_apart_from_what_heads_are_rotated_by() -> None:
    """Scores depend on differences of rotations: all moved by the same, nothing else changes."""
    shape, table = SHAPES["gqa"], Table(16, seed=5)
    moved, oracle = backend("cpu", shape, table), backend("reference", shape, table)
    for step in range(3):
        inputs = table.rows((1, 20, 40))
        qkv = projection(inputs, shape, torch.float32, step)
        found = moved.plan(replace(inputs, rope_positions=inputs.rope_positions + 100)).run(0, qkv, None)
        torch.testing.assert_close(found, oracle.plan(inputs).run(0, qkv, None), atol=5e-5, rtol=0)


def test_long_rows_are_cut_into_blocks_that_share_one_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_backend, "_BLOCK_QUERIES", 32)
    shape, table = SHAPES["gqa"], Table(16, seed=4)
    fast, oracle = backend("cpu", shape, table), backend("reference", shape, table)
    for step in range(3):
        inputs = table.rows((50, 90, 130))
        qkv = projection(inputs, shape, torch.float32, step)
        found, expected = fast.plan(inputs).run(0, qkv, None), oracle.plan(inputs).run(0, qkv, None)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_the_causal_mask_is_the_end_of_a_band() -> None:
    mask = CausalMask()
    mask.reserve(1000)
    for num_queries, num_positions in ((1, 1), (3, 3), (256, 256), (5, 700), (256, 1000)):
        seen = torch.arange(num_positions) <= torch.arange(num_queries)[:, None] + num_positions - num_queries
        assert torch.equal(mask.view(num_queries, num_positions) == 0, seen)


def test_pieces_hold_every_token_once_and_are_bounded() -> None:
    random = np.random.default_rng(0)
    positions = random.integers(0, 8000, 700)
    tokens = np.flatnonzero(random.random(700) < 0.8)
    pieces = split_tokens(tokens, positions, num_heads=16)
    assert sorted(np.concatenate(pieces).tolist()) == tokens.tolist()
    assert all(len(piece) * 16 * (positions[piece].max() + 16) <= 1 << 22 for piece in pieces if len(piece) > 1)
    needed = (positions[tokens] + 1).sum()
    computed = sum(len(piece) * (positions[piece].max() + 16) for piece in pieces)
    assert computed < 1.1 * needed


@pytest.mark.parametrize("num_rows", [2, 40, 160])
def test_a_steady_decode_of_similar_lengths_is_one_piece(num_rows: int) -> None:
    positions = 100 + np.arange(num_rows) % 8
    assert len(split_tokens(np.arange(num_rows), positions, num_heads=8)) == 1


def test_capabilities_name_why_a_backend_is_refused() -> None:
    on_cpu = refusals(device="cpu", dtype="float32", numerics="fast", page_size=16, head_dim=64)
    assert not {"reference", "cpu"} & set(on_cpu)
    assert "reference" in refusals(device="cpu", dtype="float32", numerics="invariant", page_size=16, head_dim=64)
    on_cuda = refusals(device="cuda", dtype="float32", numerics="fast", page_size=16, head_dim=64)
    assert "cuda" in on_cuda["cpu"] and "triton" not in on_cuda
    assert "65" in refusals(device="cpu", dtype="float32", numerics="fast", page_size=65, head_dim=64)["cpu"]
    assert "int8" in refusals(device="cpu", dtype="int8", numerics="fast", page_size=16, head_dim=64)["cpu"]


def test_building_what_cannot_run_is_a_config_error() -> None:
    table = Table(16, seed=0)
    with pytest.raises(ConfigError, match="invariant"):
        backend("reference", SHAPES["gqa"], table, "invariant")
    with pytest.raises(ConfigError, match="flash"):
        backend("flash", SHAPES["gqa"], table)
