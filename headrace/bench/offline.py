"""`headrace bench offline`: generate a whole workload at once, and the same workload with transformers beside it.

Owns how throughput is measured: all requests are known at the start, every one runs to the length asked for with its
log-probabilities returned, and the clock covers prompts and output. The engine runs as users run it, its core in a
process of its own. Prompts are never seen before the run they are timed in: the short warm-up (a few requests, four
tokens each) uses others, and the prefix cache is flushed between runs. Some sequences of the last run are re-scored.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from headrace import Engine
from headrace.bench.engine_setup import EngineSetup, Prepared, describe, metric_deltas, prepare
from headrace.bench.request_style import RequestStyle
from headrace.bench.rescore import NUM_RESCORED, ScoredSequence, evenly_spaced, rescore
from headrace.bench.workloads import WARM_TOKENS, ScaleChoice, Workload, WorkloadName, make_workload
from headrace.types.errors import ConfigError, InternalError
from headrace.types.generation import Generation

_MAX_RUNNING = 512


class OfflineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to run.

    `versus` names what runs beside the engine ("transformers" or nothing); `batch_sizes` are tried for its
    `generate()`, `concurrencies` for its continuous batching, and the best of each counts. `num_rescored` sequences of
    the last run are re-scored by the reference.
    """

    setup: EngineSetup = EngineSetup()
    workload: WorkloadName = "B"
    scale: ScaleChoice = ScaleChoice()
    style: RequestStyle = RequestStyle()
    runs: int = 3
    num_rescored: int = NUM_RESCORED
    versus: str | None = None
    batch_sizes: tuple[int, ...] = ()
    concurrencies: tuple[int, ...] = ()


class Run(msgspec.Struct, frozen=True):
    """One timed run. `milliseconds_per_token` (after the first) is measured for workload C only."""

    seconds: float
    outputs: list[Generation]
    milliseconds_per_token: float | None = None


class Measured(msgspec.Struct, frozen=True):
    """All timed runs of one engine, what it counted per run, and sequences of the last run to be re-scored."""

    seconds: list[float]
    milliseconds_per_token: list[float]
    metrics: dict[str, float]
    kept: list[ScoredSequence]

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)


def run(options: OfflineOptions, on_progress: Callable[[str], None]) -> dict[str, Any]:
    """Run the benchmark; returns the JSON object that is printed last. `on_progress` is told what is running."""
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as scratch:
        prepared = prepare(options.setup, Path(scratch), needs_file=options.versus is not None)
        check_rescoring(prepared, options.style, options.num_rescored)
        scale = options.scale.on(is_cpu=prepared.is_cpu)
        workload = make_workload(options.workload, scale=scale, vocab_size=prepared.resolved.model.vocab_size)
        measured = measure(prepared, workload, options.style, options.runs, options.num_rescored, on_progress)
        report = {
            "bench": "offline",
            **workload_report(workload, options.style, options.setup, prepared),
            "scale": msgspec.to_builtins(scale),
            "runs": options.runs,
            **timing_report(measured, workload),
            **measured.metrics,
            **rescore(prepared.resolved, measured.kept, on_progress),
        }
        if options.versus == "transformers":
            from headrace.bench.versus import time_transformers

            peers = time_transformers(options, prepared, workload, on_progress)
            report["transformers"] = peers
            report.update(_ratios(report, peers))
        return report


def check_rescoring(prepared: Prepared, style: RequestStyle, num_rescored: int) -> None:
    """Raise `ConfigError` for log-probabilities that no re-scoring reproduces.

    Those of a truncated distribution are minus infinity for a token at its edge, which any rounding moves.
    """
    is_truncated = style.top_p < 1.0 or style.top_k > 0 or style.repetition_penalty != 1.0
    if num_rescored and is_truncated and prepared.resolved.engine.logprob_mode == "sampled":
        message = "logprob_mode sampled cannot be re-scored beside top_p or top_k; give --rescored 0"
        raise ConfigError(message, field="logprob_mode")


