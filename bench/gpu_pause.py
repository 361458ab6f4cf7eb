"""What running requests see of weight updates on one GPU, and how long released memory takes to come back.

    python bench/gpu_pause.py --shape qwen3-8b --parts pause,throughput,release,copy --out pause.json

    pause        the longest gap between two tokens of a request around a shadow update, less a normal step
    throughput   tokens a second with a full shadow update every 2 s, over those without
    release      weights and KV cache released and resumed, without a copy of the weights
    copy         the same with a copy on the host, and how fast it comes back

256 requests run, with an update every 2 s and without, in turns, each time from the beginning. The tensors of the
updates are this process's, on the same GPU as the core's. All requests are past their prompts before a run is looked
at and none ends before it is over, so each step brings a token of each: `disturbed` says what was otherwise.

`step` gaps are between steps that the core completes, as a process of its own sees them in the core's pulse, to 0.2 ms
(`longest_look_ms` is the latest that it was). `request` gaps are between messages that this process gets for a request;
the updates are its own calls, which make it late at times. Nobody reads the streams: a process that makes objects of
25,000 tokens a second falls behind by itself, and then gets the tokens of many steps at once. `core_ms` is the core's
own account of a pause.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_update import tensors_like
from step_watch import Arrivals, StepWatch, gaps_of, longest, noted_arrivals, spread

from headrace import Engine, SamplingParams
from headrace.bench.models import write_config

PROMPT_TOKENS = 48
FIRST_TOKENS = 16  # of each request, before anything is counted
SPARE_TOKENS = 200  # of each request: the first ones have some when the last one begins
FIRST_UPDATE_S, EVERY_S = 1.0, 2.0
AFTER_S = 0.05  # an update is still felt
START_S = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-8b")
    parser.add_argument("--parts", default="pause,throughput,release,copy")
    parser.add_argument("--seconds", type=float, default=12.0, help="of each of the four runs of requests, even")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--steps-per-second", type=int, default=120, help="at most: KV cache is there for as many")
    parser.add_argument("--device", default="cuda", help="cpu: pause and throughput only, to try the script")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    results: dict[str, Any] = {"shape": arguments.shape}
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_config(Path(scratch) / arguments.shape, arguments.shape)
        if {"pause", "throughput"} & set(parts):
            results |= beside_requests(folder, arguments)
        for part in ("release", "copy"):
            if part in parts:
                pool = {"max_running_requests": 256, "kv_pool_tokens": 1 << 18, "cuda_graphs": False}
                with start(folder, memory_saver=True, keep_weights_copy=part == "copy", **pool) as engine:
                    results[part] = released(engine, has_copy=part == "copy")
    results["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    text = json.dumps(results)
    print(text, flush=True)
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")


def start(folder: Path, **settings: Any) -> Engine:
    return Engine(folder, inprocess=False, load_format="dummy", skip_tokenizer_init=True, **settings)


def beside_requests(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    num, seconds = arguments.requests, arguments.seconds
    limit = int(arguments.steps_per_second * seconds) + SPARE_TOKENS
    pool = num * (PROMPT_TOKENS + limit + 32)
    settings = {"max_running_requests": num, "kv_pool_tokens": pool, "device": arguments.device}
    numbers = itertools.count()
    with start(folder, **settings) as engine, StepWatch(engine) as watch:
        tensors = tensors_like(engine, arguments.device)

        def update() -> float:
            version = str(next(numbers))
            return engine.update_weights_from_tensor(tensors, version, mode="shadow", in_flight="keep").pause_ms

        update()
        runs = Runs(engine, watch, num, limit)
        runs.run(min(2.0, seconds), update)  # not counted
        quiet, updated = [], []
        for _ in range(2):
            quiet.append(runs.run(seconds))
            updated.append(runs.run(seconds, update))
    return summary(quiet, updated) | {"quiet": quiet, "updated": updated}


def summary(quiet: Sequence[dict[str, Any]], updated: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures: pauses of all updates, and the ratio of the medians."""
    step_ms = statistics.median(run["step"]["median_ms"] for run in quiet)
    pauses = {
        "step": [gap - step_ms for run in updated for gap in run["gaps_ms"]],
        "request": [gap - step_ms for run in updated for gap in run["request_gaps_ms"]],
        "core": [pause for run in updated for pause in run["core_ms"]],
    }
    rates = [statistics.median(run["tokens_per_s"] for run in each) for each in (updated, quiet)]
    return {
        "step_ms": step_ms,
        "pause_ms": max(pauses["step"], default=0.0),
        "pauses_ms": {name: middle_and_worst(each) for name, each in pauses.items()},
        "throughput": rates[0] / rates[1],
    }


def middle_and_worst(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "worst": max(values)} if values else {}


