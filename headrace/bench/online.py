"""`headrace bench online`: streams under a steady load, and how evenly their tokens come.

Owns how latency is measured: a closed loop (whoever gets an answer asks again) keeps a number of requests in flight
until all are served; each is streamed, and times are taken where a caller of `AsyncEngine` has the piece in hand, or
with `http` a client in a process of its own, to whom `headrace serve` streams each over a connection of its own. The
time to the first token counts from submission; the time between tokens is that between two pieces of one stream, which
hold one token each unless the caller fell behind (`tokens_per_piece`). Nothing of the first token counts there.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from headrace.bench.engine_setup import EngineSetup, Prepared, metric_deltas, prepare
from headrace.bench.http_streams import StreamLoad, StreamTimes
from headrace.bench.http_wire import run_client
from headrace.bench.offline import check_rescoring, workload_report
from headrace.bench.request_style import RequestStyle
from headrace.bench.rescore import NUM_RESCORED, ScoredSequence, evenly_spaced, rescore
from headrace.bench.workloads import CLOSED_LOOP_REQUESTS, CPU_SCALE, WARM_TOKENS, Workload, make_closed_loop
from headrace.client.runtime import START_SECONDS, ServerProcess
from headrace.engine import AsyncEngine, GenerateItem
from headrace.types.errors import InternalError
from headrace.types.sampling_params import LogprobMode, LogprobOptions

_Request = tuple[list[int], int]
"""A prompt, and how many tokens to generate."""

CPU_CONCURRENCY, GPU_CONCURRENCY = 32, 256
CPU_REQUESTS = 100


class OnlineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to run. None for the number of requests, of those in flight, or the divisor of lengths: by the device."""

    setup: EngineSetup = EngineSetup()
    style: RequestStyle = RequestStyle()
    num_requests: int | None = None
    concurrency: int | None = None
    length_divisor: int | None = None
    num_rescored: int = NUM_RESCORED
    http: bool = False


class Arrivals:
    """When tokens came, in seconds: `firsts` since submission, `gaps` since the stream's piece before; and the
    `longest` gap of each stream."""

    def __init__(self) -> None:
        self.firsts = array.array("d")
        self.gaps = array.array("d")
        self.longest = array.array("d")
        self.num_later_tokens = 0
        self.kept: dict[int, ScoredSequence] = {}

    def report(self) -> dict[str, Any]:
        """Percentiles in milliseconds."""
        found: dict[str, Any] = {
            "first_token_ms": _percentiles(self.firsts),
            "between_tokens_ms": _percentiles(self.gaps),
            "longest_gap_ms": _percentiles(self.longest),
        }
        if self.gaps:
            found["tokens_per_piece"] = round(self.num_later_tokens / len(self.gaps), 3)
            between = found["between_tokens_ms"]
            found["p99_over_p50"] = round(between["p99"] / max(between["p50"], 1e-9), 2)
        return found


def run(options: OnlineOptions, on_progress: Callable[[str], None]) -> dict[str, Any]:
    """Run the benchmark; returns the JSON object that is printed last. `on_progress` is told what is running."""
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as scratch:
        prepared = prepare(options.setup, Path(scratch))
        check_rescoring(prepared, options.style, options.num_rescored)
        is_cpu = prepared.is_cpu
        workload = make_closed_loop(
            options.num_requests or (CPU_REQUESTS if is_cpu else CLOSED_LOOP_REQUESTS),
            length_divisor=_length_divisor(options, is_cpu=is_cpu),
            vocab_size=prepared.resolved.model.vocab_size,
        )
        concurrency = options.concurrency or (CPU_CONCURRENCY if is_cpu else GPU_CONCURRENCY)
        settings = prepared.with_defaults(max_running_requests=concurrency, context_length=workload.max_length)
        on_progress(f"starting the engine for {len(workload.prompts)} requests, {concurrency} in flight")
        if options.http:
            seconds, arrivals, metrics = _measure_http(prepared, settings, workload, options, concurrency)
        else:
            with contextlib.closing(AsyncEngine(prepared.folder, progress=False, **settings)) as engine:
                work = _measure(engine, workload, options, concurrency)
                seconds, arrivals, metrics = asyncio.run_coroutine_threadsafe(work, engine.loop).result()
        return {
            "bench": "online",
            **workload_report(workload, options.style, options.setup, prepared),
            "concurrency": concurrency,
            **({"http": True} if options.http else {}),
            "seconds": round(seconds, 3),
            "tokens_per_second": round(workload.num_output_tokens / seconds, 1),
            **arrivals.report(),
            **metrics,
            **rescore(prepared.resolved, list(arrivals.kept.values()), on_progress),
        }