def measure(
    prepared: Prepared,
    workload: Workload,
    style: RequestStyle,
    num_runs: int,
    num_rescored: int,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Measured:
    """Start an engine, warm it up, time `num_runs` runs of the workload, and end it."""
    on_progress("starting the engine")
    with Engine(model=prepared.folder, progress=False, **whole_settings(prepared, workload)) as engine:
        warm = style.params(WARM_TOKENS)
        engine.generate(input_ids=workload.strangers(), sampling_params=warm, top_logprobs=style.top_logprobs)
        time_once = _time_stream if workload.name == "C" else _time_batch
        before = engine.metrics()
        runs: list[Run] = []
        for number in range(num_runs):
            on_progress(f"headrace, {len(workload.prompts)} requests, run {number + 1} of {num_runs}")
            engine.flush_cache()
            runs.append(time_once(engine, workload, style))
            _check(runs[-1].outputs, workload, style)
            if number:
                runs[-2].outputs.clear()  # only the last run's are looked at again
        after = engine.metrics()
    last = runs[-1].outputs
    kept = evenly_spaced(len(last), num_rescored)
    return Measured(
        [run.seconds for run in runs],
        [run.milliseconds_per_token for run in runs if run.milliseconds_per_token is not None],
        metric_deltas(before, after, num_runs),
        [ScoredSequence(workload.prompts[i], last[i].token_ids, last[i].logprobs, last[i].logprob_mode) for i in kept],
    )


def whole_settings(prepared: Prepared, workload: Workload) -> dict[str, Any]:
    """Engine settings under which all of a workload is sent at once."""
    return prepared.with_defaults(
        max_running_requests=min(_MAX_RUNNING, len(workload.prompts)), context_length=workload.max_length
    )


def workload_report(workload: Workload, style: RequestStyle, setup: EngineSetup, prepared: Prepared) -> dict[str, Any]:
    """The fields of a report that say what was run, and by which engine."""
    return {
        "workload": workload.name,
        "num_requests": len(workload.prompts),
        "num_prompt_tokens": workload.num_prompt_tokens,
        "num_output_tokens": workload.num_output_tokens,
        **style.report(),
        **describe(setup, prepared),
    }


def timing_report(measured: Measured, workload: Workload) -> dict[str, Any]:
    """The fields of a report that say how fast it was: the median run counts, the fastest is the peak."""
    report: dict[str, Any] = {
        "seconds": [round(seconds, 3) for seconds in measured.seconds],
        "median_seconds": round(measured.median_seconds, 3),
        "tokens_per_second": round(workload.num_output_tokens / measured.median_seconds, 1),
        "peak_tokens_per_second": round(workload.num_output_tokens / min(measured.seconds), 1),
    }
    if measured.milliseconds_per_token:
        report["milliseconds_per_token"] = round(statistics.median(measured.milliseconds_per_token), 3)
    return report


def _time_batch(engine: Engine, workload: Workload, style: RequestStyle) -> Run:
    params = [style.params(length) for length in workload.output_lengths]
    start = time.perf_counter()
    outputs = engine.generate(input_ids=workload.prompts, sampling_params=params, top_logprobs=style.top_logprobs)
    return Run(time.perf_counter() - start, outputs)


def _time_stream(engine: Engine, workload: Workload, style: RequestStyle) -> Run:
    """One request; its pieces are joined to what `generate` would have returned."""
    params = style.params(workload.output_lengths[0])
    start = time.perf_counter()
    arrivals: list[float] = []
    pieces: list[Generation] = []
    for piece in engine.stream(input_ids=workload.prompts, sampling_params=params, top_logprobs=style.top_logprobs):
        arrivals.append(time.perf_counter())
        pieces.append(piece)
    whole = msgspec.structs.replace(
        pieces[-1],
        token_ids=[token for piece in pieces for token in piece.token_ids],
        logprobs=[logprob for piece in pieces for logprob in piece.logprobs],
        top_logprobs=[top for piece in pieces for top in piece.top_logprobs],
    )
    per_token = 1e3 * (arrivals[-1] - arrivals[0]) / max(1, len(whole.token_ids) - len(pieces[0].token_ids))
    return Run(arrivals[-1] - start, [whole], per_token)


def _check(outputs: Sequence[Generation], workload: Workload, style: RequestStyle) -> None:
    """Raise `InternalError` unless every request returned all that it was asked for."""
    lengths = workload.output_lengths
    is_whole = [len(output.token_ids) for output in outputs] == lengths
    is_whole &= [len(output.logprobs) for output in outputs] == lengths
    is_whole &= not style.top_logprobs or [len(output.top_logprobs) for output in outputs] == lengths
    if not is_whole:
        raise InternalError("the engine did not return the tokens that were asked for; the figure would be wrong")


def _ratios(report: dict[str, Any], peers: dict[str, Any]) -> dict[str, float]:
    """How many times faster than transformers' best: `ratio` against generate(), `ratio_continuous` the other way."""
    ratios = {"ratio": round(report["tokens_per_second"] / peers["generate"]["tokens_per_second"], 2)}
    continuous = peers.get("continuous_batching", {}).get("tokens_per_second")
    if continuous:
        ratios["ratio_continuous"] = round(report["tokens_per_second"] / continuous, 2)
    return ratios
