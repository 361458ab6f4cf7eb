"""The scripts that a GPU machine runs: their arithmetic, and that a row that fails does not stop the others."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_breakdown, gpu_report
from bench.gpu_breakdown import Span, classify, device_spans, idle_share, kernel_classes, summarise
from bench.gpu_report import ROWS, Figure, in_order

ROOT = Path(__file__).resolve().parents[2]


def test_every_kernel_has_its_class() -> None:
    classes = kernel_classes()
    expected = {
        "attention_items_kernel": "attention", "merge_parts_kernel": "attention", "_tile_kernel": "GEMM",
        "_row_kernel": "GEMM", "_norm_kernel": "norm, rope, store", "_rope_store_kernel": "norm, rope, store",
        "_blocks_kernel": "sampling", "_thresholds_kernel": "sampling",
    }  # fmt: skip
    assert {name: classes[name] for name in expected} == expected
    assert classify("nvjet_tst_128x256_64x4_2x1_v_bz_coopB_TNT", classes) == "GEMM"
    assert classify("void flashinfer::BatchDecodeWithPagedKVCacheKernel", classes) == "attention"
    assert classify("copy: Memcpy HtoD", classes) == "copies"
    assert classify("void at::native::index_elementwise_kernel", classes) == "other"
    assert set(classes.values()) <= set(gpu_breakdown.CLASSES)


def test_idle_is_what_no_span_covers() -> None:
    spans: list[Span] = [("b", 20.0, 10.0), ("a", 0.0, 10.0), ("c", 25.0, 15.0), ("d", 26.0, 2.0)]
    assert idle_share(spans) == pytest.approx(10 / 40)
    assert idle_share([]) == 0.0


def test_a_trace_is_summed_by_class_per_step() -> None:
    events = [
        {"ph": "X", "cat": "kernel", "name": "attention_items_kernel", "ts": 0, "dur": 6},
        {"ph": "X", "cat": "kernel", "name": "nvjet_1", "ts": 6, "dur": 3},
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy DtoH", "ts": 10, "dur": 2},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 99},
        {"ph": "i", "cat": "kernel", "name": "mark", "ts": 1},
    ]
    found = summarise(device_spans(events), 2, {"attention_items_kernel": "attention"})
    assert found["us_per_step"] | {"attention": 3.0, "GEMM": 1.5, "copies": 1.0} == found["us_per_step"]
    assert found["profiled_idle_share"] == pytest.approx(1 / 12, abs=1e-5)
    assert found["kernels"][0] == {"name": "attention_items_kernel", "us_per_step": 3.0, "calls_per_step": 0.5}


def test_a_kernel_that_waits_for_the_one_ahead_does_not_count_twice() -> None:
    spans: list[Span] = [("early", 4.0, 8.0), ("ahead", 0.0, 10.0), ("after", 15.0, 1.0), ("inside", 5.0, 2.0)]
    assert dict(gpu_breakdown.own_times(spans)) == {"ahead": 10.0, "early": 2.0, "inside": 0.0, "after": 1.0}


def test_figures_are_held_against_targets_peers_and_other_rows() -> None:
    rate, latency = ROWS["A06"].figures[0], ROWS["C06"].figures[0]
    assert "must  27,500 met" in (line := rate.line({"tokens_per_second": 28_200}, {})) and "aim  30,000 NOT" in line
    assert "(1.20x)" in line
    assert "must     0.6 NOT" in latency.line({"milliseconds_per_token": 0.91}, {})
    invariant = ROWS["invariant"].figures[1]
    results = {"A06": {"tokens_per_second": 110.0}}
    assert invariant.value({"tokens_per_second": 100.0}, results) == pytest.approx(0.10)
    assert Figure("a.b", relation="ratio", base="A06").value({"a": {"b": 1}}, {"A06": {"a": {"b": 4}}}) == 0.25


def test_rows_bring_what_they_are_measured_against() -> None:
    assert in_order(["topp", "top5"], {}) == ["B06", "topp", "top5"]
    assert in_order(["topp"], {"B06": {}}) == ["topp"]
    assert in_order(["topp", "B06"], {"B06": {}}) == ["B06", "topp"]
    assert all(base in ROWS for row in ROWS.values() for base in row.bases)


def test_a_row_that_fails_or_hangs_lets_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripts = {
        "A06": "raise SystemExit('no such device')",
        "B06": "import time; print('began', flush=True); time.sleep(60)",
        "C06": "import json; print('noise'); print(json.dumps({'milliseconds_per_token': 0.5}))",
    }
    monkeypatch.setattr(gpu_report, "command_of", lambda row, runs: [sys.executable, "-c", scripts[name_of(row)]])
    out = tmp_path / "report.json"
    out.write_text(json.dumps({"C8": {"milliseconds_per_token": 4.2}}), encoding="utf-8")
    words = ["gpu_report.py", "--rows", "A06,B06,C06", "--out", str(out), "--timeout", "2"]
    monkeypatch.setattr(sys, "argv", words)
    gpu_report.main()
    printed = capsys.readouterr().out
    assert "no such device" in printed and "no end within 2 s" in printed and "began" in printed
    results = json.loads(out.read_text(encoding="utf-8"))
    assert set(results) == {"C06", "C8"} and results["C06"]["milliseconds_per_token"] == 0.5


def name_of(row: gpu_report.Row) -> str:
    return next(name for name, each in ROWS.items() if each is row)


def run_on_cpu(script: str, *words: str) -> dict[str, Any]:
    """What a script prints, run with a tiny model in this process, which has imported all that it needs."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.syspath_prepend(ROOT / "bench")
        patch.setattr(sys, "argv", [script, "--shape", "tiny", "--device", "cpu", *words])
        runpy.run_path(str(ROOT / "bench" / script), run_name="__main__")
    found: dict[str, Any] = json.loads(out.getvalue())
    return found


def test_what_requests_see_of_updates_is_measured() -> None:
    words = ["--requests", "8", "--seconds", "1.5", "--steps-per-second", "2000", "--parts", "pause,throughput"]
    found = run_on_cpu("gpu_pause.py", *words)
    assert found["throughput"] > 0 and found["step_ms"] > 0
    assert all(pauses["median"] <= pauses["worst"] for pauses in found["pauses_ms"].values())
    for run in found["quiet"] + found["updated"]:
        assert run["disturbed"] == {} and run["step"]["median_ms"] <= run["step"]["longest_ms"]
    assert [len(run["updates_ms"]) for run in found["quiet"] + found["updated"]] == [0, 0, 1, 1]


def test_copies_of_pages_beside_rows_that_decode_are_measured() -> None:
    words = ["--rows", "8", "--prefix-tokens", "256", "--steps", "200", "--quiet-steps", "10"]
    found = run_on_cpu("gpu_host_kv.py", *words)
    assert found["disturbed"] == {} and found["recomputed_tokens"] == 0
    page_bytes = 2 * 2 * 2 * 16 * 4 * 16  # keys and values of two layers and two heads of 16 floats, for 16 tokens
    assert found["load"]["gigabytes"] == pytest.approx(12 * 16 * page_bytes / 1e9), "all that was asked for came back"
    assert found["visits"]["gigabytes"] == 0 and found["visits"]["steps"] > 0 and found["visits"]["decode"] > 0
    assert found["save"]["gigabytes"] > 0
    assert found["load"]["gb_per_s"] > 0 and found["save"]["gb_per_s"] > 0 and found["load"]["decode"] > 0