def _measure_http(
    prepared: Prepared, settings: dict[str, Any], workload: Workload, options: OnlineOptions, concurrency: int
) -> tuple[float, Arrivals, dict[str, float]]:
    """The same by a server and its client. Nothing is kept to be re-scored."""
    load = StreamLoad(
        port=0,
        num_requests=len(workload.prompts),
        length_divisor=_length_divisor(options, is_cpu=prepared.is_cpu),
        vocab_size=prepared.resolved.model.vocab_size,
        style=options.style,
        concurrency=concurrency,
    )
    with contextlib.closing(ServerProcess(prepared.folder, settings, ("--log-level", "warning"))) as server:
        url = server.wait_started(prepared.resolved.engine.start_timeout + START_SECONDS)
        line = run_client("http_streams", msgspec.structs.replace(load, port=int(url.rpartition(":")[2])))
    times, arrivals = msgspec.json.decode(line, type=StreamTimes), Arrivals()
    arrivals.firsts.extend(times.firsts)
    arrivals.gaps.extend(times.gaps)
    arrivals.longest.extend(times.longest)
    arrivals.num_later_tokens = times.num_later_tokens
    return times.seconds, arrivals, {}


def _length_divisor(options: OnlineOptions, *, is_cpu: bool) -> int:
    return options.length_divisor or (CPU_SCALE.length_divisor if is_cpu else 1)


async def _measure(
    engine: AsyncEngine, workload: Workload, options: OnlineOptions, concurrency: int
) -> tuple[float, Arrivals, dict[str, float]]:
    """Warm up and serve the workload, on the engine's loop. What exists is frozen first, as `headrace serve` does:
    else each full garbage collection walks it again, in the middle of every stream."""
    warm = [(prompt, WARM_TOKENS) for prompt in workload.strangers()]
    await _serve(engine, warm, options, concurrency, frozenset())
    requests = list(zip(workload.prompts, workload.output_lengths, strict=True))
    kept = frozenset(evenly_spaced(len(requests), options.num_rescored))
    await engine.flush_cache()
    gc.collect()
    gc.freeze()
    try:
        before, start = await engine.metrics(), time.perf_counter()
        arrivals = await _serve(engine, requests, options, concurrency, kept)
        seconds = time.perf_counter() - start
        return seconds, arrivals, metric_deltas(before, await engine.metrics(), 1)
    finally:
        gc.unfreeze()


async def _serve(
    engine: AsyncEngine, requests: list[_Request], options: OnlineOptions, concurrency: int, kept: frozenset[int]
) -> Arrivals:
    """The closed loop: each client takes the next request when its last one has ended."""
    arrivals = Arrivals()
    mode = engine.config.logprob_mode

    async def client(numbers: Iterator[int]) -> None:
        for number in numbers:
            found = await _stream(engine, requests[number], options.style, mode, arrivals)
            if number in kept:
                arrivals.kept[number] = found

    numbers = iter(range(len(requests)))
    tasks = [asyncio.create_task(client(numbers)) for _ in range(concurrency)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return arrivals


async def _stream(
    engine: AsyncEngine, request: _Request, style: RequestStyle, mode: LogprobMode, arrivals: Arrivals
) -> ScoredSequence:
    prompt, num_tokens = request
    item = GenerateItem(
        input_ids=prompt,
        params=style.params(num_tokens),
        logprobs=LogprobOptions(output_mode=mode, num_top=style.top_logprobs),
        stream=True,
    )
    token_ids: list[int] = []
    logprobs: list[float] = []
    submitted, last, longest = time.perf_counter(), 0.0, 0.0
    async for piece in engine.submit(item):
        now = time.perf_counter()
        if not piece.token_ids:
            continue
        if not token_ids:
            arrivals.firsts.append(now - submitted)
        else:
            arrivals.gaps.append(now - last)
            longest = max(longest, now - last)
            arrivals.num_later_tokens += len(piece.token_ids)
        last = now
        token_ids += piece.token_ids
        logprobs += piece.logprobs
    if not len(token_ids) == len(logprobs) == num_tokens:
        raise InternalError("a stream did not bring the tokens that were asked for; the figure would be wrong")
    if longest:
        arrivals.longest.append(longest)
    return ScoredSequence(prompt, token_ids, logprobs, mode)


def _percentiles(seconds: array.array[float]) -> dict[str, float]:
    if not seconds:
        return {}
    p50, p99 = np.percentile(np.frombuffer(seconds), (50, 99)).tolist()
    return {"p50": round(1e3 * p50, 3), "p99": round(1e3 * p99, 3), "max": round(1e3 * max(seconds), 3)}
