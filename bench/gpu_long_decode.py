"""Decode attention of few rows over long contexts on one device: one step's launches alone, and among its layer's.

    python bench/gpu_long_decode.py [--seconds 85] [--only PART,...]

Parts: long (one row of 60,000 positions, Llama-3.1-8B's heads), merge, layer (the same among a layer's other launches,
in turns with that layer without attention), shapes, short (decode rows of workloads A and B, and few of them).
Prints one JSON object: of each row its microseconds, the GB/s of the keys and values read, and the error
against softmax over gathered rows. Keys and values rotate among copies that exceed the cache many times; times are
medians of graph replays. What does not begin within --seconds is named under "left_out".
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_attention import Paged, workload_rows
from gpu_timing import BF16, DEVICE, FLOAT8, time_us

from headrace.kernels.paged_kv import AttentionShape
from headrace.kernels.triton.layer_kernels import FastKernels
from headrace.kernels.triton.paged_attention import AttentionTile, AttentionTiles, PagedAttention, choose_tiles
from headrace.kernels.triton.row_operations import rope_and_store
from headrace.kernels.triton.work_items import AttentionPlanner, LaunchBounds, WorkLimits

SPREAD_BYTES = 1.2e9
PAGE = 16
WIDTH = 4096
LONGEST = 131072


COMPILING = os.environ.get("LONG_DECODE_COMPILES")
"""Set in processes that only compile, so that the compiled kernels are in Triton's folder: "share of shares"."""


def timed(call: Callable[[], object], repeats: int = 8) -> float:
    """As `time_us`; of a process that only compiles 1.0 after one call."""
    if COMPILING is None:
        return time_us(call, repeats)
    call()
    return 1.0


