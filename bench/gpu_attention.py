"""Attention in `gpu_kernels.py`: decode and prefill, float8 pools, launches of fixed size, and the host's plan."""

from __future__ import annotations

import sys
import timeit
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_timing import BF16, DEVICE, FLOAT8, Table, num_copies, relative_error, time_us

from headrace.bench.workloads import make_workload
from headrace.kernels.paged_kv import AttentionShape
from headrace.kernels.triton.paged_attention import (
    AttentionTile,
    AttentionTiles,
    PagedAttention,
    choose_tiles,
)
from headrace.kernels.triton.work_items import AttentionPlanner, LaunchBounds, WorkLimits, WorkSummary
from tests.kernels.oracles import reference_attention


@dataclass
class Paged:
    """A pool, its page table and queries of `lengths` contexts; `shared` leading positions per group of 8."""

    lengths: np.ndarray
    heads: int
    kv: int
    dim: int = 128
    page: int = 16
    shared: int = 0
    num_q: int = 1
    copies: int = 1
    pool_dtype: torch.dtype = BF16

    def __post_init__(self) -> None:
        rows, columns = len(self.lengths), -(-int(self.lengths.max()) // self.page)
        pages = np.random.default_rng(0).permutation(rows * columns).reshape(rows, columns) + 1
        groups = []
        if self.shared:
            for first in range(0, rows, 8):
                pages[first : first + 8, : self.shared // self.page] = pages[first, : self.shared // self.page]
                groups.append((first, 8, self.shared // self.page))
        self.groups = np.array(groups, np.int32).reshape(-1, 3)
        self.table = torch.from_numpy(pages.astype(np.int32)).to(DEVICE)
        flat = ((rows * columns + 1) * self.kv * self.page, self.dim)
        self.pools = [
            [torch.randn(flat, device=DEVICE, dtype=BF16).to(self.pool_dtype) for _ in range(2)]
            for _ in range(self.copies)
        ]
        self.q = torch.randn(rows * self.num_q, self.heads, self.dim, device=DEVICE, dtype=BF16)
        self.out = torch.full_like(self.q, float("nan"))

    @property
    def num_bytes(self) -> float:
        tokens = int(self.lengths.sum()) - (len(self.lengths) - len(self.groups)) * self.shared * bool(self.shared)
        return tokens * self.kv * self.dim * 2 * self.pool_dtype.itemsize + 2 * self.q.numel() * 2

    @property
    def flops(self) -> float:
        seen = sum(self.num_q * (int(n) - self.num_q) + self.num_q * (self.num_q + 1) / 2 for n in self.lengths)
        return 4.0 * seen * self.heads * self.dim

    def build(
        self, fixed: int | None = None, bounds: LaunchBounds | None = None, **options: object
    ) -> tuple[PagedAttention, torch.Tensor, WorkSummary]:
        limits = WorkLimits(max(len(self.q), 8), 8192, 16384)
        shape = AttentionShape(self.heads, self.kv, self.dim)
        attention = PagedAttention(
            shape,
            self.page,
            limits,
            BF16,
            DEVICE,
            fixed_split=fixed,
            kv_dtype=self.pool_dtype,
            **options,  # type: ignore[arg-type]
        )
        planner = AttentionPlanner(limits, attention.tile_sizes, self.page, self.kv, fixed)
        buffer = np.zeros(limits.size, np.int32)
        rows = np.arange(len(self.lengths))
        steps = np.full(len(rows), self.num_q)
        summary = planner.fill(buffer, rows, self.lengths - self.num_q, steps, self.groups, bounds)
        return attention, torch.from_numpy(buffer).to(DEVICE), summary

    def measure(
        self, spare: int = 0, bounds: LaunchBounds | None = None, **options: object
    ) -> tuple[float, float, WorkSummary]:
        """Time, error of a few rows, and the plan.

        spare    programs per item beyond what is needed
        bounds   cut for these, and launch as many programs
        """
        attention, metadata, summary = self.build(bounds=bounds, **options)  # type: ignore[arg-type]
        num_merged = len(self.q) if summary.num_partials else 0
        launched = bounds or LaunchBounds(summary.num_decode * (1 + spare), summary.num_prefill, num_merged)
        turn = count()

        def call() -> None:
            keys, values = self.pools[next(turn) % self.copies]
            attention.run(self.q, keys, values, self.table, metadata, self.out, launched)

        call()
        error = self.error()
        return time_us(call), error, summary

    def error(self) -> float:
        """Of rows first, middle and last, after one call on the first pool."""
        worst = 0.0
        for row in {0, len(self.lengths) // 2, len(self.lengths) - 1}:
            mine = slice(row * self.num_q, (row + 1) * self.num_q)
            rows = [(row, int(self.lengths[row]) - self.num_q, self.num_q)]
            expected = reference_attention(self.q[mine], *self.pools[0], self.table, rows, self.kv, self.page)
            worst = max(worst, relative_error(self.out[mine], expected))
        return worst


def long_tail(rows: int) -> np.ndarray:
    return np.clip(np.random.default_rng(1).lognormal(np.log(800), 0.7, rows), 16, 8000).astype(np.int64)


def workload_rows(num_steps: int) -> np.ndarray:
    """Contexts of the rows of workload A that still run after so many steps."""
    workload = make_workload("A")
    pairs = zip(workload.prompts, workload.output_lengths, strict=True)
    return np.array([len(prompt) + num_steps for prompt, length in pairs if length > num_steps])


def attention(table: Table) -> None:
    cases = [
        ("decode 256 x 800, 16q/8kv", Paged(np.full(256, 800), 16, 8)),
        ("decode 512 x 900, 16q/8kv", Paged(np.full(512, 900), 16, 8)),
        ("decode 512 x 900, groups of 8 share 512, 16q/8kv", Paged(np.full(512, 900), 16, 8, shared=512)),
        ("decode 512 x 900, groups of 8 share 496, 16q/8kv", Paged(np.full(512, 900), 16, 8, shared=496)),
        ("decode 256 x 800, 32q/8kv", Paged(np.full(256, 800), 32, 8)),
        ("decode 512 x 900, groups of 8 share 512, 32q/8kv", Paged(np.full(512, 900), 32, 8, shared=512)),
        ("decode 512 long tail (mean 1000, max 8000), 16q/8kv", Paged(long_tail(512), 16, 8)),
        ("decode 1 x 384, 16q/8kv", Paged(np.full(1, 384), 16, 8, copies=32)),
        ("decode 1 x 32000, 32q/8kv", Paged(np.full(1, 32000), 32, 8, copies=2)),
        ("decode 64 x 900, 16q/8kv", Paged(np.full(64, 900), 16, 8)),
        ("decode 256 x 800, 14q/2kv x 64", Paged(np.full(256, 800), 14, 2, dim=64)),
    ]
    for num_steps in (150, 450, 600, 750, 850, 950):
        lengths = workload_rows(num_steps)
        copies = num_copies(float(lengths.sum()) * 8 * 128 * 4)
        name = f"decode as in A after {num_steps} steps, {len(lengths)} rows"
        cases.append((name, Paged(lengths, 16, 8, copies=copies)))
    for name, case in cases:
        us, error, summary = case.measure()
        table.add(name, us, case.num_bytes, case.flops, error, f"split {summary.split}, {summary.num_decode} items")
        if name.startswith(("decode 256 x 800, 16q", "decode 512 x 900, groups of 8 share 512, 16q")):
            us, error, _ = case.measure(spare=1)
            table.add(f"{name}; twice the programs", us, case.num_bytes, case.flops, error)
            for fixed in (256, 512):
                us, error, _ = case.measure(fixed=fixed)
                table.add(f"{name}; invariant, split {fixed}", us, case.num_bytes, case.flops, error)


def float8(table: Table) -> None:
    """Pools of one byte per element; the error is against the values that they hold."""
    cases = {
        "decode 256 x 800, 16q/8kv": Paged(np.full(256, 800), 16, 8, pool_dtype=FLOAT8),
        "decode 512 x 900, 16q/8kv": Paged(np.full(512, 900), 16, 8, pool_dtype=FLOAT8),
        "decode 512 x 900, 32q/8kv": Paged(np.full(512, 900), 32, 8, pool_dtype=FLOAT8),
        "decode 512 x 900, groups of 8 share 512, 16q/8kv": Paged(
            np.full(512, 900), 16, 8, shared=512, pool_dtype=FLOAT8
        ),
        "decode 1 x 384, 16q/8kv": Paged(np.full(1, 384), 16, 8, copies=32, pool_dtype=FLOAT8),
        "prefill 16 x 1024 causal, 32q/8kv": Paged(np.full(16, 1024), 32, 8, num_q=1024, pool_dtype=FLOAT8),
    }
    for name, case in cases.items():
        for fixed in (None, 256):
            us, error, summary = case.measure(fixed=fixed)
            note = f"split {summary.split}, {summary.num_decode} + {summary.num_prefill} items"
            label = f"float8 {name}{'; invariant' if fixed else ''}"
            table.add(label, us, case.num_bytes, case.flops, error, note)
    prefill = choose_tiles(2, 128, BF16, invariant=False, packed=True).prefill
    for block_n, warps, stages in ((32, 1, 4), (32, 2, 4), (64, 1, 3), (64, 2, 2), (64, 2, 4), (64, 4, 2), (128, 4, 3)):
        tiles = AttentionTiles(AttentionTile(16, block_n, warps, stages), prefill)
        for name in ("decode 256 x 800, 16q/8kv", "decode 512 x 900, 16q/8kv"):
            case = cases[name]
            us, error, _ = case.measure(tiles=tiles)
            label = f"float8 {name}; tile {block_n}, {warps} warps, {stages} stages"
            table.add(label, us, case.num_bytes, case.flops, error)


def bounds(table: Table) -> None:
    """What a launch of fixed size costs beside one made to measure; "mixed" is that of 512 rows and 2,048 tokens."""
    for num_rows, context in ((1, 384), (4, 900), (8, 900), (16, 900), (64, 900), (256, 800), (512, 900)):
        case = Paged(np.full(num_rows, context), 16, 8, copies=num_copies(num_rows * context * 4096))
        planner = AttentionPlanner(
            WorkLimits(4096, 8192, 16384), choose_tiles(2, 128, BF16, invariant=False).tokens(2), 16, 8
        )
        held = planner.bounds(num_rows, num_rows, is_decode=True)
        choices = {"to measure": None, "of its launch": held, "mixed": planner.bounds(512, 2048)}
        choices |= {f"{most}": LaunchBounds(most, 0, num_rows) for most in (33, 64, 128, 256) if num_rows < 64}
        for note, choice in choices.items():
            if choice is not None and choice.merged > num_rows:
                choice = LaunchBounds(choice.decode, choice.prefill, num_rows)
            us, error, summary = case.measure(bounds=choice)
            label = f"decode {num_rows} x {context}, 16q/8kv; bounds {note}"
            plan = f"split {summary.split}, {summary.num_decode} items of {choice.decode if choice else 'as many'}"
            table.add(label, us, case.num_bytes, case.flops, error, plan)


def planning(table: Table) -> None:
    """The host's part: cutting a step into items."""
    rng = np.random.default_rng(0)
    for num_rows, size in ((1, 0), (256, 0), (512, 0), (512, 8)):
        starts, ones = rng.integers(450, 1350, num_rows), np.ones(num_rows, np.int64)
        firsts = range(0, num_rows, size) if size else ()
        groups = np.array([(first, size, 25) for first in firsts], np.int32).reshape(-1, 3)
        limits = WorkLimits(8192, 8192, 16384)
        planner = AttentionPlanner(limits, choose_tiles(2, 128, BF16, invariant=False).tokens(2), 16, 8)
        held, buffer = planner.bounds(num_rows, num_rows, is_decode=True), np.zeros(limits.size, np.int32)
        arguments = buffer, np.arange(num_rows), starts, ones, groups, held
        best = min(timeit.repeat(lambda a=arguments, p=planner: p.fill(*a), number=20, repeat=20)) / 20
        table.add(f"plan of decode {num_rows} x 900, groups of {size}", best * 1e6, 0, 0, 0)


def prefill(table: Table) -> None:
    for name, case in [
        ("prefill 16 x 1024 causal, 32q/8kv", Paged(np.full(16, 1024), 32, 8, num_q=1024)),
        ("prefill 16 x 1024 causal, 16q/8kv", Paged(np.full(16, 1024), 16, 8, num_q=1024)),
        ("prefill 1 x 512 at 16384, 32q/8kv", Paged(np.full(1, 16384), 32, 8, num_q=512)),
    ]:
        for note, options in (("", {}), ("; invariant", {"fixed": 512})):
            us, error, _ = case.measure(**options)
            table.add(name + note, us, case.num_bytes, case.flops, error, f"{case.flops / us / 1e6:.0f} TFLOP/s")
