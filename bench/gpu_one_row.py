"""What each launch of a decoder's layers costs a step of one row: the chain of all layers, and the chain without it.

    python bench/gpu_one_row.py [--shapes qwen3-0.6b,qwen2.5-0.5b] [--context 384] [--tiles] [--seconds 45]

Every layer has weights, keys and values of its own, as in a model. Prints JSON objects, microseconds per layer, medians
of graph replays. `--tiles` tries other tiles for the products, one kind after the other, and keeps what is faster.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_attention import Paged
from gpu_timing import BF16, DEVICE

from headrace.bench.models import SHAPES
from headrace.kernels.paged_kv import AttentionShape
from headrace.kernels.triton.linear_rows import RowTile, multiply_row, row_tile
from headrace.kernels.triton.paged_attention import PagedAttention
from headrace.kernels.triton.row_operations import rope_and_store
from headrace.kernels.triton.work_items import AttentionPlanner, LaunchBounds, WorkLimits

PAGE = 16
EPS = 1e-6
PARTS = ("qkv", "rope", "attention", "merge", "output", "gate_up", "down")
OTHER_TILES = {  # outputs per program, parts that a row is walked in, warps
    "output": ((4, 1, 2), (4, 1, 4), (8, 1, 4), (8, 1, 8), (16, 1, 4), (16, 1, 8), (8, 2, 4)),
    "down": ((4, 1, 4), (4, 1, 8), (8, 1, 4), (8, 1, 8), (8, 1, 16), (4, 2, 4), (8, 2, 8), (4, 4, 8)),
    "qkv": ((4, 1, 1), (4, 1, 2), (8, 1, 2), (8, 1, 4), (16, 1, 4), (16, 1, 8), (32, 1, 8)),
    "gate_up": ((2, 1, 2), (4, 1, 2), (4, 1, 4), (8, 1, 4), (8, 1, 8), (16, 1, 8), (8, 2, 4)),
}


class Chain:
    """The layers of a shape, one row of so many positions."""

    def __init__(self, config: dict[str, Any], context: int) -> None:
        hidden, ffn, self.num_layers = (
            config[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")
        )
        heads, kv, dim = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        self.shape = AttentionShape(heads, kv, dim)
        self.case = Paged(np.full(1, context), heads, kv, dim, copies=self.num_layers)
        limits = WorkLimits(8, 8192, 16384)
        self.attention = PagedAttention(self.shape, PAGE, limits, BF16, DEVICE, pdl=True)
        planner = AttentionPlanner(
            limits, self.attention.tile_sizes, PAGE, kv, max_positions=config["max_position_embeddings"]
        )
        self.bounds = planner.bounds(1, 1, is_decode=True)
        buffer = np.zeros(limits.size, np.int32)
        planner.fill(buffer, np.zeros(1, int), self.case.lengths - 1, np.ones(1, int), self.case.groups, self.bounds)
        self.metadata = torch.from_numpy(buffer).to(DEVICE)
        self.sizes = {
            "qkv": ((heads + 2 * kv) * dim, hidden),
            "output": (hidden, heads * dim),
            "gate_up": (ffn, hidden),
            "down": (hidden, ffn),
        }
        self.weights = {
            kind: [normal(outputs * (1 + (kind == "gate_up")), inputs) for _ in range(self.num_layers)]
            for kind, (outputs, inputs) in self.sizes.items()
        }
        self.tiles = {
            kind: row_tile(outputs, inputs, gated=kind == "gate_up") for kind, (outputs, inputs) in self.sizes.items()
        }
        self.norm = torch.ones(hidden, device=DEVICE, dtype=BF16)
        head_norm = torch.ones(dim, device=DEVICE, dtype=BF16)
        self.head_norms = (head_norm, head_norm) if config["model_type"] == "qwen3" else None
        self.cos, self.sin = (torch.ones(context, dim, device=DEVICE) for _ in range(2))
        self.position = torch.full((1,), context - 1, dtype=torch.int32, device=DEVICE)
        self.row = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        self.values = {kind: normal(1, outputs) for kind, (outputs, _) in self.sizes.items()}

    def measure(self, without: str = "") -> float:
        """Microseconds per layer, some launch left out."""
        self._run(without)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run(without)
            self._run(without)
        milliseconds = triton.testing.do_bench(graph.replay, warmup=8, rep=25, return_mode="median")
        return round(float(milliseconds) * 1e3 / self.num_layers / 2, 2)

    def try_tiles(self, until: float) -> dict[str, Any]:
        """The fastest tiles found until then, and what each did when it was tried first."""
        best, tried = self.measure(), {}
        for kind, others in OTHER_TILES.items():
            width = triton.next_power_of_2(self.sizes[kind][1])
            for block_n, num_parts, num_warps in others:
                if time.monotonic() > until:
                    break
                before, self.tiles[kind] = self.tiles[kind], RowTile(block_n, width // num_parts, num_warps)
                found = tried[f"{kind} {block_n}x{width // num_parts}, {num_warps} warps"] = self.measure()
                if found < best:
                    best = found
                else:
                    self.tiles[kind] = before
        return {"best": best, "tiles": {kind: str(tile) for kind, tile in self.tiles.items()}, "tried": tried}

    def _run(self, without: str) -> None:
        stream = normal(1, len(self.norm))
        for layer in range(self.num_layers):
            self._run_layer(layer, stream, without)

    def _run_layer(self, layer: int, stream: torch.Tensor, without: str) -> None:
        def product(kind: str, x: torch.Tensor, out: torch.Tensor, **more: Any) -> None:
            if kind != without:
                multiply_row(x, self.weights[kind][layer], out, pdl=True, tile=self.tiles[kind], **more)

        keys, values = self.case.pools[layer]
        qkv, gated, table = self.values["qkv"], self.values["gate_up"], self.case.table
        q = qkv.view(1, -1, self.shape.head_dim)[:, : self.shape.num_heads]
        attended = q.new_empty(q.shape)
        product("qkv", stream, qkv, norm_K=self.norm, eps=EPS)
        if without != "rope":
            rope_and_store(
                qkv, None, self.head_norms, EPS, self.cos, self.sin, self.position, self.row, table, self.shape, PAGE,
                q, keys, values, pdl=True,
            )  # fmt: skip
        if without != "attention":
            bounds = LaunchBounds(self.bounds.decode, 0, 0) if without == "merge" else self.bounds
            self.attention.run(q, keys, values, table, self.metadata, attended, bounds)
        product("output", attended.view(1, -1), stream, adds=True)
        product("gate_up", stream, gated, norm_K=self.norm, eps=EPS, gated=True)
        product("down", gated, stream, adds=True)


def normal(*size: int) -> torch.Tensor:
    return torch.randn(size, device=DEVICE, dtype=BF16) / 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="qwen3-0.6b,qwen2.5-0.5b")
    parser.add_argument("--context", type=int, default=384)
    parser.add_argument("--tiles", action="store_true")
    parser.add_argument("--seconds", type=float, default=45.0, help="after which no further tile is tried")
    options = parser.parse_args()
    torch.manual_seed(0)
    until = time.monotonic() + options.seconds
    for shape in options.shapes.split(","):
        chain = Chain(SHAPES[shape], options.context)
        found: dict[str, Any] = {"shape": shape, "whole": chain.measure()}
        found |= {f"without {part}": chain.measure(part) for part in PARTS}
        if options.tiles:
            found |= chain.try_tiles(until)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