@dataclass
class Report:
    """Rows so far, and until when there may be more."""

    until: float
    seen: int = 0
    rows: list[dict[str, object]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add(self, name: str, measure: Callable[[], dict[str, object]]) -> None:
        if time.monotonic() > self.until:
            self.left_out.append(name)
            return
        self.seen += 1
        if COMPILING is not None and self.seen % 12 != int(COMPILING):
            return
        try:
            row = {"name": name, **measure()}
        except Exception as error:  # one variant that the device refuses must not cost the others
            row = {"name": name, "failed": f"{type(error).__name__}: {error}"[:200]}
        self.rows.append(row)
        if COMPILING is None:
            print(json.dumps(row), file=sys.stderr, flush=True)


def decode_case(rows: int, context: int, heads: int = 32, kv: int = 8, dim: int = 128, **options: object) -> Paged:
    width = 1 if options.get("pool_dtype") == FLOAT8 else 2
    spread = SPREAD_BYTES if COMPILING is None else 0
    copies = max(1, min(16, int(spread / (rows * context * kv * dim * 2 * width)) + 1))
    return Paged(np.full(rows, context), heads, kv, dim, copies=copies, **options)  # type: ignore[arg-type]


@dataclass
class Decode:
    """One step's attention over a case. `items`: what its launch holds; None: as many as an engine's."""

    case: Paged
    tile: AttentionTile | None = None
    items: int | None = None
    fixed: int | None = None

    def __post_init__(self) -> None:
        case, rows = self.case, len(self.case.lengths)
        limits, shape = WorkLimits(max(8, rows), 8192, 16384), AttentionShape(case.heads, case.kv, case.dim)
        tiles = None
        if self.tile is not None:
            packed, group = case.pool_dtype == FLOAT8, case.heads // case.kv
            chosen = choose_tiles(group, case.dim, BF16, invariant=self.fixed is not None, packed=packed)
            tiles = AttentionTiles(replace(self.tile, block_m=chosen.decode.block_m), chosen.prefill)
        self.attention = PagedAttention(
            shape, PAGE, limits, BF16, DEVICE, self.fixed, tiles, kv_dtype=case.pool_dtype, pdl=True
        )
        sizes = self.attention.tile_sizes
        planner = AttentionPlanner(limits, sizes, PAGE, case.kv, self.fixed, max_positions=LONGEST)
        self.bounds = planner.bounds(rows, rows, is_decode=True)
        if self.items is not None:
            self.bounds = LaunchBounds(self.items, 0, rows)
        buffer = np.zeros(limits.size, np.int32)
        ones = np.ones(rows, np.int64)
        self.summary = planner.fill(buffer, np.arange(rows), case.lengths - 1, ones, case.groups, self.bounds)
        self.metadata = torch.from_numpy(buffer).to(DEVICE)
        self.turn = count()

    def run(self, q: torch.Tensor | None = None, out: torch.Tensor | None = None) -> None:
        case = self.case
        keys, values = case.pools[next(self.turn) % case.copies]
        out = case.out if out is None else out
        self.attention.run(case.q if q is None else q, keys, values, case.table, self.metadata, out, self.bounds)

    def without_merge(self) -> None:
        bounds, self.bounds = self.bounds, replace(self.bounds, merged=0)
        self.run()
        self.bounds = bounds

    def measure(self) -> dict[str, object]:
        self.case.out.fill_(float("nan"))
        self.turn = count()
        self.run()
        error = self.case.error() if COMPILING is None else 0.0
        us = timed(self.run, repeats=2 * self.case.copies)
        items = f"{self.summary.num_decode} of {self.bounds.decode} items, split {self.summary.split}"
        return {"us": round(us, 2), "gb_s": round(self.case.num_bytes / us / 1e3), "error": error, "items": items}


def stream() -> dict[str, object]:
    """What the memory gives to a plain sum."""
    flat = torch.randn(300_000_000, device=DEVICE)
    us = timed(flat.sum, repeats=1)
    return {"us": round(us, 1), "gb_s": round(flat.nbytes / us / 1e3)}


def long(report: Report) -> None:
    report.add("torch reads 1.2 GB", stream)
    case = decode_case(1, 60000)
    for name, tile, items in long_variants():
        decode = Decode(case, tile, items)
        report.add(f"1 x 60000: {name}", decode.measure)
        if name.endswith("*"):
            report.add(
                f"1 x 60000: {name}, no merge",
                lambda d=decode: {"us": round(timed(d.without_merge, repeats=2 * case.copies), 2)},
            )


def long_variants() -> Iterator[tuple[str, AttentionTile, int | None]]:
    """(name, tile, items)."""
    yield "main*", AttentionTile(16, 64, 4, 2, ahead=False), None
    yield "64 x 4 warps x 4*", AttentionTile(16, 64, 4, 4), None
    yield "64 x 4 warps x 4, ask 8*", AttentionTile(16, 64, 4, 4, ask=8), None
    yield "64 x 4 warps x 4, ask 16", AttentionTile(16, 64, 4, 4, ask=16), None
    yield "64 x 4 warps x 4, ask 32", AttentionTile(16, 64, 4, 4, ask=32), None
    yield "64 x 4 warps x 3", AttentionTile(16, 64, 4, 3), None
    yield "64 x 4 warps x 3, 49 items", AttentionTile(16, 64, 4, 3), 49
    yield "32 x 4 warps x 6", AttentionTile(16, 32, 4, 6), None
    yield "64 x 2 warps x 4", AttentionTile(16, 64, 2, 4), None
    yield "32 x 1 warp x 4, 66 items", AttentionTile(16, 32, 1, 4), 66
    yield "32 x 1 warp x 7, 33 items", AttentionTile(16, 32, 1, 7), 33
    yield "32 x 1 warp x 3, 99 items", AttentionTile(16, 32, 1, 3), 99
    yield "main's 32 x 1 warp x 4, 132 items", AttentionTile(16, 32, 1, 4, ahead=False), 132
    yield "32 x 2 warps x 4, 66 items", AttentionTile(16, 32, 2, 4), 66
    yield "128 x 8 warps x 3, 16 items", AttentionTile(16, 128, 8, 3), 16
    yield "128 x 4 warps x 3, 16 items", AttentionTile(16, 128, 4, 3), 16
    yield "64 x 4 warps x 7, 16 items", AttentionTile(16, 64, 4, 7), 16


def merge(report: Report) -> None:
    case = Paged(np.full(1, 60000), 32, 8)
    for fixed, choices in ((None, ((16, 1, 4), (64, 1, 4), (64, 1, 8))), (256, ((16, 1, 4), (16, 4, 4), (16, 8, 4)))):
        decode = Decode(case, fixed=fixed)
        decode.run()
        for parts, stages, warps in choices:
            attention = decode.attention
            attention.merge_parts, attention.merge_stages, attention.merge_warps = parts, stages, warps

            def call(d: Decode = decode) -> None:
                d.attention._merge(1, d.metadata, d.case.out)

            def measure(call: Callable[[], None] = call) -> dict[str, object]:
                us = timed(call)
                return {"us": round(us, 2), "error": case.error()}

            name = f"merge of {decode.summary.num_decode} parts, fixed {fixed}: {parts} at once, {stages} stages"
            report.add(f"{name}, {warps} warps", measure)


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


def layer(report: Report) -> None:
    cases = {"60000": decode_case(1, 60000), "384": Paged(np.full(1, 384), 32, 8, copies=6)}
    for context, case in cases.items():
        layer = Layer(case)

        def measure(decode: Decode | None, layer: Layer = layer) -> dict[str, object]:
            return {"us": round(timed(lambda: layer.run(decode), repeats=2 * layer.case.copies), 2)}

        report.add(f"layer of {context}: without attention", lambda m=measure: m(None))
        for name, tile in (
            ("main", AttentionTile(16, 64, 4, 2, ahead=False)),
            ("64 x 4 x 4", AttentionTile(16, 64, 4, 4)),
            ("64 x 4 x 4, ask 8", AttentionTile(16, 64, 4, 4, ask=8)),
            ("64 x 4 x 4, ask 16", AttentionTile(16, 64, 4, 4, ask=16)),
            ("64 x 4 x 4, ask 8, merge 64", AttentionTile(16, 64, 4, 4, ask=8)),
        ):
            decode = Decode(case, tile)
            if "merge" in name:
                decode.attention.merge_parts = 64
            report.add(f"layer of {context}: {name}", lambda m=measure, d=decode: m(d))


def shapes(report: Report) -> None:
    main, ahead = AttentionTile(16, 64, 4, 2, ahead=False), AttentionTile(16, 64, 4, 4)
    wide = replace(ahead, block_n=128)
    single, single_ahead = AttentionTile(16, 32, 1, 4, ahead=False), AttentionTile(16, 32, 1, 3)
    for name, case, tiles in (
        ("8 x 60000", decode_case(8, 60000), (main, ahead)),
        ("4 x 32000", decode_case(4, 32000), (main, ahead)),
        ("1 x 8192", decode_case(1, 8192), (main, ahead)),
        ("8 x 8192", decode_case(8, 8192), (main, ahead)),
        ("1 x 60000 fp8", decode_case(1, 60000, pool_dtype=FLOAT8), (main, ahead, wide)),
        ("1 x 60000, 32q/8kv of 64", decode_case(1, 60000, dim=64), (main, ahead, wide)),
        ("1 x 60000, 8q/8kv", decode_case(1, 60000, heads=8), (main, ahead)),
        ("1 x 60000, 16q/2kv", decode_case(1, 60000, heads=16, kv=2), (main, ahead)),
        ("16 x 30000", decode_case(16, 30000), (single, single_ahead)),
    ):
        for tile in tiles:
            report.add(f"{name}: {_label(tile)}", lambda c=case, t=tile: Decode(c, t).measure())
    case = decode_case(1, 60000)
    for tile in (single, replace(single_ahead, num_stages=2), single_ahead, replace(single_ahead, num_stages=4)):
        report.add(f"1 x 60000 invariant: {_label(tile)}", lambda c=case, t=tile: Decode(c, t, fixed=256).measure())


def short(report: Report) -> None:
    main, ahead = AttentionTile(16, 64, 4, 2, ahead=False), AttentionTile(16, 64, 4, 4)
    few = (main, ahead, replace(ahead, ask=8), replace(ahead, num_stages=3))
    for rows, context in ((1, 384), (4, 900), (8, 900)):
        case = Paged(np.full(rows, context), 16, 8, copies=32)
        for tile in few:
            report.add(f"{rows} x {context}, 16q/8kv: {_label(tile)}", lambda c=case, t=tile: Decode(c, t).measure())
    single, ahead = AttentionTile(16, 32, 1, 4, ahead=False), AttentionTile(16, 32, 1, 2)
    tiles = (single, ahead, replace(ahead, num_stages=3), replace(ahead, num_stages=3, ask=2))
    for name, lengths, copies in (
        ("256 x 800", np.full(256, 800), 1),
        ("512 x 900", np.full(512, 900), 1),
        ("as in A after 600 steps", workload_rows(600), 3),
        ("as in A after 850 steps", workload_rows(850), 3),
    ):
        case = Paged(lengths, 16, 8, copies=copies)
        for tile in tiles:
            report.add(f"{name}, 16q/8kv: {_label(tile)}", lambda c=case, t=tile: Decode(c, t).measure())
        if name == "256 x 800":
            for tile in tiles[:3]:
                report.add(
                    f"{name} invariant: {_label(tile)}", lambda c=case, t=tile: Decode(c, t, fixed=256).measure()
                )


def _label(tile: AttentionTile) -> str:
    asked = f", ask {tile.ask}" if tile.ask else ""
    return f"{'' if tile.ahead else 'main '}{tile.block_n} x {tile.num_warps} x {tile.num_stages}{asked}"


PARTS = {"long": long, "merge": merge, "layer": layer, "short": short, "shapes": shapes}


def compile_all() -> None:
    """Every kernel, by twelve processes at once."""
    command = [sys.executable, __file__, *sys.argv[1:]]
    shares = [
        subprocess.Popen(command, env={**os.environ, "LONG_DECODE_COMPILES": str(share)}, stdout=subprocess.DEVNULL)
        for share in range(12)
    ]
    for share in shares:
        share.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=85.0)
    parser.add_argument("--only", default=",".join(PARTS))
    options = parser.parse_args()
    torch.manual_seed(0)
    began = time.monotonic()
    if COMPILING is None:
        compile_all()
    report = Report(began + options.seconds)
    for part in options.only.split(","):
        PARTS[part](report)
        torch.cuda.empty_cache()
    if COMPILING is not None:
        return
    took = round(time.monotonic() - began, 1)
    device = torch.cuda.get_device_name()
    print(json.dumps({"device": device, "seconds": took, "rows": report.rows, "left_out": report.left_out}))


if __name__ == "__main__":
    main()
