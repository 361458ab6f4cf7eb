"""Checks and times every CUDA kernel of Headrace in one call: a table, then one line of JSON.

    python bench/gpu_kernels.py [--only SECTION,...] [--out FILE]

Sections: attention, float8, bounds, prefill, planning, rows, sampling, linear, products, chain. Beside each time stands
the floor predicted from the bytes that must move at 4.29 TB/s or the operations at 790 TFLOP/s (measured on one H200).
Inputs rotate among copies that together exceed the cache. Times are medians of graph replays.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import count
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gpu_attention
import gpu_products
from gpu_attention import Paged
from gpu_timing import BF16, DEVICE, FLOAT8, Table, num_copies, relative_error, time_us

from headrace.kernels.paged_kv import AttentionShape
from headrace.kernels.triton import (
    linear_rows,
    logits_processors,
    ordered_products,
    row_operations,
    row_survey,
    sampling_rows,
    threshold_search,
    top_rows,
)
from headrace.kernels.triton.slot_params import DIVISOR, MIN_P, NUM_PARAMS, NUM_TOP, TEMPERATURE, TOP_K, TOP_P
from headrace.kernels.triton.work_items import LaunchBounds
from tests.kernels import oracles


def rows(table: Table) -> None:
    for num_rows in (1, 512):
        _norm_and_gate(table, num_rows)
        for heads, kv in ((16, 8), (32, 8)):
            _rope(table, num_rows, heads, kv, BF16)
        _rope(table, num_rows, 16, 8, FLOAT8)


def _norm_and_gate(table: Table, num_rows: int) -> None:
    for width, inner in ((1024, 3072), (4096, 12288)):
        x, out = (torch.randn(num_rows, width, device=DEVICE, dtype=BF16) for _ in range(2))
        weight = torch.randn(width, device=DEVICE, dtype=BF16)
        row_operations.rms_norm(x, weight, 1e-6, out)
        error = relative_error(out, oracles.reference_rms_norm(x, weight, 1e-6))
        us = time_us(lambda x=x, w=weight, o=out: row_operations.rms_norm(x, w, 1e-6, o))
        table.add(f"norm, {num_rows} x {width}", us, 2 * x.nbytes, 0, error)
        x, out = (torch.randn(num_rows, n, device=DEVICE, dtype=BF16) for n in (2 * inner, inner))
        row_operations.silu_and_mul(x, out)
        error = relative_error(out, oracles.reference_silu_and_mul(x))
        us = time_us(lambda x=x, o=out: row_operations.silu_and_mul(x, o))
        table.add(f"silu and mul, {num_rows} x {inner}", us, 3 * out.nbytes, 0, error)


def _rope(table: Table, num_rows: int, heads: int, kv: int, pool_dtype: torch.dtype) -> None:
    case = Paged(np.full(num_rows, 900), heads, kv, pool_dtype=pool_dtype)
    shape = AttentionShape(heads, kv, 128)
    qkv = torch.randn(num_rows, (heads + 2 * kv) * 128, device=DEVICE, dtype=BF16)
    cos, sin = (torch.randn(1024, 128, device=DEVICE) for _ in range(2))
    cos[:, 64:], sin[:, 64:] = cos[:, :64], sin[:, :64]
    norms = (torch.randn(128, device=DEVICE, dtype=BF16), torch.randn(128, device=DEVICE, dtype=BF16))
    positions = torch.full((num_rows,), 899, dtype=torch.int32, device=DEVICE)
    table_rows = torch.arange(num_rows, dtype=torch.int32, device=DEVICE)

    def call() -> None:
        row_operations.rope_and_store(
            qkv, None, norms, 1e-6, cos, sin, positions, table_rows, case.table, shape, 16, case.q, *case.pools[0]
        )

    call()
    expected = oracles.reference_rope(qkv, None, norms, 1e-6, cos, sin, positions, shape)[0]
    error = relative_error(case.q, expected)
    label = f"norms + rope + store, {num_rows} rows, {heads}q/{kv}kv, {str(pool_dtype)[6:]}"
    table.add(label, time_us(call), 2 * qkv.nbytes, 0, error)


def sampling(table: Table) -> None:
    vocab = 151936
    for num_rows, dtype in ((1, BF16), (256, BF16), (512, BF16), (512, torch.float32)):
        logits = (torch.randn(num_rows, vocab, device=DEVICE) * 3).to(dtype)
        slots = torch.arange(num_rows, dtype=torch.int32, device=DEVICE)
        params = torch.zeros(num_rows, NUM_PARAMS, device=DEVICE)
        params[:, [TEMPERATURE.value, DIVISOR.value, TOP_P.value]] = 1.0
        params[:, MIN_P.value] = float("-inf")
        seeds = torch.randint(0, 2**31, (num_rows, 2), dtype=torch.int32, device=DEVICE)
        workspace = sampling_rows.SamplingWorkspace.make(num_rows, vocab, DEVICE)
        tokens, logprobs = torch.zeros_like(slots), torch.zeros(num_rows, device=DEVICE)
        thresholds = torch.zeros(num_rows, device=DEVICE)
        processed = logits_processors.ProcessedRows.make(*logits.shape, DEVICE)
        tables = logits_processors.SlotProcessors(
            torch.zeros(num_rows, logits_processors.PROCESSORS_SIZE, dtype=torch.int32, device=DEVICE),
            torch.zeros(num_rows, 1, dtype=torch.int16, device=DEVICE),
        )
        survey = row_survey.RowSurvey.make(num_rows, vocab, DEVICE)
        within = threshold_search.ThresholdWorkspace.make(num_rows, vocab, DEVICE)

        def call() -> None:
            sampling_rows.sample_rows(
                logits, slots, slots, params, seeds, None, workspace, tokens, logprobs, None  # noqa: B023
            )  # fmt: skip

        def search() -> None:
            logits_processors.process_rows(logits, processed, survey, slots, slots, params, tables)  # noqa: B023
            threshold_search.find_thresholds(logits, params, slots, processed, survey, within, thresholds)  # noqa: B023

        call()
        expected = torch.log_softmax(logits.double(), -1).gather(1, tokens.long()[:, None])[:, 0]
        label = f"{num_rows} x {vocab} {str(dtype)[6:]}"
        table.add(f"sample, {label}", time_us(call), logits.nbytes, 0, relative_error(logprobs, expected))
        rows = top_rows.SampledRows(logits, slots, tokens, params, None, workspace, None)
        for num_top in (5, 20, 100):
            _time_top(table, rows, num_top, label)
        for name, top_k, top_p in (("top_k 50 top_p 0.95", 50, 0.95), ("top_p 0.95", 0, 0.95), ("top_k 50", 50, 1.0)):
            params[:, TOP_K.value], params[:, TOP_P.value] = top_k, top_p
            search()
            error = _threshold_error(logits, thresholds, params)
            table.add(f"thresholds {name}, {label}", time_us(search), logits.nbytes, 0, error)


def _time_top(table: Table, rows: top_rows.SampledRows, num_top: int, label: str) -> None:
    """The most probable ids of rows just sampled; the error is the share of wrong log-probabilities."""
    rows.slot_params[:, NUM_TOP.value] = num_top
    out = torch.zeros(len(rows.slots_S), 2 * num_top, dtype=torch.int32, device=DEVICE)
    microseconds = time_us(lambda: top_rows.top_rows(rows, out, num_top))
    expected = torch.log_softmax(rows.logits_SV.float(), -1).topk(num_top).values
    found = out[:, num_top:].contiguous().view(torch.float32)
    error = float(((found - expected).abs() > 2e-5).double().mean())
    table.add(f"top {num_top}, {label}", microseconds, rows.logits_SV.nbytes, 0, error)


def _threshold_error(logits: torch.Tensor, thresholds: torch.Tensor, params: torch.Tensor) -> float:
    """Share of four rows of which another number of tokens is left than by a sort (equal logits stay together)."""
    wrong = 0
    for row in range(min(4, len(logits))):
        values = logits[row].double().sort(descending=True).values
        top_k, top_p = int(params[row, TOP_K.value]), float(params[row, TOP_P.value])
        if top_k:
            values = values[values >= values[top_k - 1]]
        if top_p < 1.0:
            masses = torch.softmax(values, 0).cumsum(0)
            values = values[values >= values[int(torch.searchsorted(masses, top_p))]]
        left = int((logits[row].float() >= thresholds[row]).sum())
        wrong += abs(left - len(values)) > max(2, len(values) // 10000)  # a sum's last bit may move a flat tail's edge
    return wrong / min(4, len(logits))


SHAPES = [
    ("0.6B qkv", 4096, 1024), ("0.6B o", 1024, 2048), ("0.6B gate_up", 6144, 1024), ("0.6B down", 1024, 3072),
    ("8B qkv", 6144, 4096), ("8B o", 4096, 4096), ("8B gate_up", 24576, 4096), ("8B down", 4096, 12288),
    ("0.6B head", 151936, 1024), ("8B head", 151936, 4096),
]  # fmt: skip


def linear(table: Table) -> None:
    for name, outputs, inputs in SHAPES:
        copies = num_copies(outputs * inputs * 2)
        weights = [torch.randn(outputs, inputs, device=DEVICE, dtype=BF16) for _ in range(copies)]
        for num_rows in (1, 256, 512):
            x = torch.randn(num_rows, inputs, device=DEVICE, dtype=BF16)
            out = torch.empty(num_rows, outputs, device=DEVICE, dtype=BF16)
            expected = oracles.reference_linear(x, weights[0], None)
            num_bytes = weights[0].nbytes + x.nbytes + out.nbytes
            runs = {
                "library": lambda w, x=x, o=out: torch.mm(x, w.T, out=o),
                "invariant": lambda w, x=x, o=out: ordered_products.multiply_tiles(x, w, None, o),
            }
            if num_rows == 1:
                runs["row"] = lambda w, x=x, o=out: linear_rows.multiply_row(x, w, o)
                runs["row, pdl"] = lambda w, x=x, o=out: linear_rows.multiply_row(x, w, o, pdl=True)
            for kind, run in runs.items():
                turn = count()
                run(weights[0])
                error = relative_error(out, expected)
                us = time_us(lambda run=run, w=weights, turn=turn: run(w[next(turn) % len(w)]), max(8, copies))
                table.add(f"{name}, {num_rows} rows, {kind}", us, num_bytes, 2.0 * num_rows * outputs * inputs, error)


class Chain:
    """Every kernel of a decode step of a Qwen3 decoder on random weights, as one graph: what a step costs at best."""

    def __init__(self, layers: int, hidden: int, inner: int, heads: int, context: np.ndarray, pdl: bool) -> None:
        self.rows, self.heads, self.kv, self.dim = len(context), heads, 8, 128
        self.pdl = pdl

        def weight(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=DEVICE, dtype=BF16) * 0.02

        self.case = Paged(context, heads, 8, copies=layers)
        self.attention, self.metadata, summary = self.case.build(pdl=pdl)
        self.bounds = LaunchBounds(summary.num_decode, 0, self.rows if summary.num_partials else 0)
        qkv = (heads + 16) * 128
        self.layers = [
            (weight(hidden), weight(qkv, hidden), weight(128), weight(128), weight(hidden, heads * 128), weight(hidden),
             weight(2 * inner, hidden), weight(hidden, inner)) for _ in range(layers)
        ]  # fmt: skip
        self.norm, self.head = weight(hidden), weight(151936, hidden)
        self.residual, self.x = (weight(self.rows, hidden) for _ in range(2))
        self.qkv, self.gate_up, self.inner = (weight(self.rows, n) for n in (qkv, 2 * inner, inner))
        self.logits = weight(self.rows, 151936)
        self.cos = torch.randn(65536, 128, device=DEVICE)
        self.positions = torch.from_numpy(context.astype(np.int32) - 1).to(DEVICE)
        self.table_rows = torch.arange(self.rows, dtype=torch.int32, device=DEVICE)
        self.shape = AttentionShape(heads, 8, 128)

    def attend(self, layer: int, q_norm: torch.Tensor, k_norm: torch.Tensor) -> torch.Tensor:
        case, pools = self.case, self.case.pools[layer]
        row_operations.rope_and_store(
            self.qkv, None, (q_norm, k_norm), 1e-6, self.cos, self.cos, self.positions, self.table_rows, case.table,
            self.shape, 16, case.q, *pools, pdl=self.pdl,
        )  # fmt: skip
        self.attention.run(case.q, *pools, case.table, self.metadata, case.out, self.bounds)
        return case.out.view(self.rows, -1)

    def step_of_one(self) -> None:
        row, pdl = linear_rows.multiply_row, self.pdl
        for layer, (norm1, qkv, q_norm, k_norm, o, norm2, gate_up, down) in enumerate(self.layers):
            row(self.residual, qkv, self.qkv, norm_K=norm1, eps=1e-6, pdl=pdl)
            row(self.attend(layer, q_norm, k_norm), o, self.residual, adds=True, pdl=pdl)
            row(self.residual, gate_up, self.inner, norm_K=norm2, eps=1e-6, gated=True, pdl=pdl)
            row(self.inner, down, self.residual, adds=True, pdl=pdl)
        row(self.residual, self.head, self.logits, norm_K=self.norm, eps=1e-6, pdl=pdl)

    def step_of_many(self) -> None:
        ops = row_operations
        for layer, (norm1, qkv, q_norm, k_norm, o, norm2, gate_up, down) in enumerate(self.layers):
            ops.rms_norm(self.residual, norm1, 1e-6, self.x, pdl=self.pdl)
            torch.mm(self.x, qkv.T, out=self.qkv)
            self.residual.addmm_(self.attend(layer, q_norm, k_norm), o.T)
            ops.rms_norm(self.residual, norm2, 1e-6, self.x, pdl=self.pdl)
            torch.mm(self.x, gate_up.T, out=self.gate_up)
            ops.silu_and_mul(self.gate_up, self.inner, pdl=self.pdl)
            self.residual.addmm_(self.inner, down.T)
        ops.rms_norm(self.residual, self.norm, 1e-6, self.x, pdl=self.pdl)
        torch.mm(self.x, self.head.T, out=self.logits)

    @property
    def num_bytes(self) -> float:
        weights = sum(weight.nbytes for layer in self.layers for weight in layer) + self.head.nbytes
        return weights + len(self.layers) * self.case.num_bytes


def chain(table: Table) -> None:
    for name, sizes in (("0.6B", (28, 1024, 3072, 16)), ("8B", (36, 4096, 12288, 32))):
        for rows_, context in ((1, 384), (256, 800), (512, 900)):
            if name == "8B" and rows_ == 512:
                continue
            for pdl in (False, True):
                step = Chain(*sizes, np.full(rows_, context), pdl)
                calls = {"library products": step.step_of_many}
                if rows_ == 1:
                    calls["row products"] = step.step_of_one
                for kind, call in calls.items():
                    us = time_us(call, repeats=1)
                    label = f"step {name}, {rows_} x {context}, {kind}{', pdl' if pdl else ''}"
                    table.add(label, us, step.num_bytes, 0, float(not step.logits.isfinite().all()))
                del step, calls, call
                torch.cuda.empty_cache()


SECTIONS = {
    "attention": gpu_attention.attention, "float8": gpu_attention.float8, "bounds": gpu_attention.bounds,
    "prefill": gpu_attention.prefill, "planning": gpu_attention.planning,
    "rows": rows, "sampling": sampling, "linear": linear, "products": gpu_products.products, "chain": chain,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    table = Table()
    for name in arguments.only.split(","):
        SECTIONS[name](table)
    line = json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": table.rows})
    print(line[:200] if arguments.out else line)
    if arguments.out:
        arguments.out.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