class Runs:
    """Runs of `num` requests that may have up to `limit` tokens each."""

    def __init__(self, engine: Engine, watch: StepWatch, num: int, limit: int) -> None:
        self._engine, self._watch, self._num, self._limit = engine, watch, num, limit
        # Of many lengths, so that not all need a page in the same step.
        self._prompts = [[(7 * i + at) % 500 + 1 for at in range(PROMPT_TOKENS - i % 16)] for i in range(num)]

    def run(self, seconds: float, update: Callable[[], float] | None = None) -> dict[str, Any]:
        """Requests for so long, once all decode, with an update every 2 s if there is one."""
        engine = self._engine
        params = SamplingParams(temperature=1.0, max_new_tokens=self._limit, ignore_eos=True)
        with noted_arrivals() as arrivals:
            stream = engine.stream(input_ids=self._prompts, sampling_params=params)
            next(stream)  # starts all of them; then nobody reads
            self._wait_until(lambda: len(arrivals) == self._num and min(map(len, arrivals.values())) >= FIRST_TOKENS)
            before = engine.metrics()
            gc.collect()
            gc.disable()  # a collection here would look like a message that comes late
            begin, updates, core_ms = time.monotonic(), list[tuple[float, float]](), list[float]()
            while self._goes_on(begin + seconds, before):
                if update is not None and time.monotonic() >= begin + FIRST_UPDATE_S + EVERY_S * len(updates):
                    since = time.monotonic()
                    core_ms.append(update())
                    updates.append((since, time.monotonic() + AFTER_S))
                time.sleep(0.005)
            end = time.monotonic()
            gc.enable()
            after = engine.metrics()
            stream.close()
        self._wait_until(lambda: engine.metrics()["num_running"] == 0)
        engine.flush_cache()  # each run begins alike
        found = self._figures((begin, end), arrivals, updates)
        return found | {"core_ms": core_ms, "disturbed": disturbances(before, after, self._num)}

    def _goes_on(self, until: float, before: dict[str, float]) -> bool:
        """Whether there is time left, and tokens."""
        num_steps = self._watch.page.read().num_steps - before["num_steps"]
        return time.monotonic() < until and num_steps < self._limit - SPARE_TOKENS

    def _figures(
        self, window: tuple[float, float], arrivals: Arrivals, updates: Sequence[tuple[float, float]]
    ) -> dict[str, Any]:
        stamps, longest_look = self._watch.take(*window)
        steps = gaps_of(stamps, window)
        requests = sorted(gap for times in arrivals.values() for gap in gaps_of(times, window))
        return {
            "seconds": window[1] - window[0],
            "tokens_per_s": self._num * len(steps) / (steps[-1][0] - steps[0][0] + 1e-3 * steps[0][1]),
            "step": spread([gap for _, gap in steps]),
            "request": spread([gap for _, gap in requests]),
            "longest_look_ms": longest_look,
            "gaps_ms": [longest(steps, span) for span in updates],
            "request_gaps_ms": [longest(requests, span) for span in updates],
            "updates_ms": [1e3 * (until - AFTER_S - since) for since, until in updates],
        }

    def _wait_until(self, is_so: Callable[[], bool]) -> None:
        until = time.monotonic() + START_S
        while not is_so():
            if time.monotonic() > until:
                raise SystemExit(f"the requests did not come to it within {START_S:g} s")
            time.sleep(0.01)


def disturbances(before: dict[str, float], after: dict[str, float], num: int) -> dict[str, float]:
    """What a run had beside tokens of all its requests; nothing, if all is well."""
    names = ("num_prefill_tokens", "num_finished", "num_preemptions", "num_failed_steps", "num_waiting")
    found = {name: after[name] - before[name] for name in names}
    found["num_not_running"] = num - after["num_running"]
    return {name: count for name, count in found.items() if count}


def released(engine: Engine, *, has_copy: bool) -> dict[str, Any]:
    """Medians of three times, and what of the device was free in between."""
    tensors, spent = tensors_like(engine, "cuda"), []
    gigabytes = sum(tensor.nbytes for _, tensor in tensors) / 1e9
    free = []
    for number in range(4):
        begin = time.perf_counter()
        engine.release_memory_occupation(["weights", "kv_cache"])
        middle = time.perf_counter()
        free.append(torch.cuda.mem_get_info()[0] / 1e9)
        again = time.perf_counter()
        engine.resume_memory_occupation(["kv_cache"])
        kv_cache = time.perf_counter()
        engine.resume_memory_occupation(["weights"], restore="copy" if has_copy else "await")
        end = time.perf_counter()
        free.append(torch.cuda.mem_get_info()[0] / 1e9)
        if not has_copy:
            engine.update_weights_from_tensor(tensors, version=str(number))
        spent.append((middle - begin, kv_cache - again, end - kv_cache))
    release, kv_cache, weights = (statistics.median(each[part] for each in spent[1:]) for part in range(3))
    found = {"release_ms": 1e3 * release, "resume_kv_ms": 1e3 * kv_cache, "resume_weights_ms": 1e3 * weights}
    return {**found, "gigabytes": gigabytes, "weights_gb_per_s": gigabytes / weights, "free_gb": free}


if __name__ == "__main__":
    main()
