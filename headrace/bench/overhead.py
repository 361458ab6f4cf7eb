"""`headrace bench overhead`: what a step costs when the model costs nothing.

Owns how overhead is measured: everything `headrace serve` builds is real (front, link, core process, scheduler, prefix
cache) but the executor, which answers at once. Clients keep a fixed number of requests running and `num_waiting` more
queued: whoever gets an answer asks again. Prompts are all different, log-probabilities and stop ids are on. What counts
is what callers received within the measured time; steps are the core's own count.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from headrace.bench.http_client import MAX_WARM_UP_SECONDS, STOP_TOKEN_ID, SteadyLoad, output_lengths, unique_prompt
from headrace.bench.http_wire import run_client
from headrace.bench.models import write_config
from headrace.engine import AsyncEngine, GenerateItem
from headrace.types.errors import InternalError
from headrace.types.sampling_params import SamplingParams

STEP_MICROSECONDS = 200.0
TOKEN_MICROSECONDS = 4.0
_FILL_SECONDS = 120.0
_NEARLY = 0.95


class OverheadOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure; `engine` are further engine settings."""

    batch_sizes: tuple[int, ...] = (16, 64, 256, 1024)
    num_waiting: int = 10_000
    prompt_length: int = 512
    output_length: int = 256
    seconds: float = 5.0
    http_concurrency: int = 256
    stream: bool = False
    engine: dict[str, Any] = {}


class Window(msgspec.Struct, frozen=True):
    """What happened within the measured time."""

    seconds: float
    num_tokens: int
    num_steps: float
    num_running: int
    num_waiting: int


def run(options: OverheadOptions, on_progress: Callable[[str], None]) -> dict[str, Any]:
    """Run the benchmark; returns the JSON object that is printed last. `on_progress` is told what is running."""
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as scratch:
        folder = write_config(Path(scratch), "small")
        windows: dict[int, Window] = {}
        for size in options.batch_sizes:
            on_progress(f"{size} running, {options.num_waiting} waiting")
            windows[size] = _measure(options, folder, size)
        report = _report(options, windows)
        if options.http_concurrency:
            on_progress(f"{options.http_concurrency} requests at once over HTTP")
            report.update(_measure_http(options, folder))
        return report


def _start(options: OverheadOptions, folder: Path, num_running: int) -> AsyncEngine:
    settings: dict[str, Any] = {
        "load_format": "dummy",
        "max_running_requests": num_running,
        "max_num_batched_tokens": max(8192, 8 * num_running),
        "kv_pool_tokens": 2 * num_running * (options.prompt_length + 2 * options.output_length),
        **options.engine,
    }
    return AsyncEngine(folder, executor="free", skip_tokenizer_init=True, progress=False, **settings)


def _measure(options: OverheadOptions, folder: Path, num_running: int) -> Window:
    engine = _start(options, folder, num_running)
    try:
        return asyncio.run_coroutine_threadsafe(_drive(engine, options, num_running), engine.loop).result()
    finally:
        engine.close()


async def _drive(engine: AsyncEngine, options: OverheadOptions, num_running: int) -> Window:
    """Keep the engine full, on its own loop, and count what comes back."""
    num_clients = num_running + options.num_waiting
    lengths = output_lengths(options.output_length)
    delivered = [0]

    async def client(number: int) -> None:
        while True:
            prompt = unique_prompt(number, options.prompt_length)
            number += num_clients
            params = SamplingParams(max_new_tokens=next(lengths), stop_token_ids=(STOP_TOKEN_ID,))
            output = await engine.submit(GenerateItem(input_ids=prompt, params=params)).result()
            if len(output.logprobs) != params.max_new_tokens:
                raise InternalError("a request did not return the tokens that were asked for")
            delivered[0] += len(output.token_ids)

    clients = [asyncio.create_task(client(number)) for number in range(num_clients)]
    try:
        await _until_full(engine, num_running, clients)
        await asyncio.sleep(min(MAX_WARM_UP_SECONDS, options.seconds))
        before, start, count = await engine.status(), time.perf_counter(), delivered[0]
        await asyncio.sleep(options.seconds)
        after, seconds = await engine.status(), time.perf_counter() - start
        _check(clients)
        num_steps = after.metrics["num_steps"] - before.metrics["num_steps"]
        return Window(seconds, delivered[0] - count, num_steps, after.num_running, after.num_waiting)
    finally:
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


async def _until_full(engine: AsyncEngine, num_running: int, clients: list[asyncio.Task[None]]) -> None:
    """Wait until nearly every slot is taken: some have always just ended."""
    deadline = time.monotonic() + _FILL_SECONDS
    while (await engine.status()).num_running < _NEARLY * num_running:
        _check(clients)
        if time.monotonic() > deadline:
            raise InternalError(f"the engine never ran {num_running} requests at once")
        await asyncio.sleep(0.05)


def _check(clients: list[asyncio.Task[None]]) -> None:
    """Raise what ended a client: none ends by itself."""
    for task in clients:
        if task.done():
            task.result()


def _report(options: OverheadOptions, windows: dict[int, Window]) -> dict[str, Any]:
    per_step = {size: 1e6 * w.seconds / max(1.0, w.num_steps) for size, w in windows.items()}
    rates = {size: w.num_tokens / w.seconds for size, w in windows.items()}
    return {
        "bench": "overhead",
        "prompt_length": options.prompt_length,
        "output_length": options.output_length,
        "num_waiting": {str(size): w.num_waiting for size, w in windows.items()},
        "num_running": {str(size): w.num_running for size, w in windows.items()},
        "tokens_per_second": {str(size): round(rate) for size, rate in rates.items()},
        "microseconds_per_step": {str(size): round(value, 1) for size, value in per_step.items()},
        "microseconds_per_token": {str(size): round(1e6 / max(rate, 1e-9), 3) for size, rate in rates.items()},
        "bound_microseconds_per_step": {str(size): STEP_MICROSECONDS + TOKEN_MICROSECONDS * size for size in windows},
        "within_bound": all(per_step[size] <= STEP_MICROSECONDS + TOKEN_MICROSECONDS * size for size in windows),
    }


def _measure_http(options: OverheadOptions, folder: Path) -> dict[str, Any]:
    """Serve the same engine and let a client in another process count the tokens it receives."""
    from headrace.server import serve

    engine = _start(options, folder, options.http_concurrency)
    try:
        server = asyncio.run_coroutine_threadsafe(serve(engine), engine.loop).result()
        before = _front_use(engine)
        load = SteadyLoad(
            port=server.port,
            concurrency=options.http_concurrency,
            prompt_length=options.prompt_length,
            output_length=options.output_length,
            seconds=options.seconds,
            stream=options.stream,
        )
        counted = json.loads(run_client("http_client", load))
        seconds, num_tokens = (then - now for then, now in zip(_front_use(engine), before, strict=True))
    finally:
        engine.close()
    return {
        "http_tokens_per_second": round(counted["num_tokens"] / counted["seconds"]),
        "http_requests_per_second": round(counted["num_requests"] / counted["seconds"], 1),
        "http_front_cpu_microseconds_per_token": round(1e6 * seconds / max(1.0, num_tokens), 3),
        "http_concurrency": options.http_concurrency,
        "http_stream": options.stream,
    }


def _front_use(engine: AsyncEngine) -> tuple[float, float]:
    """CPU seconds of the front's event loop so far, which other load on the machine moves far less than the clock, and
    the tokens that it was told of."""

    async def used() -> tuple[float, float]:
        return time.thread_time(), (await engine.metrics())["num_generated_tokens"]

    return asyncio.run_coroutine_threadsafe(used(), engine.loop).result()
