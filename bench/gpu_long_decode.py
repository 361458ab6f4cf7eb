"""Decode attention of few rows over long contexts on one device: one step's launches alone, and among its layer's.

    python bench/gpu_long_decode.py [--seconds 85] [--only PART,...]

Parts: long (one row of 60,000 positions, Llama-3.1-8B's heads, alone and among a layer's other launches), merges
(of a step of prompts), rows (those of workload A, many long ones, batch-invariant ones, prompts beside other pools than
Hopper's kernel takes), shapes (few long rows).
Prints one JSON object: of each row its microseconds, the GB/s of the keys and values read, and the error
against softmax over gathered rows. Keys and values rotate among copies that exceed the cache many times; times are
medians of graph replays. What does not begin within --seconds is named under "left_out".
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_attention import Paged, workload_rows
from gpu_timing import BF16, DEVICE, FLOAT8, time_us

from headrace.kernels.paged_kv import AttentionShape
from headrace.kernels.triton.layer_kernels import FastKernels
from headrace.kernels.triton.paged_attention import PagedAttention
from headrace.kernels.triton.row_operations import rope_and_store
from headrace.kernels.triton.work_items import AttentionPlanner, LaunchBounds, WorkLimits

SPREAD_BYTES = 1.2e9
PAGE = 16
WIDTH = 4096
LONGEST = 131072


@dataclass
class Report:
    """Rows so far, and until when there may be more."""

    until: float
    rows: list[dict[str, object]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add(self, name: str, measure: Callable[[], dict[str, object]]) -> None:
        if time.monotonic() > self.until:
            self.left_out.append(name)
            return
        row = {"name": name, **measure()}
        self.rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)


def decode_case(rows: int, context: int, heads: int = 32, kv: int = 8, dim: int = 128, **options: object) -> Paged:
    width = 1 if options.get("pool_dtype") == FLOAT8 else 2
    copies = max(1, min(16, int(SPREAD_BYTES / (rows * context * kv * dim * 2 * width)) + 1))
    return Paged(np.full(rows, context), heads, kv, dim, copies=copies, **options)  # type: ignore[arg-type]


@dataclass
class Decode:
    """One step's attention over a case, as an engine plans and launches it."""

    case: Paged
    fixed: int | None = None

    def __post_init__(self) -> None:
        case, rows = self.case, len(self.case.lengths)
        limits, shape = WorkLimits(max(8, rows), 8192, 16384), AttentionShape(case.heads, case.kv, case.dim)
        self.attention = PagedAttention(
            shape, PAGE, limits, BF16, DEVICE, self.fixed, kv_dtype=case.pool_dtype, pdl=True
        )
        sizes = self.attention.tile_sizes
        planner = AttentionPlanner(limits, sizes, PAGE, case.kv, self.fixed, max_positions=LONGEST)
        self.bounds = planner.bounds(rows, rows, is_decode=True)
        buffer, ones = np.zeros(limits.size, np.int32), np.ones(rows, np.int64)
        self.summary = planner.fill(buffer, np.arange(rows), case.lengths - 1, ones, case.groups, self.bounds)
        self.metadata = torch.from_numpy(buffer).to(DEVICE)
        self.turn = count()

    def run(self, q: torch.Tensor | None = None, out: torch.Tensor | None = None) -> None:
        case = self.case
        keys, values = case.pools[next(self.turn) % case.copies]
        out = case.out if out is None else out
        self.attention.run(case.q if q is None else q, keys, values, case.table, self.metadata, out, self.bounds)

    def measure(self) -> dict[str, object]:
        self.case.out.fill_(float("nan"))
        self.turn = count()
        self.run()
        error = self.case.error()
        us = time_us(self.run, repeats=2 * self.case.copies)
        items = f"{self.summary.num_decode} of {self.bounds.decode} items, split {self.summary.split}"
        return {"us": round(us, 2), "gb_s": round(self.case.num_bytes / us / 1e3), "error": error, "items": items}


def stream() -> dict[str, object]:
    """What the memory gives to a plain sum."""
    flat = torch.randn(300_000_000, device=DEVICE)
    us = time_us(flat.sum, repeats=1)
    return {"us": round(us, 1), "gb_s": round(flat.nbytes / us / 1e3)}


def long(report: Report) -> None:
    report.add("torch reads 1.2 GB", stream)
    case, small = decode_case(1, 60000), Paged(np.full(1, 384), 32, 8, copies=6)
    report.add("1 x 60000", Decode(case).measure)
    for name, layer in (("60000", Layer(case)), ("384", Layer(small))):
        report.add(f"layer of 1 x {name}, without attention", lambda la=layer: la.measure(None))
        report.add(f"layer of 1 x {name}", lambda la=layer: la.measure(Decode(la.case)))


