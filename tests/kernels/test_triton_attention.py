"""Paged attention over work items: against softmax over gathered rows, and bit for bit under any cutting."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.kernels.paged_kv import AttentionShape
from headrace.kernels.triton import paged_attention
from headrace.kernels.triton.paged_attention import AttentionTile, AttentionTiles, PagedAttention
from headrace.kernels.triton.work_items import AttentionPlanner, LaunchBounds, WorkLimits
from tests.kernels.oracles import ScaledShape, reference_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter's dot has no bfloat16
FLOAT8 = torch.float8_e4m3fn
LIMITS = WorkLimits(max_tokens=64, max_items=256, max_partials=512)
NO_GROUPS = np.zeros((0, 3), np.int32)
SMALL = AttentionTiles(AttentionTile(16, 16, 4, 2, ahead=True), AttentionTile(32, 16, 4, 2))
ONE = AttentionTiles(AttentionTile(16, 16, 4, 2), AttentionTile(16, 16, 4, 2))


class Case:
    """Random keys, values and a page table of `num_rows` rows; `shared` leading pages are row 0's in every row."""

    def __init__(
        self, heads: int, kv: int, dim: int, page: int, dtype: torch.dtype, num_rows: int, longest: int,
        shared: int = 0, pool_dtype: torch.dtype | None = None, shape: type[AttentionShape] = AttentionShape,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(dim * page)
        columns = -(-longest // page)
        pages = torch.randperm(num_rows * columns, generator=generator).view(num_rows, columns) + 1
        pages[:, :shared] = pages[0, :shared]
        self.shape, self.page, self.dtype = shape(heads, kv, dim), page, dtype
        rows = (num_rows * columns + 1) * kv * page
        pools = [torch.randn(rows, dim, generator=generator) for _ in range(2)]
        for pool in pools:
            pool[: kv * page] = 0.0
        self.keys, self.values = (pool.to(pool_dtype or dtype) for pool in pools)
        self.table = pages.int()
        self.q = torch.randn(64, heads, dim, generator=generator).to(dtype)

    def run(
        self, rows: list[tuple[int, int, int]], groups: list[tuple[int, int, int]], q: Tensor, fixed: int | None,
        tiles: AttentionTiles, bounds: LaunchBounds | None = None,
    ) -> Tensor:  # fmt: skip
        attention = PagedAttention(
            self.shape, self.page, LIMITS, self.dtype, DEVICE, fixed_split=fixed, tiles=tiles, kv_dtype=self.keys.dtype
        )
        planner = AttentionPlanner(LIMITS, attention.tile_sizes, self.page, self.shape.num_kv_heads, fixed)
        buffer = np.full(LIMITS.size, 77, np.int32)
        group_array = np.array(groups, np.int32) if groups else NO_GROUPS
        table_rows, starts, lengths = np.array(rows, np.int64).T
        summary = planner.fill(buffer, table_rows, starts, lengths, group_array, bounds)
        out = torch.full(q.shape, float("nan"), dtype=self.dtype, device=DEVICE)
        attention.run(
            q.to(DEVICE), self.keys.to(DEVICE), self.values.to(DEVICE), self.table.to(DEVICE),
            torch.from_numpy(buffer).to(DEVICE), out,
            LaunchBounds(summary.num_decode + 1 if summary.num_decode else 0, summary.num_prefill, len(q)),
        )  # fmt: skip
        return out.cpu()

    def check(self, rows: list[tuple[int, int, int]], groups: list[tuple[int, int, int]], tolerance: float) -> None:
        num_tokens = sum(length for *_, length in rows)
        q = self.q[:num_tokens]
        kv, scale = self.shape.num_kv_heads, self.shape.scale
        expected = reference_attention(q, self.keys, self.values, self.table, rows, kv, self.page, scale)
        for fixed, tiles in ((None, SMALL), (64, ONE)):
            found = self.run(rows, groups, q, fixed, tiles).double()
            error = float((found - expected).norm() / expected.norm())
            assert error < tolerance, (fixed, error)


@pytest.mark.parametrize(
    ("heads", "kv", "dim", "page", "dtype", "pool_dtype"),
    [
        (4, 2, 64, 16, HALF, HALF),
        (2, 2, 80, 8, HALF, HALF),
        (6, 2, 96, 1, HALF, HALF),
        (8, 1, 128, 64, HALF, HALF),
        (7, 1, 64, 16, torch.float32, torch.float32),
        (2, 2, 80, 8, HALF, FLOAT8),
        (7, 1, 64, 16, torch.float32, FLOAT8),
        (2, 1, 64, 16, torch.bfloat16, FLOAT8),
    ],
)
def test_mixed_steps_against_the_oracle(
    heads: int, kv: int, dim: int, page: int, dtype: torch.dtype, pool_dtype: torch.dtype
) -> None:
    case = Case(heads, kv, dim, page, dtype, num_rows=5, longest=200, pool_dtype=pool_dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    case.check([(0, 0, 1), (1, 130, 1), (2, 63, 1), (3, 199, 1), (4, 64, 1)], [], tolerance)
    case.check([(3, 70, 1), (0, 0, 11), (1, 65, 5), (2, 100, 2)], [], tolerance)


@pytest.mark.parametrize("pool_dtype", [torch.float32, FLOAT8])
def test_scores_are_scaled_as_the_shape_says(pool_dtype: torch.dtype) -> None:
    """Decode rows, chunks and groups that share pages; whole, cut and merged contexts."""
    case = Case(2, 1, 64, 16, torch.float32, 5, longest=200, shared=4, pool_dtype=pool_dtype, shape=ScaledShape)
    case.check([(0, 70, 1), (1, 80, 1), (2, 63, 1), (3, 199, 1), (4, 1, 1)], [(0, 2, 4)], 1e-5)
    case.check([(3, 70, 1), (0, 0, 11), (1, 65, 40)], [], 1e-5)


@pytest.mark.parametrize("page", [8, 64])
def test_pages_looked_up_ahead_move_no_bit(page: int) -> None:
    case = Case(2, 1, 64, page, HALF, num_rows=4, longest=200)
    rows = [(0, 199, 1), (1, 14, 1), (2, 130, 3), (3, 0, 1)]
    at_once = replace(SMALL, decode=replace(SMALL.decode, ahead=False))
    found, expected = (case.run(rows, [], case.q[:6], None, tiles) for tiles in (SMALL, at_once))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("fixed", [None, 64])
def test_programs_that_merge_several_tokens_move_no_bit(fixed: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens than programs, of which some have parts: decode rows, and those that share a group's."""
    case = Case(2, 1, 64, 16, HALF, num_rows=20, longest=300, shared=8)
    rows = [(row, 299 if row % 3 else 40, 1) for row in range(19)] + [(19, 200, 21)]
    groups = [(1, 2, 8), (4, 2, 8)]
    expected = case.run(rows, groups, case.q[:40], fixed, ONE)
    monkeypatch.setattr(paged_attention, "MOST_MERGED_APART", 24)
    monkeypatch.setattr(paged_attention, "MERGING_PROGRAMS", 7)
    assert torch.equal(case.run(rows, groups, case.q[:40], fixed, ONE), expected)


@pytest.mark.parametrize("pool_dtype", [HALF, FLOAT8])
def test_groups_read_shared_pages_once_and_agree(pool_dtype: torch.dtype) -> None:
    case = Case(2, 1, 64, 16, HALF, num_rows=6, longest=200, shared=8, pool_dtype=pool_dtype)
    case.check([(row, 128 + 12 * row, 1) for row in range(6)], [(0, 6, 8)], 2e-2)
    case.check([(0, 140, 1), *[(row, 150, 1) for row in range(1, 6)]], [(1, 3, 7), (4, 2, 8)], 2e-2)


@pytest.mark.usefixtures("dot_by_rows")
@pytest.mark.parametrize("pool_dtype", [HALF, FLOAT8])
def test_fixed_split_bits_depend_on_the_token_alone(pool_dtype: torch.dtype) -> None:
    case = Case(2, 1, 64, 16, HALF, num_rows=4, longest=200, shared=8, pool_dtype=pool_dtype)
    rows = [(row, 128 + 12 * row, 1) for row in range(4)]
    expected = case.run(rows, [], case.q[:4], 64, ONE)
    assert torch.equal(case.run(rows, [(0, 4, 8)], case.q[:4], 64, ONE), expected)
    assert torch.equal(case.run(rows, [(1, 2, 8)], case.q[:4], 64, ONE), expected)
    assert torch.equal(case.run(rows, [], case.q[:4], 64, ONE, LaunchBounds(5, 0, 4)), expected), "uncut rows"
    assert torch.equal(case.run(rows[3:], [], case.q[3:4], 64, ONE)[0], expected[3])
    tokens = case.run([(2, 120, 12)], [], case.q[:12], 64, ONE)
    alone = [case.run([(2, 120 + at, 1)], [], case.q[at : at + 1], 64, ONE) for at in (0, 11)]
    assert torch.equal(tokens[[0, 11]], torch.cat(alone)), "a prompt's tokens as single steps"


def test_tokens_of_no_item_are_left_alone() -> None:
    case = Case(4, 2, 64, 16, torch.float32, num_rows=2, longest=64)
    found = case.run([(0, 40, 1), (1, 50, 1)], [], case.q[:4], None, SMALL)
    assert found[:2].isfinite().all() and found[2:].isnan().all()


def test_queries_too_large_for_the_products_beside_float8_stay_finite() -> None:
    case = Case(2, 1, 64, 16, torch.bfloat16, num_rows=1, longest=64, pool_dtype=FLOAT8)
    found = case.run([(0, 40, 1)], [], case.q[:1] * 1e30, None, SMALL)
    assert found.isfinite().all()


def test_pools_of_another_dtype_than_said_are_refused() -> None:
    shape = AttentionShape(2, 1, 64)
    attention = PagedAttention(shape, 16, LIMITS, torch.float32, DEVICE, kv_dtype=FLOAT8)
    pool, integers = torch.zeros(32, 64), torch.zeros(1, LIMITS.size, dtype=torch.int32)
    q = torch.zeros(1, 2, 64)
    with pytest.raises(ValueError, match="keys of torch.float8_e4m3fn, not torch.float32"):
        attention.run(q, pool, pool, integers, integers, q, LaunchBounds(1, 0, 1))
