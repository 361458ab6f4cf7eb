"""All benchmark rows of a CUDA machine in one call: one line per figure beside its target and the best peer's.

    python bench/gpu_report.py --rows A06,B06,C06,A8,B8,C8,D,topp,top5,serve,start,idle,invariant,fp8 --out report.json
    python bench/gpu_report.py --rows A8x2,B8x2,C8x2,A32x2,invariant8x2 --out report.json

The rows of the second need two devices; without `--rows` it is all that need one. Each row is a benchmark in a process
of its own with `--timeout` seconds; one that fails prints the end of what it said, and the others go on. A row that is
measured against another one brings that with it. `--out` holds the JSON object of every row and is written after each;
rows that an earlier call left there are kept, and not run again unless named.

Targets and peers: one H200, bf16, random weights, log-probabilities on (docs/benchmarks.md). Peers are the best of
vLLM 0.25.0 and SGLang 0.5.16 on the same kind of machine and workload, for prompts vLLM 0.26.0.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
_TAIL_LINES = 12

Relation = Literal["value", "ratio", "slowdown"]
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """One number of a row's JSON object, by its path ("a.b"), and what it is held against.

    `relation`: as it is; as a ratio to the same number of row `base`; or as the part by which it falls short of it.
    """

    path: str
    must: float | None = None
    aim: float | None = None
    peer: float | None = None
    is_lower_better: bool = False
    relation: Relation = "value"
    base: str | None = None

    def value(self, result: Result, results: Mapping[str, Result]) -> float:
        """The number. Raises `KeyError` if it or its base is not there."""
        own = _at(result, self.path)
        if self.base is None:
            return own
        other = _at(results[self.base], self.path)
        return own / other if self.relation == "ratio" else other / own - 1.0

    def line(self, result: Result, results: Mapping[str, Result]) -> str:
        """What is printed of it."""
        value = self.value(result, results)
        name = self.path if self.base is None else f"{self.path} {self.relation} to {self.base}"
        words = [f"{name:36s} {_plain(value):>10s}"]
        for label, bound in (("must", self.must), ("aim", self.aim)):
            if bound is not None:
                is_met = value <= bound if self.is_lower_better else value >= bound
                words.append(f"{label} {_plain(bound):>7s} {'met' if is_met else 'NOT':3s}")
        if self.peer is not None:
            gain = self.peer / value if self.is_lower_better else value / self.peer
            words.append(f"peer {_plain(self.peer)} ({gain:.2f}x)")
        return "  ".join(words)


@dataclass(frozen=True)
class Row:
    """A benchmark's command line after the interpreter, and its figures. `notes` are printed as they are, and it needs
    so many devices."""

    words: tuple[str, ...]
    figures: tuple[Figure, ...]
    notes: tuple[str, ...] = field(
        default=("max_logprob_difference", "mean_logprob_difference", "gpu_idle_share", "num_compiled_after_ready")
    )
    num_devices: int = 1

    @property
    def bases(self) -> set[str]:
        """Rows that this one is measured against."""
        return {figure.base for figure in self.figures if figure.base is not None}


SHAPES = {
    **{size: f"qwen3-{size}" for size in ("0.6b", "8b", "32b")},
    "0.5b": "qwen2.5-0.5b",
    "llama-8b": "llama-3.1-8b",
}


def _offline(shape: str, workload: str, *more: str) -> tuple[str, ...]:
    return ("-m", "headrace", "bench", "offline", "--shape", SHAPES[shape], "--workload", workload, "--json", *more)


def _rate(must: float, aim: float, peer: float) -> tuple[Figure, ...]:
    return (Figure("tokens_per_second", must, aim, peer),)


def _latency(must: float, aim: float, peer: float) -> tuple[Figure, ...]:
    return (Figure("milliseconds_per_token", must, aim, peer, is_lower_better=True),)


def _ratio(base: str, must: float) -> tuple[Figure, ...]:
    return (Figure("tokens_per_second"), Figure("tokens_per_second", must, relation="ratio", base=base))


def _invariant(base: str) -> tuple[Figure, ...]:
    slowdown = Figure("tokens_per_second", 0.24, 0.12, is_lower_better=True, relation="slowdown", base=base)
    return (Figure("tokens_per_second"), slowdown)


def _prompts(row: str, must: float, aim: float, peer: float) -> Row:
    figure = Figure("prompt_tokens_per_second", must, aim, peer)
    return Row(("bench/gpu_prompts.py", "--rows", row), (figure,))


def _on_two(shape: str, workload: str, *figures: Figure, more: tuple[str, ...] = ()) -> Row:
    return Row(_offline(shape, workload, "--tp-size", "2", *more), figures, num_devices=2)


def _gain(path: str, must: float, aim: float, base: str) -> Figure:
    return Figure(path, must, aim, relation="ratio", base=base)


def _kind(name: str, *more: str) -> tuple[str, ...]:
    return ("-m", "headrace", "bench", name, "--json", *more)


ROWS: dict[str, Row] = {
    "A06": Row(_offline("0.6b", "A"), _rate(27_500, 30_000, 23_500)),
    "B06": Row(_offline("0.6b", "B"), _rate(36_500, 40_000, 25_900)),
    "C06": Row(_offline("0.6b", "C"), _latency(0.60, 0.45, 1.63)),
    "C05": Row(_offline("0.5b", "C"), _latency(0.55, 0.40, 2.22)),
    "A8": Row(_offline("8b", "A"), _rate(10_200, 11_000, 9_190)),
    "B8": Row(_offline("8b", "B"), _rate(14_800, 16_000, 12_130)),
    "C8": Row(_offline("8b", "C"), _latency(4.4, 4.0, 5.17)),
    "A8pool": Row(_offline("8b", "A", "--kv-pool-tokens", "175000"), _rate(9_800, 10_200, 9_200)),
    "AL8pool": Row(_offline("llama-8b", "A", "--kv-pool-tokens", "131264"), _rate(9_600, 10_000, 8_337)),
    "nucleus": Row(
        _offline("0.6b", "A", "--top-p", "0.9", "--repetition-penalty", "1.1"), _rate(25_500, 26_300, 20_600)
    ),
    "D": Row(
        _kind("online", "--shape", "qwen3-0.6b"),
        (
            *_ratio("A06", 1.0),
            Figure("between_tokens_ms.p50"),
            Figure("between_tokens_ms.p99"),
            Figure("p99_over_p50", 3.0, is_lower_better=True),
            Figure("first_token_ms.p50"),
            Figure("first_token_ms.p99"),
        ),
    ),
    "streams": Row(
        (
            *_kind("online", "--shape", "qwen3-0.6b", "--http", "--length-divisor", "2"),
            "--num-requests",
            "1024",
            "--concurrency",
            "512",
        ),
        (
            Figure("tokens_per_second", 28_755, None, 19_900),
            Figure("longest_gap_ms.max", 300, 60, 130, is_lower_better=True),
            Figure("p99_over_p50", 2.5, is_lower_better=True),
            Figure("between_tokens_ms.p50", None, None, 20.4, is_lower_better=True),
            Figure("first_token_ms.p50", 500, is_lower_better=True),
        ),
    ),
    "topp": Row(_offline("0.6b", "B", "--top-p", "0.95", "--top-k", "50"), _ratio("B06", 0.90)),
    "top5": Row(_offline("0.6b", "B", "--top-logprobs", "5"), _ratio("B06", 0.95)),
    "serve": Row(
        _kind("serve", "--shape", "qwen3-8b", "--workload", "A"),
        (Figure("tokens_per_second"), Figure("offline_tokens_per_second"), Figure("ratio", 0.95, 0.98)),
    ),
    "start": Row(
        _kind("start", "--shape", "qwen3-0.6b"),
        (
            Figure("cached_seconds", 7.0, 5.0, 52.9, is_lower_better=True),
            Figure("cold_seconds", 60.0, 30.0, is_lower_better=True),
        ),
        ("cached_phases", "cold_phases"),
    ),
    "idle": Row(
        ("bench/gpu_breakdown.py", "--cases", "b512", "--counters"),
        (
            Figure("b512.idle_share", 0.03, is_lower_better=True),
            Figure("b512.wall_idle_share", 0.03, is_lower_better=True),
            Figure("b512.ms_per_step"),
        ),
    ),
    "invariant": Row(_offline("0.6b", "A", "--numerics", "invariant"), _invariant("A06")),
    "invariant8": Row(_offline("8b", "A", "--numerics", "invariant"), _invariant("A8")),
    "prompts16k": _prompts("llama-16k", 34_000, 37_000, 33_403),
    "prompt60k": Row(
        ("bench/gpu_prompts.py", "--rows", "llama-60k"),
        (
            Figure("first_token_s", 2.9, 2.6, 2.89, is_lower_better=True),
            Figure("ms_per_token", 6.3, 5.9, 6.70, is_lower_better=True),
        ),
    ),
    "prompts8": _prompts("8b-2k", 41_000, 44_000, 40_115),
    "prompts06": _prompts("0.6b-2k", 330_000, 400_000, 287_000),
    "A8x2": _on_two("8b", "A", Figure("tokens_per_second"), _gain("tokens_per_second", 1.6, 1.75, "A8")),
    "B8x2": _on_two("8b", "B", Figure("tokens_per_second"), _gain("tokens_per_second", 1.6, 1.75, "B8")),
    "C8x2": _on_two("8b", "C", Figure("milliseconds_per_token", 2.7, 2.4, is_lower_better=True)),
    "A32x2": _on_two("32b", "A", Figure("tokens_per_second", 5_200, 5_800)),
    "invariant8x2": _on_two("8b", "A", *_invariant("A8x2"), more=("--numerics", "invariant")),
    "fp8": Row(
        _offline("0.6b", "B", "--kv-dtype", "fp8_e4m3"),
        (Figure("tokens_per_second"), Figure("tokens_per_second", relation="ratio", base="B06")),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    of_one = [name for name, row in ROWS.items() if row.num_devices == 1]
    parser.add_argument("--rows", default=",".join(of_one), help=f"of {','.join(ROWS)}")
    parser.add_argument("--out", type=Path, default=Path("gpu_report.json"))
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds a row may take (default: 300)")
    parser.add_argument("--deadline", type=float, help="seconds after which no further row is started")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of an offline row (default: 3)")
    arguments = parser.parse_args()
    names = arguments.rows.split(",")
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        parser.error(f"no such row: {', '.join(unknown)}")
    begin = time.monotonic()
    results: dict[str, Result] = read_results(arguments.out)
    for name in in_order(names, results):
        if arguments.deadline is not None and time.monotonic() - begin > arguments.deadline:
            print(f"{name:10s} not started: {arguments.deadline:.0f} s have passed", flush=True)
            continue
        start = time.monotonic()
        result = run_row(name, command_of(ROWS[name], arguments.runs), arguments.timeout)
        if result is not None:
            results[name] = {**result, "row_seconds": round(time.monotonic() - start, 1)}
            print_row(name, results)
            arguments.out.write_text(json.dumps(results, indent=1), encoding="utf-8")


def read_results(path: Path) -> dict[str, Result]:
    """Rows of an earlier call."""
    if not path.exists():
        return {}
    found: dict[str, Result] = json.loads(path.read_text(encoding="utf-8"))
    return found


def in_order(names: list[str], results: Mapping[str, Result]) -> list[str]:
    """The rows to run: each after the ones it is measured against, which come along where nobody has measured them."""
    ordered: list[str] = []
    for name in names:
        needed = [base for base in sorted(ROWS[name].bases) if base in names or base not in results]
        ordered += [each for each in (*needed, name) if each not in ordered]
    return ordered


def command_of(row: Row, runs: int) -> list[str]:
    """The whole command line of a row."""
    takes_runs = "offline" in row.words or "serve" in row.words
    return [sys.executable, *row.words, *(("--runs", str(runs)) if takes_runs else ())]


def run_row(name: str, command: list[str], timeout: float) -> Result | None:
    """The JSON object that a benchmark prints last; None if it failed, which is told."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that a row that hangs is ended with all that it started
    )
    try:
        output, _ = process.communicate(timeout=timeout)
        reason = f"exit code {process.returncode}" if process.returncode else None
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        reason = f"no end within {timeout:.0f} s"
    lines = output.strip().splitlines()
    found = next((line for line in reversed(lines) if line.startswith("{")), None)
    if reason is None and found is not None:
        result: Result = json.loads(found)
        return result
    print(f"{name:10s} FAILED: {reason or 'it printed no result'}", flush=True)
    for line in lines[-_TAIL_LINES:]:
        print(f"           | {line[:300]}", flush=True)
    return None


def print_row(name: str, results: Mapping[str, Result]) -> None:
    """One line per figure, then what else is worth seeing."""
    result = results[name]
    for figure in ROWS[name].figures:
        try:
            line = figure.line(result, results)
        except KeyError as missing:
            line = f"{figure.path:36s} not there: {missing}"
        print(f"{name:10s} {line}", flush=True)
    notes = [f"{note} {result[note]}" for note in (*ROWS[name].notes, "seconds", "row_seconds") if note in result]
    print(f"{'':10s}   {'  '.join(notes)}", flush=True)


def _at(result: Result, path: str) -> float:
    value: Any = result
    for key in path.split("."):
        value = value[key]
    return float(value)


def _plain(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


if __name__ == "__main__":
    main()
