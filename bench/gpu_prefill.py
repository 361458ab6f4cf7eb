"""Attention of prompts, kernel beside kernel: TFLOP/s of each over the same pages. One JSON line per case and kernel.

    python bench/gpu_prefill.py [--only PART_OF_A_NAME]

Each result is compared with the reference first, at the first, middle and last tokens of the first and last row.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from itertools import count, product
from pathlib import Path

import numpy as np
import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_attention import Paged
from gpu_timing import BF16, num_copies, relative_error

from headrace.kernels.triton.paged_attention import AttentionTiles, choose_tiles
from headrace.kernels.triton.work_items import LaunchBounds
from tests.kernels.oracles import reference_attention

SHAPES = {"32q/8kv x 128": (32, 8, 128), "16q/8kv x 128": (16, 8, 128), "14q/2kv x 64": (14, 2, 64)}
STEPS = {"16 x 1024": (16, 1024, 0)} | {
    f"{num_q} over {before}": (1, num_q, before) for num_q, before in ((8192, 16384), (8192, 60000), (2048, 16384))
}
CHECKED = 24  # tokens at each place


class Prompts(Paged):
    """Rows of `num_q` tokens each, behind what their contexts hold already."""

    @classmethod
    def make(cls, shape: str, step: str, page: int = 16) -> Prompts:
        (heads, kv, dim), (rows, num_q, before) = SHAPES[shape], STEPS[step]
        copies = num_copies(rows * (before + num_q) * kv * dim * 4)
        return cls(np.full(rows, before + num_q), heads, kv, dim, page, num_q=num_q, copies=copies)

    def error(self) -> float:
        """The worst of some tokens, after one call on the first pool."""
        worst = 0.0
        for row in {0, len(self.lengths) - 1}:
            for at in (0, self.num_q // 2, self.num_q - CHECKED):
                mine = slice(row * self.num_q + at, row * self.num_q + at + CHECKED)
                rows = [(row, int(self.lengths[row]) - self.num_q + at, CHECKED)]
                expected = reference_attention(self.q[mine], *self.pools[0], self.table, rows, self.kv, self.page)
                worst = max(worst, relative_error(self.out[mine], expected))
        return worst

    def ours(self, tiles: AttentionTiles | None) -> Callable[[], None]:
        """Our kernels: those that are chosen, or these."""
        attention, metadata, summary = self.build(tiles=tiles)
        merged = len(self.q) if summary.num_partials else 0
        bounds, turn = LaunchBounds(summary.num_decode, summary.num_prefill, merged), count()

        def call() -> None:
            keys, values = self.pools[next(turn) % self.copies]
            attention.run(self.q, keys, values, self.table, metadata, self.out, bounds)

        return call

    def flashinfer(self) -> Callable[[], None]:
        """FlashInfer's kernel over the same pages."""
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        wrapper = BatchPrefillWithPagedKVCacheWrapper(torch.zeros(512 << 20, dtype=torch.uint8, device="cuda"), "HND")
        columns = torch.from_numpy(-(-self.lengths // self.page))
        firsts = torch.nn.functional.pad(columns.cumsum(0), (1, 0)).int()
        queries = torch.arange(len(columns) + 1, dtype=torch.int32) * self.num_q
        pages = torch.cat([row[:n] for row, n in zip(self.table, columns.tolist(), strict=True)])
        last = torch.from_numpy((self.lengths - 1) % self.page + 1).int()
        wrapper.plan(
            queries, firsts, pages, last, self.heads, self.kv, self.dim, self.page, causal=True,
            q_data_type=BF16, kv_data_type=BF16,
        )  # fmt: skip
        shape, turn = (-1, self.kv, self.page, self.dim), count()

        def call() -> None:
            keys, values = self.pools[next(turn) % self.copies]
            wrapper.run(self.q, (keys.view(shape), values.view(shape)), out=self.out)

        return call

    def measure(self, kernel: str) -> dict[str, object]:
        """Error, and what one call takes; or why there is none."""
        general = choose_tiles(self.heads // self.kv, self.dim, BF16, invariant=False)
        try:
            call = self.flashinfer() if kernel == "flashinfer" else self.ours(general if kernel == "general" else None)
        except ImportError as error:
            return {"skipped": str(error)}
        self.out.fill_(float("nan"))
        call()
        error = self.error()
        us = 1e3 * float(triton.testing.do_bench(call, warmup=10, rep=60, return_mode="median"))
        return {"us": round(us, 1), "tflops": round(self.flops / us / 1e6, 1), "error": error, "wrong": error > 1e-2}


def main() -> int:
    """Print every case; 1 if a result was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="of the cases")
    only, wrong = parser.parse_args().only, False
    for shape, step in product(SHAPES, STEPS):
        if only not in f"{step}, {shape}":
            continue
        case = Prompts.make(shape, step)
        for kernel in ("chosen", "general", "flashinfer"):
            found = case.measure(kernel)
            wrong |= bool(found.get("wrong"))
            print(json.dumps({"case": f"{step}, {shape}", "kernel": kernel, **found}), flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
