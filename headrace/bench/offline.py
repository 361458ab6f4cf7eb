"""`headrace bench offline`: generate a whole workload at once, and the same workload with transformers beside it.

Owns how throughput is measured: all requests are known at the start, every one runs to the length asked for, and the
clock covers prompts and output. The engine runs as users run it, its core in a process of its own. Prompts are never
seen before the run they are timed in: warm-up uses others, and the prefix cache is flushed between runs.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from headrace import Engine
from headrace.bench.models import write_config, write_model
from headrace.bench.workloads import Scale, Workload, WorkloadName, make_workload
from headrace.config import ModelSpec
from headrace.types.errors import InternalError
from headrace.types.sampling_params import SamplingParams


class OfflineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to run. `model` is a folder or hub id; None makes a model of `shape` on the spot.

    `versus` names what runs beside the engine ("transformers" or nothing); `batch_sizes` are tried for its
    `generate()`, `concurrencies` for its continuous batching, and the best of each counts.
    """

    workload: WorkloadName = "B"
    scale: Scale = Scale()
    model: str | None = None
    shape: str = "small"
    versus: str | None = None
    runs: int = 3
    num_threads: int = 1
    dtype: str = "float32"
    batch_sizes: tuple[int, ...] = ()
    concurrencies: tuple[int, ...] = ()
    engine: dict[str, Any] = {}


class Timing(msgspec.Struct, frozen=True):
    """One way to run the workload: the seconds of each run.

    `milliseconds_per_token` (after the first) is measured for workload C only.
    """

    seconds: list[float]
    milliseconds_per_token: list[float] = []

    @property
    def median_seconds(self) -> float:
        """The median run."""
        return statistics.median(self.seconds)


def run_offline(options: OfflineOptions, on_progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Run the benchmark; returns the JSON object that is printed last. `on_progress` is told what is running.

    Both engines' torch threads sleep while they wait, unless the caller's `OMP_WAIT_POLICY` says otherwise: threads
    that spin make the figures depend on whatever else runs on the machine. Set before torch is loaded.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as scratch:
        folder = _model_folder(options, Path(scratch))
        vocab_size = ModelSpec.from_folder(folder).vocab_size if folder.is_dir() else None
        workload = make_workload(options.workload, scale=options.scale, vocab_size=vocab_size)
        on_progress(f"headrace, {len(workload.prompts)} requests")
        timing, metrics = _time_engine(options, workload, str(folder))
        report = _report(options, workload, timing, metrics)
        if options.versus == "transformers":
            from headrace.bench.versus import time_transformers

            peers = time_transformers(options, workload, str(folder), on_progress)
            report["transformers"] = peers
            report.update(_ratios(report, peers))
        return report


def _model_folder(options: OfflineOptions, scratch: Path) -> Path:
    if options.model is not None:
        return Path(options.model)
    if options.engine.get("load_format") == "dummy" and options.versus is None:
        return write_config(scratch / options.shape, options.shape)
    return write_model(scratch / options.shape, options.shape)


def _time_engine(options: OfflineOptions, workload: Workload, folder: str) -> tuple[Timing, dict[str, float]]:
    settings = {
        "skip_tokenizer_init": True,
        "dtype": options.dtype,
        "num_threads": options.num_threads,
        "max_running_requests": min(512, max(1, len(workload.prompts))),
        "context_length": workload.max_length,
        **options.engine,
    }
    with Engine(model=folder, **settings) as engine:
        _warm_up(engine, workload)
        time_once = _time_stream if workload.name == "C" else _time_batch
        before = engine.metrics()
        timing = Timing([])
        for _ in range(options.runs):
            engine.flush_cache()
            timing = time_once(engine, workload, timing)
        after = engine.metrics()
    return timing, {name: after[name] - before.get(name, 0.0) for name in after if name.startswith("num_")}


def _warm_up(engine: Engine, workload: Workload) -> None:
    """Run a few requests of the workload's shape whose prompts share nothing with it."""
    num_warm = min(8, len(workload.prompts))
    prompts = [[(token + 1) % 1000 for token in prompt] for prompt in workload.prompts[:num_warm]]
    engine.generate(input_ids=prompts, sampling_params=[_sampling(4) for _ in prompts])


def _sampling(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=num_tokens, temperature=1.0, ignore_eos=True, seed=None)


def _time_batch(engine: Engine, workload: Workload, timing: Timing) -> Timing:
    params = [_sampling(length) for length in workload.output_lengths]
    start = time.perf_counter()
    outputs = engine.generate(input_ids=workload.prompts, sampling_params=params)
    seconds = time.perf_counter() - start
    _check_lengths([len(output.token_ids) for output in outputs], workload)
    return Timing([*timing.seconds, seconds])


def _time_stream(engine: Engine, workload: Workload, timing: Timing) -> Timing:
    start = time.perf_counter()
    arrivals: list[float] = []
    num_tokens = 0
    for piece in engine.stream(input_ids=workload.prompts, sampling_params=_sampling(workload.output_lengths[0])):
        num_tokens += len(piece.token_ids)
        arrivals.append(time.perf_counter())
    _check_lengths([num_tokens], workload)
    per_token = 1e3 * (arrivals[-1] - arrivals[0]) / (num_tokens - 1)
    return Timing([*timing.seconds, arrivals[-1] - start], [*timing.milliseconds_per_token, per_token])


def _check_lengths(lengths: Sequence[int], workload: Workload) -> None:
    if list(lengths) != workload.output_lengths:
        raise InternalError("the engine did not return the tokens that were asked for; the figure would be wrong")


def _report(options: OfflineOptions, workload: Workload, timing: Timing, metrics: dict[str, float]) -> dict[str, Any]:
    report: dict[str, Any] = {
        "bench": "offline",
        "workload": workload.name,
        "model": options.model or options.shape,
        "scale": msgspec.to_builtins(options.scale),
        "num_requests": len(workload.prompts),
        "num_prompt_tokens": workload.num_prompt_tokens,
        "num_output_tokens": workload.num_output_tokens,
        "num_threads": options.num_threads,
        "dtype": options.dtype,
        "omp_wait_policy": os.environ["OMP_WAIT_POLICY"].lower(),
        "runs": options.runs,
        "seconds": round(timing.median_seconds, 3),
        "tokens_per_second": round(workload.num_output_tokens / timing.median_seconds, 1),
        "num_steps": metrics.get("num_steps", 0.0) / options.runs,
        "num_cached_tokens": metrics.get("num_cached_tokens", 0.0) / options.runs,
    }
    if timing.milliseconds_per_token:
        report["milliseconds_per_token"] = round(statistics.median(timing.milliseconds_per_token), 3)
    return report


def _ratios(report: dict[str, Any], peers: dict[str, Any]) -> dict[str, float]:
    """How many times faster than transformers' best: `ratio` against generate(), `ratio_continuous` the other way."""
    ratios = {"ratio": round(report["tokens_per_second"] / peers["generate"]["tokens_per_second"], 2)}
    continuous = peers.get("continuous_batching", {}).get("tokens_per_second")
    if continuous:
        ratios["ratio_continuous"] = round(report["tokens_per_second"] / continuous, 2)
    return ratios
