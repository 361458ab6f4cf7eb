"""`headrace bench serve`: what HTTP costs beside the same engine without it.

Owns how the server is measured: `headrace serve` in a process of its own on a free port of the loopback, one client
process that sends a whole workload at once as `/generate` with token ids and log-probabilities, and the clock in the
client. Then the same workload offline on the same machine, and the ratio. Both are re-scored.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from headrace.bench.engine_setup import EngineSetup, Prepared, prepare
from headrace.bench.http_load import Load, Loaded
from headrace.bench.http_wire import run_client
from headrace.bench.offline import check_rescoring, measure, whole_settings, workload_report
from headrace.bench.request_style import RequestStyle
from headrace.bench.rescore import NUM_RESCORED, ScoredSequence, evenly_spaced, rescore
from headrace.bench.workloads import ScaleChoice, Workload, WorkloadName, make_workload
from headrace.client.runtime import START_SECONDS, ServerProcess


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to run; `runs` of the client, and as many offline."""

    setup: EngineSetup = EngineSetup()
    workload: WorkloadName = "A"
    scale: ScaleChoice = ScaleChoice()
    style: RequestStyle = RequestStyle()
    runs: int = 3
    num_rescored: int = NUM_RESCORED


def run(options: ServeOptions, on_progress: Callable[[str], None]) -> dict[str, Any]:
    """Run the benchmark; returns the JSON object that is printed last. `on_progress` is told what is running."""
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as scratch:
        prepared = prepare(options.setup, Path(scratch))
        check_rescoring(prepared, options.style, options.num_rescored)
        scale = options.scale.on(is_cpu=prepared.is_cpu)
        workload = make_workload(options.workload, scale=scale, vocab_size=prepared.resolved.model.vocab_size)
        load = Load(
            port=0,
            workload=options.workload,
            scale=scale,
            vocab_size=prepared.resolved.model.vocab_size,
            style=options.style,
            runs=options.runs,
            kept=evenly_spaced(len(workload.prompts), options.num_rescored),
        )
        loaded = _measure_http(prepared, workload, load, on_progress)
        offline = measure(prepared, workload, options.style, options.runs, options.num_rescored, on_progress)
        seconds = statistics.median(loaded.seconds)
        scored = [
            ScoredSequence(workload.prompts[each.index], each.token_ids, each.logprobs, each.mode)
            for each in loaded.kept
        ]
        return {
            "bench": "serve",
            **workload_report(workload, options.style, options.setup, prepared),
            "scale": msgspec.to_builtins(scale),
            "runs": options.runs,
            "seconds": [round(value, 3) for value in loaded.seconds],
            "tokens_per_second": round(workload.num_output_tokens / seconds, 1),
            "offline_seconds": [round(value, 3) for value in offline.seconds],
            "offline_tokens_per_second": round(workload.num_output_tokens / offline.median_seconds, 1),
            "ratio": round(offline.median_seconds / seconds, 4),
            **rescore(prepared.resolved, [*scored, *offline.kept], on_progress),
        }


def _measure_http(prepared: Prepared, workload: Workload, load: Load, on_progress: Callable[[str], None]) -> Loaded:
    settings = whole_settings(prepared, workload)
    on_progress("starting the server")
    with contextlib.closing(ServerProcess(prepared.folder, settings, ("--log-level", "warning"))) as server:
        url = server.wait_started(prepared.resolved.engine.start_timeout + START_SECONDS)
        on_progress(f"{len(workload.prompts)} requests at once over HTTP")
        line = run_client("http_load", msgspec.structs.replace(load, port=int(url.rpartition(":")[2])))
    return msgspec.json.decode(line, type=Loaded)
