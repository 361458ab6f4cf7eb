"""What the kernel benchmarks share: times from graph replays, and a table of them beside predicted floors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import triton

BANDWIDTH, FLOPS = 4.29e12, 790e12
DEVICE = torch.device("cuda")
BF16 = torch.bfloat16
FLOAT8 = torch.float8_e4m3fn
SPREAD_BYTES = 240e6  # of copies to rotate among: four times the cache


def time_us(call: Callable[[], object], repeats: int = 8) -> float:
    """Median time of one call, from replays of a graph of `repeats` calls."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    milliseconds = triton.testing.do_bench(graph.replay, warmup=15, rep=60, return_mode="median")
    return float(milliseconds) * 1e3 / repeats


def num_copies(num_bytes: float) -> int:
    return max(1, min(32, int(SPREAD_BYTES / num_bytes) + 1))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@dataclass
class Table:
    """Rows of (section, name, microseconds, floor, error, note)."""

    rows: list[dict[str, object]] = field(default_factory=list)

    def add(self, name: str, us: float, num_bytes: float, flops: float, error: float, note: str = "") -> None:
        floor = max(num_bytes / BANDWIDTH, flops / FLOPS) * 1e6
        self.rows.append({"name": name, "us": us, "floor_us": floor, "error": error, "note": note})
        print(f"{name:58s} {us:9.1f} us  floor {floor:8.1f}  {floor / us:5.0%}  error {error:.1e}  {note}", flush=True)
