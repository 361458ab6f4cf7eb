"""Where the time of a steady decode step goes on a CUDA device: a table per case, then one line of JSON.

    python bench/gpu_breakdown.py [--shape qwen3-0.6b] [--cases b512,a256,c1] [--counters] [--engine JSON] [--out FILE]

    b512   512 running, 64 prompts of 512 tokens shared by 8 each, 320 tokens into their outputs
    a256   256 running, prompts of 562 tokens, nothing shared, 320 tokens into their outputs
    c1     1 running, a prompt of 128 tokens, 256 into its output

Two engines per case. One as users run it, its core in a process of its own, without a profiler: milliseconds per step,
and the idle share by the engine's own device events (`idle_share`: between steps that were enqueued in time;
`wall_idle_share`: what the steps' device time leaves of the wall clock). One in this process under torch's profiler:
device time by class of kernel, from about 50 steps. The profiler and the shared interpreter slow the host down, so
`profiled_idle_share` (time without any kernel or copy) is an upper bound. `--counters` leaves the profiler out.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import importlib
import json
import pkgutil
import random
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from headrace import Engine
from headrace.bench.engine_setup import EngineSetup, describe, prepare
from headrace.types.generation import Generation
from headrace.types.sampling_params import SamplingParams

NUM_PROFILED_STEPS = 50
NUM_COUNTED_STEPS = 200
_POLL_SECONDS = 0.01
_STEADY_SECONDS = 300.0
CLASSES = ("attention", "GEMM", "norm, rope, store", "sampling", "copies", "other")


@dataclass(frozen=True)
class Case:
    """`num_rows` running, groups of `group_size` with the same prompt; measured `num_before` tokens into the output."""

    num_rows: int
    prompt_length: int
    group_size: int
    num_before: int

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Prompt-major, as GRPO sends them."""
        source = random.Random(self.num_rows)
        heads = [self._prompt(source, vocab_size) for _ in range(self.num_rows // self.group_size)]
        return [head for head in heads for _ in range(self.group_size)]

    def _prompt(self, source: random.Random, vocab_size: int) -> list[int]:
        return [source.randrange(vocab_size) for _ in range(self.prompt_length)]


CASES = {"b512": Case(512, 512, 8, 320), "a256": Case(256, 562, 1, 320), "c1": Case(1, 128, 1, 256)}

Span = tuple[str, float, float]
"""Name, start and duration of something on the device, in microseconds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--counters", action="store_true", help="no profiler")
    parser.add_argument("--engine", type=json.loads, default={}, help="engine settings, as a JSON object")
    parser.add_argument("--scale", type=int, default=1, help="divide rows and lengths by this: a smoke test")
    parser.add_argument("--out", type=Path, help="write the JSON object here too")
    arguments = parser.parse_args()
    setup = EngineSetup(shape=arguments.shape, engine=arguments.engine)
    report: dict[str, Any] = {"bench": "breakdown"}
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as scratch:
        prepared = prepare(setup, Path(scratch))
        report |= describe(setup, prepared)
        for name in arguments.cases.split(","):
            case = scaled(CASES[name], arguments.scale)
            settings = prepared.with_defaults(
                max_running_requests=case.num_rows, context_length=case.prompt_length + case.num_before + 1024
            )
            found = count_steps(case, str(prepared.folder), settings)
            if not arguments.counters:
                found |= profile_steps(case, str(prepared.folder), settings)
            report[name] = found
            print_case(name, found)
    text = json.dumps(report)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    print(text, flush=True)


def scaled(case: Case, divisor: int) -> Case:
    """A smaller one of the same shape."""
    rows = max(case.group_size, case.num_rows // divisor)
    return Case(rows, max(8, case.prompt_length // divisor), case.group_size, max(8, case.num_before // divisor))


def count_steps(case: Case, folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds per step and the idle share, by the engine's own account."""
    with Engine(model=folder, **settings) as engine, Steady(engine, case) as steady:
        before, start = engine.metrics(), time.perf_counter()
        steady.wait_steps(NUM_COUNTED_STEPS)
        after, seconds = engine.metrics(), time.perf_counter() - start
        steady.check()
    num_steps = after["num_steps"] - before["num_steps"]
    found: dict[str, Any] = {"num_steps": num_steps, "ms_per_step": round(1e3 * seconds / num_steps, 4)}
    found["tokens_per_second"] = round((after["num_decode_tokens"] - before["num_decode_tokens"]) / seconds, 1)
    if "gpu_busy_s" in after:
        busy, idle = (after[name] - before[name] for name in ("gpu_busy_s", "gpu_idle_s"))
        found["busy_ms_per_step"] = round(1e3 * busy / num_steps, 4)
        found["idle_share"] = round(idle / max(1e-12, busy + idle), 5)
        found["wall_idle_share"] = round(1.0 - busy / seconds, 5)
    return found


def profile_steps(case: Case, folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Device time by class of kernel, in an engine of this process."""
    from torch.profiler import ProfilerActivity, profile

    with Engine(model=folder, inprocess=True, **settings) as engine:
        activities = [ProfilerActivity.CUDA] if engine.resolved.device != "cpu" else [ProfilerActivity.CPU]
        with profile(activities=activities):  # its first start takes seconds, in which rows would end
            pass
        after, before, profiler = _profile_case(engine, case, activities)
    with tempfile.TemporaryDirectory() as folder_name:
        trace = Path(folder_name) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        spans = device_spans(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"])
    return summarise(spans, after["num_steps"] - before["num_steps"], kernel_classes())


def _profile_case(engine: Engine, case: Case, activities: list[Any]) -> tuple[dict[str, float], dict[str, float], Any]:
    from torch.profiler import profile

    with Steady(engine, case) as steady:
        with profile(activities=activities) as profiler:
            before = engine.metrics()
            steady.wait_steps(NUM_PROFILED_STEPS)
            after = engine.metrics()
        steady.check()
    return after, before, profiler


class Steady:
    """Inside the block all rows of a case decode, `num_before` tokens into their outputs, and nothing else runs."""

    def __init__(self, engine: Engine, case: Case) -> None:
        self._engine = engine
        self._case = case
        self._future: concurrent.futures.Future[list[Generation]]

    def __enter__(self) -> Steady:
        engine, case = self._engine, self._case
        prompts = case.prompts(engine.resolved.model.vocab_size)
        longest = engine.resolved.context_length - case.prompt_length
        params = SamplingParams(max_new_tokens=longest, temperature=1.0, ignore_eos=True)
        work = engine.asynchronous.generate(input_ids=prompts, sampling_params=params)
        self._future = asyncio.run_coroutine_threadsafe(work, engine.asynchronous.loop)
        self._wait("num_generated_tokens", case.num_rows * case.num_before)
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.abort(all=True)
        self._future.result()

    def wait_steps(self, num_steps: int) -> None:
        """Until so many more steps have completed."""
        self._wait("num_steps", num_steps + self._engine.metrics()["num_steps"])

    def check(self) -> None:
        """Raise unless all rows are still running."""
        num_running = self._engine.metrics()["num_running"]
        if num_running != self._case.num_rows:
            raise RuntimeError(f"{num_running:.0f} rows were running at the end, not {self._case.num_rows}")

    def _wait(self, counter: str, value: float) -> None:
        deadline = time.monotonic() + _STEADY_SECONDS
        while self._engine.metrics()[counter] < value:
            if self._future.done():
                self._future.result()
                raise RuntimeError("the requests ended before they were measured")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{counter} did not reach {value:.0f} in {_STEADY_SECONDS:.0f} s")
            time.sleep(_POLL_SECONDS)


def device_spans(events: Iterable[Mapping[str, Any]]) -> list[Span]:
    """What ran on the device, from the events of a Chrome trace."""
    kinds = {"kernel": "", "gpu_memcpy": "copy: ", "gpu_memset": "copy: "}
    return [
        (kinds[event["cat"]] + event["name"], float(event["ts"]), float(event["dur"]))
        for event in events
        if event.get("ph") == "X" and event.get("cat") in kinds
    ]


def summarise(spans: list[Span], num_steps: float, classes: Mapping[str, str]) -> dict[str, Any]:
    """Microseconds per step by class and the longest kernels; the share of the time in which nothing ran."""
    by_class: dict[str, float] = defaultdict(float)
    by_name: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for name, duration in own_times(spans):
        by_class[classify(name, classes)] += duration
        total, count = by_name[name]
        by_name[name] = (total + duration, count + 1)
    longest = sorted(by_name.items(), key=lambda item: -item[1][0])[:16]
    return {
        "num_profiled_steps": num_steps,
        "kernels_per_step": round(len(spans) / num_steps, 1),
        "us_per_step": {name: round(by_class[name] / num_steps, 2) for name in CLASSES},
        "profiled_idle_share": round(idle_share(spans), 5),
        "kernels": [
            {"name": name[:120], "us_per_step": round(total / num_steps, 2), "calls_per_step": round(n / num_steps, 2)}
            for name, (total, n) in longest
        ],
    }


def own_times(spans: list[Span]) -> Iterator[tuple[str, float]]:
    """Name and duration of each span less what an earlier one covers: a launch that may begin before the one ahead ends
    is there early, but only waits."""
    reached = float("-inf")
    for name, start, duration in sorted(spans, key=lambda span: span[1]):
        end = start + duration
        yield name, max(0.0, end - max(start, reached))
        reached = max(reached, end)


def idle_share(spans: list[Span]) -> float:
    """Of the time from the first span's start to the last one's end, the part that no span covers."""
    if not spans:
        return 0.0
    ordered = sorted((start, start + duration) for _, start, duration in spans)
    covered, reached = 0.0, ordered[0][0]
    for start, end in ordered:
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1.0 - covered / max(1e-9, reached - ordered[0][0])


_MODULE_CLASSES = (
    (re.compile(r"attention"), "attention"),
    (re.compile(r"linear|products"), "GEMM"),
    (re.compile(r"sampl|threshold|logits_processors|top_rows|slot_params"), "sampling"),
    (re.compile(r"row_operations|norm|rope"), "norm, rope, store"),
)
_NAME_CLASSES = (
    (re.compile(r"^copy: "), "copies"),
    (re.compile(r"attention|flash|fmha|BatchDecode|BatchPrefill|MergeState", re.I), "attention"),
    (re.compile(r"gemm|gemv|nvjet|cutlass|cublas|splitK|xmma", re.I), "GEMM"),
    (re.compile(r"softmax|sample|argmax|topk|gumbel", re.I), "sampling"),
    (re.compile(r"norm|rope|rotary", re.I), "norm, rope, store"),
)


def classify(name: str, classes: Mapping[str, str]) -> str:
    """The class of a device span: Headrace's own kernels by the module they are in, a library's by its name."""
    if name in classes:
        return classes[name]
    return next((found for pattern, found in _NAME_CLASSES if pattern.search(name)), "other")


def kernel_classes() -> dict[str, str]:
    """Class by kernel name, for the Triton kernels of `headrace.kernels`."""
    package = importlib.import_module("headrace.kernels.triton")
    found: dict[str, str] = {}
    for info in pkgutil.iter_modules(package.__path__):
        kind = next((kind for pattern, kind in _MODULE_CLASSES if pattern.search(info.name)), None)
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for value in vars(module).values():
            function: Callable[..., Any] | None = getattr(value, "fn", None)
            if kind and function is not None and getattr(function, "__module__", "") == module.__name__:
                found[function.__name__] = kind
    return found


def print_case(name: str, found: Mapping[str, Any]) -> None:
    idle = f", idle {found['idle_share']:.2%}" if "idle_share" in found else ""
    print(
        f"{name}: {found['ms_per_step']:.3f} ms per step, {found['tokens_per_second']:,.0f} tokens/s{idle}", flush=True
    )
    if "us_per_step" not in found:
        return
    total = sum(found["us_per_step"].values()) or 1.0
    for kind, us in found["us_per_step"].items():
        print(f"  {kind:20s} {us:10.1f} us  {us / total:6.1%}")
    print(
        f"  {found['kernels_per_step']} kernels and copies, idle under the profiler {found['profiled_idle_share']:.2%}"
    )
    for kernel in found["kernels"]:
        print(f"    {kernel['us_per_step']:9.1f} us {kernel['calls_per_step']:7.1f}x  {kernel['name']}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
