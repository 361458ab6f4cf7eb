"""`headrace bench start`: from starting a process to its first token.

Owns how a start is measured: `headrace generate` in a fresh process, a model with random weights, one prompt of token
ids, one new token, no tokenizer; the clock runs from there until the answer is on its standard output. The first
start has an empty folder of built kernels (`cold`), the others find what it left there (`cached`; the median counts).
Phases are what the engine's own log says of them: `name_s=number` and "name number s" of its lines.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from headrace.bench.engine_setup import EngineSetup, Prepared, describe, flag_words, prepare
from headrace.bench.http_wire import TAIL_CHARACTERS
from headrace.types.errors import InternalError

_PROMPT = '{"input_ids": [1, 2, 3, 4]}\n'
_PHASE = re.compile(r"\b([a-z][a-z_]*)(?:_s=([0-9.]+)| ([0-9.]+) s\b)")


class StartOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to start. `runs` starts with kernels cached follow one without."""

    setup: EngineSetup = EngineSetup()
    runs: int = 3


class TimedStart(msgspec.Struct, frozen=True):
    """One start: seconds to the first token, and those of its phases."""

    seconds: float
    phases: dict[str, float]


def run(options: StartOptions, on_progress: Callable[[str], None]) -> dict[str, Any]:
    """Run the benchmark; returns the JSON object that is printed last. `on_progress` is told what is running."""
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as scratch:
        prepared = prepare(options.setup, Path(scratch), dummy=True)
        kernels = Path(scratch) / "kernels"
        on_progress("a start with no kernels built")
        cold = _start(prepared, kernels)
        cached = []
        for number in range(options.runs):
            on_progress(f"a start with kernels cached, {number + 1} of {options.runs}")
            cached.append(_start(prepared, kernels))
        median = statistics.median_low([start.seconds for start in cached])
        return {
            "bench": "start",
            **describe(options.setup, prepared),
            "runs": options.runs,
            "cold_seconds": round(cold.seconds, 3),
            "cached_seconds": round(median, 3),
            "seconds": [round(start.seconds, 3) for start in cached],
            "cold_phases": cold.phases,
            "cached_phases": next(start.phases for start in cached if start.seconds == median),
            "num_built_files": sum(path.is_file() for path in kernels.rglob("*")),
        }


def _start(prepared: Prepared, kernels: Path) -> TimedStart:
    """Start once. Kernel libraries that know of no such folder are pointed to it by their own variable."""
    settings = {**prepared.settings, "kernel_cache": str(kernels)}
    command = [sys.executable, "-m", "headrace", "generate", str(prepared.folder), "--jsonl", "-", "--json"]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(kernels / "triton")}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        start = time.perf_counter()
        with subprocess.Popen(
            [*command, "--max-new-tokens", "1", "--ignore-eos", *flag_words(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(_PROMPT)
            process.stdin.close()
            answer = process.stdout.readline()
            seconds = time.perf_counter() - start
        log.seek(0)
        lines = log.read().splitlines()
    if process.returncode != 0 or '"token_ids"' not in answer:
        raise InternalError(f"the process did not generate: {' '.join(lines)[-TAIL_CHARACTERS:]}")
    return TimedStart(seconds, phases_of(lines))


def phases_of(lines: Sequence[str]) -> dict[str, float]:
    """Seconds by name, from log lines; a name said twice counts once, with what was said last."""
    found = (match for line in lines for match in _PHASE.finditer(line))
    return {match[1]: float(match[2] or match[3]) for match in found}
