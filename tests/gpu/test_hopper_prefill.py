"""Prefill items on Hopper: against float64, whatever the shape, the pages and the cut; the same bits every time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.kernels.paged_kv import AttentionShape
from headrace.kernels.triton.hopper_prefill import choose_hopper_tile
from headrace.kernels.triton.paged_attention import PagedAttention
from headrace.kernels.triton.work_items import AttentionPlanner, LaunchBounds, WorkLimits, WorkSummary
from tests.kernels.oracles import ScaledShape, reference_attention

DEVICE = torch.device("cuda")
BF16, FP16 = torch.bfloat16, torch.float16
LIMITS = WorkLimits(max_tokens=4096, max_items=8192, max_partials=8192)
NO_GROUPS = np.zeros((0, 3), np.int32)
TOLERANCE = {BF16: 5e-3, FP16: 1e-3}
"""Of the norm: what rounding weights and outputs to the dtype leaves, twice over."""
Rows = list[tuple[int, int, int]]

is_hopper = torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(not is_hopper, reason="the kernel is for devices of compute capability 9.0")


@dataclass
class Case:
    """A pool of random pages, with what is in no context large but finite, and queries between other columns."""

    heads: int
    kv: int
    dim: int
    page: int
    rows: Rows
    dtype: torch.dtype = BF16
    pdl: bool = True
    scaled: bool = False

    def __post_init__(self) -> None:
        generator = torch.Generator(DEVICE).manual_seed(self.dim + self.page)
        self.shape = (ScaledShape if self.scaled else AttentionShape)(self.heads, self.kv, self.dim)
        columns = -(-max(start + length for _, start, length in self.rows) // self.page) + 9
        count = (max(row for row, *_ in self.rows) + 1) * columns
        table = torch.randperm(count, generator=generator, device=DEVICE).view(-1, columns) + 1
        sizes = (count + 1, self.kv, self.page, self.dim)
        pools = [torch.full(sizes, 3e4, device=DEVICE, dtype=self.dtype) for _ in range(2)]
        for pool in pools:
            pool[0] = 0.0
            for row, start, length in self.rows:
                held = torch.randn(start + length, self.kv, self.dim, generator=generator, device=DEVICE)
                position = torch.arange(start + length, device=DEVICE)
                pool[table[row, position // self.page], :, position % self.page] = held.to(self.dtype)
        self.keys, self.values = (pool.view(-1, self.dim) for pool in pools)
        self.table = table.int()
        self.num_tokens = sum(length for *_, length in self.rows)
        q = torch.randn(self.num_tokens, self.heads + 2, self.dim, generator=generator, device=DEVICE)
        self.q = q.to(self.dtype)[:, 1:-1]
        self.attention = PagedAttention(self.shape, self.page, LIMITS, self.dtype, DEVICE, pdl=self.pdl)
        self.planner = AttentionPlanner(LIMITS, self.attention.tile_sizes, self.page, self.kv)

    def plan(self, groups: np.ndarray = NO_GROUPS, bounds: LaunchBounds | None = None) -> tuple[Tensor, WorkSummary]:
        buffer = np.full(LIMITS.size, 7, np.int32)
        table_rows, starts, lengths = np.array(self.rows, np.int64).T
        summary = self.planner.fill(buffer, table_rows, starts, lengths, groups, bounds)
        return torch.from_numpy(buffer).to(DEVICE), summary

    def run(self, metadata: Tensor, bounds: LaunchBounds) -> Tensor:
        out = torch.full((self.num_tokens, self.heads, self.dim), float("nan"), device=DEVICE, dtype=self.dtype)
        self.attention.run(self.q, self.keys, self.values, self.table, metadata, out, bounds)
        return out

    def check(self, groups: np.ndarray = NO_GROUPS) -> WorkSummary:
        """Against the oracle, twice with the same bits."""
        metadata, summary = self.plan(groups)
        bounds = LaunchBounds(summary.num_decode, summary.num_prefill, self.num_tokens)
        found = self.run(metadata, bounds)
        assert torch.equal(self.run(metadata, replace(bounds, prefill=bounds.prefill + 300)), found), "idle programs"
        self.compare(found)
        return summary

    def compare(self, found: Tensor) -> None:
        """With the oracle, row by row."""
        expected = reference_attention(
            self.q, self.keys, self.values, self.table, self.rows, self.kv, self.page, self.shape.scale
        )
        first = 0
        for row in self.rows:
            mine = slice(first, first + row[2])
            error = float((found[mine].double() - expected[mine]).norm() / expected[mine].norm())
            assert error < TOLERANCE[self.dtype], (row, error)
            first += row[2]


@pytest.mark.parametrize(
    ("heads", "kv", "dim", "page", "dtype"),
    [
        (1, 1, 128, 16, BF16),
        (8, 8, 64, 32, BF16),
        (8, 4, 128, 64, FP16),
        (6, 2, 64, 16, BF16),
        (8, 2, 128, 32, BF16),
        (10, 2, 64, 64, FP16),
        (6, 1, 128, 16, BF16),
        (14, 2, 64, 16, BF16),
        (8, 1, 128, 16, FP16),
    ],
)
def test_random_steps(heads: int, kv: int, dim: int, page: int, dtype: torch.dtype) -> None:
    random = np.random.default_rng(heads * dim + page)
    for _ in range(4):
        rows: Rows = []
        for row in range(int(random.integers(1, 6))):
            length = int(random.choice([1, 2, 31, 64, 127, 128, 129, 300, 511, 700]))
            rows.append((row, int(random.choice([0, 1, 63, 64, 127, 128, 500, 1777])), length))
        case = Case(heads, kv, dim, page, rows, dtype)
        assert case.attention.tile_sizes.prefill == (128 if dim == 128 else 192) // (heads // kv)
        case.check()


@pytest.mark.parametrize("dim", [64, 128])
def test_long_chunks_are_cut_into_parts(dim: int) -> None:
    summary = Case(7, 1, dim, 16, [(0, 9001, 77), (1, 3000, 40), (2, 0, 5)]).check()
    assert summary.num_prefill > 20 and summary.num_partials > 0


def test_groups_beside_a_prompt() -> None:
    case = Case(8, 2, 128, 16, [(0, 400, 1), (1, 420, 1), (2, 444, 1), (3, 0, 333)])
    case.table[1:3, :20] = case.table[0, :20]
    case.check(np.array([[0, 3, 20]], np.int32))


def test_scores_are_scaled_as_the_shape_says() -> None:
    Case(4, 2, 64, 32, [(0, 30, 200), (1, 0, 50)], scaled=True).check()


def test_contexts_of_one_position_and_ends_of_every_kind() -> None:
    for start, length in ((0, 129), (1, 128), (15, 130), (127, 257), (128, 256), (255, 258)):
        Case(1, 1, 128, 16, [(0, start, length)]).check()


def test_a_captured_step_serves_others_of_its_size() -> None:
    case = Case(8, 2, 128, 16, [(row, 0, 1300) for row in range(3)])
    case.rows, case.num_tokens, case.q = [(0, 399, 901)], 901, case.q[:901]
    bounds = case.planner.bounds(4, case.num_tokens)
    metadata, _ = case.plan(bounds=bounds)
    case.run(metadata, bounds)  # builds the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.run(metadata, bounds)
    for rows in (case.rows, [(2, 3, 1), (0, 0, 897), (1, 700, 3)], [(1, 64, 700), (2, 1000, 201)]):
        case.rows = rows
        metadata.copy_(case.plan(bounds=bounds)[0])
        graph.replay()
        case.compare(out)


def test_what_it_cannot_run_is_left_to_the_other_kernel() -> None:
    can = AttentionShape(8, 2, 128)
    assert choose_hopper_tile(can, 16, BF16, DEVICE) is not None
    for shape, page, dtype in (
        (can, 8, BF16),
        (can, 16, torch.float32),
        (AttentionShape(8, 2, 96), 16, BF16),
        (AttentionShape(160, 1, 128), 16, BF16),
    ):
        assert choose_hopper_tile(shape, page, dtype, DEVICE) is None
    assert choose_hopper_tile(can, 16, BF16, torch.device("cpu")) is None