class Layer:
    """The launches around attention in a layer of Llama-3.1-8B's shape, one row."""

    def __init__(self, case: Paged) -> None:
        self.case = case
        heads, kv, dim = case.heads, case.kv, case.dim
        self.shape = AttentionShape(heads, kv, dim)
        self.kernels = FastKernels(DEVICE, pdl=True)
        self.qkv_weights = [self._normal((heads + 2 * kv) * dim, WIDTH) for _ in range(case.copies)]
        self.out_weights = [self._normal(WIDTH, heads * dim) for _ in range(case.copies)]
        self.norm, self.x = torch.ones(WIDTH, device=DEVICE, dtype=BF16), self._normal(1, WIDTH)
        self.cos, self.sin = (torch.ones(LONGEST, dim, device=DEVICE) for _ in range(2))
        self.position = torch.full((1,), int(case.lengths[0]) - 1, dtype=torch.int32, device=DEVICE)
        self.row = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        self.turn = count()

    def _normal(self, *size: int) -> torch.Tensor:
        return torch.randn(size, device=DEVICE, dtype=BF16) / 64

    def run(self, decode: Decode | None) -> None:
        case, place = self.case, next(self.turn) % self.case.copies
        qkv = self.kernels.normed_linear(self.x, self.norm, 1e-5, self.qkv_weights[place], None)
        q = qkv.view(1, -1, case.dim)[:, : case.heads]
        rope_and_store(
            qkv, None, None, 0.0, self.cos, self.sin, self.position, self.row, case.table, self.shape, PAGE, q,
            *case.pools[place], pdl=True,
        )  # fmt: skip
        out = q.new_empty(q.shape)
        if decode is not None:
            decode.run(q, out)
        self.kernels.linear_add_(self.x, out.view(1, -1), self.out_weights[place], None)

    def measure(self, decode: Decode | None) -> dict[str, object]:
        return {"us": round(time_us(lambda: self.run(decode), repeats=2 * self.case.copies), 2)}


def shapes(report: Report) -> None:
    for name, case in (
        ("8 x 60000", decode_case(8, 60000)),
        ("4 x 32000", decode_case(4, 32000)),
        ("1 x 8192", decode_case(1, 8192)),
        ("8 x 8192", decode_case(8, 8192)),
        ("8 x 900, 16q/8kv", Paged(np.full(8, 900), 16, 8, copies=32)),
        ("1 x 60000 fp8", decode_case(1, 60000, pool_dtype=FLOAT8)),
        ("1 x 60000, 32q/8kv of 64", decode_case(1, 60000, dim=64)),
        ("1 x 60000, 8q/8kv", decode_case(1, 60000, heads=8)),
        ("1 x 60000, 16q/2kv", decode_case(1, 60000, heads=16, kv=2)),
    ):
        report.add(name, Decode(case).measure)


def rows(report: Report) -> None:
    for name, case, fixed in (
        ("256 x 800, 16q/8kv", Paged(np.full(256, 800), 16, 8), None),
        ("512 x 900, 16q/8kv", Paged(np.full(512, 900), 16, 8), None),
        ("as in A after 600 steps", Paged(workload_rows(600), 16, 8, copies=3), None),
        ("as in A after 850 steps", Paged(workload_rows(850), 16, 8, copies=3), None),
        ("16 x 30000", decode_case(16, 30000), None),
        ("256 x 800, 16q/8kv, invariant", Paged(np.full(256, 800), 16, 8), 256),
        ("8 x 8192, invariant", decode_case(8, 8192), 256),
        ("1 x 60000, invariant", decode_case(1, 60000), 256),
    ):
        report.add(name, Decode(case, fixed).measure)
    for name, pool, fixed in (("fp8", FLOAT8, None), ("fp8, invariant", FLOAT8, 256), ("invariant", BF16, 256)):
        prompts = Paged(np.full(16, 1024), 32, 8, num_q=1024, pool_dtype=pool)
        report.add(f"prefill 16 x 1024, {name}", lambda c=prompts, f=fixed: prefill(c, f))


def merges(report: Report) -> None:
    """Of tokens that have no parts, as in a step of prompts."""
    limits = WorkLimits(8192, 24576, 1024)
    attention = PagedAttention(AttentionShape(32, 8, 128), PAGE, limits, BF16, DEVICE, pdl=True)
    metadata = torch.ones(limits.size, dtype=torch.int32, device=DEVICE)
    out = torch.empty(8192, 32, 128, dtype=BF16, device=DEVICE)
    for tokens in (512, 2048, 8192):
        bounds = LaunchBounds(0, 0, tokens)

        def call(bounds: LaunchBounds = bounds) -> None:
            attention.run(out, out.view(-1, 128), out.view(-1, 128), metadata[:8].view(1, 8), metadata, out, bounds)

        report.add(f"merge of {tokens} tokens without parts", lambda c=call: {"us": round(time_us(c), 2)})


def prefill(case: Paged, fixed: int | None) -> dict[str, object]:
    us, error, _ = case.measure(fixed=fixed)
    return {"us": round(us, 1), "error": error}


PARTS = {"long": long, "merges": merges, "rows": rows, "shapes": shapes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=85.0)
    parser.add_argument("--only", default=",".join(PARTS))
    options = parser.parse_args()
    torch.manual_seed(0)
    began = time.monotonic()
    report = Report(began + options.seconds)
    for part in options.only.split(","):
        PARTS[part](report)
        torch.cuda.empty_cache()
    took = round(time.monotonic() - began, 1)
    device = torch.cuda.get_device_name()
    print(json.dumps({"device": device, "seconds": took, "rows": report.rows, "left_out": report.left_out}))


if __name__ == "__main__":
    main()
