"""How fast KV pages go to host memory and back on one GPU, and what requests that decode meanwhile see of it.

    python bench/gpu_host_kv.py --shape qwen3-8b --out host_kv.json

256 rows decode all the time. Before, long prefixes were computed, more of them than the pool has room for; all are in
host memory. Then, in turns with quiet stretches:

    load     prefixes that the pool has evicted are asked for, one after the other, and come back
    visits   the same prefixes again, which are still there: what these requests cost without any copy
    save     the rows have ended and others have begun: the pages of the former go to host memory

`gb_per_s` is what was copied over the time of the copies alone, by events around them; `decode` the tokens a second of
the rows over those without any of it. A step takes longer with each token that the rows have, so what it would have
taken is read off a line through the steps of the quiet stretches. Nobody reads the rows' streams (see gpu_pause.py).
`disturbed` says what befell the rows: nothing should have. `recomputed_tokens` were asked for and not in host memory.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from step_watch import StepWatch, gaps_of, noted_arrivals

from headrace import Engine, SamplingParams
from headrace.bench.models import write_config
from headrace.config import EngineConfig, resolve

PROMPT_TOKENS = 48
FIRST_TOKENS = 4  # of each row, before anything is counted
VISITS = 6  # of a stretch
LOOK_S = 0.02
STILL_S = 0.3
LIMIT_S = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-8b")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--prefix-tokens", type=int, default=3600)
    parser.add_argument("--quiet-steps", type=int, default=30, help="of each quiet stretch")
    parser.add_argument(
        "--steps", type=int, default=320, help="of all stretches before save: KV cache is there for them"
    )
    parser.add_argument("--device", default="cuda", help="cpu: to try the script")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_config(Path(scratch) / arguments.shape, arguments.shape)
        results = {"shape": arguments.shape, **measure(folder, arguments)}
    results["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    text = json.dumps(results)
    print(text, flush=True)
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    settings: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True, "device": arguments.device}
    resolved = resolve(EngineConfig.from_dict({"model": str(folder), **settings}), folder)
    rows, page = arguments.rows, resolved.engine.page_size
    prefix = arguments.prefix_tokens // page * page + 1  # the last token is computed in any case
    pool = rows * (PROMPT_TOKENS + arguments.steps + 2 * page) + 2 * (prefix + page)
    num_prefixes = max(2 * VISITS, (pool - rows * PROMPT_TOKENS) // prefix + 2)  # the least recent is not in the pool
    settings |= {"kv_pool_tokens": pool, "host_kv_tokens": num_prefixes * (prefix + page)}
    # All rows begin in one step: what the former left is still on its way to the host when they decode.
    settings |= {"max_running_requests": rows + 2, "max_num_batched_tokens": rows * PROMPT_TOKENS + 1024}
    with Engine(folder, inprocess=False, **settings) as engine, StepWatch(engine) as watch:
        bench = Bench(engine, watch, rows, min(pool, resolved.context_length) - 2 * PROMPT_TOKENS)
        prefixes = [[(31 * i + 5 * at) % 499 + 1 for at in range(prefix)] for i in range(num_prefixes)]
        bench.visit(prefixes)
        bench.wait_saved()
        with bench.decoding(1):
            bench.stretch("quiet", bench.pass_steps, arguments.quiet_steps)
            bench.stretch("load", bench.visit, prefixes[:VISITS])
            bench.stretch("visits", bench.visit, prefixes[:VISITS])
            bench.stretch("quiet", bench.pass_steps, arguments.quiet_steps)
            bench.stretch("load", bench.visit, prefixes[VISITS : 2 * VISITS])
            bench.stretch("quiet", bench.pass_steps, arguments.quiet_steps)
        with bench.decoding(3):
            bench.stretch("save", bench.wait_saved)
            bench.stretch("quiet", bench.pass_steps, arguments.quiet_steps)
        return bench.figures()


class Stretch(NamedTuple):
    """Some time in which the rows decoded, and the engine's metrics around it; `since` is when they began to."""

    kind: str
    since: float
    begin: float
    end: float
    before: dict[str, float]
    after: dict[str, float]

    def counted(self, name: str) -> float:
        return self.after[name] - self.before[name]


class Bench:
    """Stretches of an engine in which `rows` requests decode."""

    def __init__(self, engine: Engine, watch: StepWatch, rows: int, max_new_tokens: int) -> None:
        self._engine, self._watch, self._rows = engine, watch, rows
        resolved = engine.asynchronous.resolved
        self._page_bytes = resolved.kv_bytes_per_token * resolved.engine.page_size
        self._max_new_tokens = max_new_tokens
        self._stretches: list[Stretch] = []
        self._since = self._start = time.monotonic()
        self._at_start = engine.metrics()

    @contextlib.contextmanager
    def decoding(self, stride: int) -> Iterator[None]:
        """Rows decode, all past their prompts, which are others for another stride."""
        lengths = [PROMPT_TOKENS - i % 16 for i in range(self._rows)]  # they do not all need a page in the same step
        prompts = [[(7 * i + stride * at) % 499 + 1 for at in range(length)] for i, length in enumerate(lengths)]
        params = SamplingParams(temperature=1.0, max_new_tokens=self._max_new_tokens, ignore_eos=True)
        self._at_start = self._engine.metrics()
        with noted_arrivals() as arrivals:
            stream = self._engine.stream(input_ids=prompts, sampling_params=params)
            next(stream)  # starts all of them; then nobody reads
            self._since = time.monotonic()
            while len(arrivals) < self._rows or min(map(len, arrivals.values())) < FIRST_TOKENS:
                self._look_at_clock(self._since)
            yield
            stream.close()

    def stretch(self, kind: str, action: Callable[..., float], *arguments: Any) -> None:
        """Do something beside the rows, which says when it was over, and note when that was."""
        # Pages of rows that have ended go away at once, beside the prompts of those that follow.
        before, begin = self._at_start if kind == "save" else self._engine.metrics(), time.monotonic()
        end = action(*arguments)
        after = self._engine.metrics()
        self._stretches.append(Stretch(kind, self._since, begin, end, before, after))

    def visit(self, prompts: Sequence[list[int]]) -> float:
        """One token of each, one after the other."""
        for prompt in prompts:
            params = SamplingParams(temperature=1.0, max_new_tokens=1, ignore_eos=True)
            self._engine.generate(input_ids=prompt, sampling_params=params)
        return time.monotonic()

    def pass_steps(self, num_steps: int) -> float:
        """Until there were so many."""
        begin, first = time.monotonic(), self._engine.metrics()["num_steps"]
        while self._engine.metrics()["num_steps"] < first + num_steps:
            self._look_at_clock(begin)
        return time.monotonic()

    def wait_saved(self) -> float:
        """Until no more pages go to host memory for a while; returns the time of the last."""
        begin = end = time.monotonic()
        last = -1.0
        while time.monotonic() < end + STILL_S:
            if (num_saved := self._engine.metrics()["num_pages_saved"]) != last:
                last, end = num_saved, time.monotonic()
            self._look_at_clock(begin)
        return end

    def _look_at_clock(self, begin: float) -> None:
        if time.monotonic() > begin + LIMIT_S:
            raise SystemExit(f"what was waited for did not come within {LIMIT_S:g} s")
        time.sleep(LOOK_S)

    def figures(self) -> dict[str, Any]:
        """What came of each kind of stretch; `step_ms` is a quiet step's, by how many came before it."""
        stamps, longest_look = self._watch.take(self._start, time.monotonic())
        steps = [steps_of(stretch, stamps) for stretch in self._stretches]
        pairs = list(zip(self._stretches, steps, strict=True))
        quiet = [step for stretch, found in pairs if stretch.kind == "quiet" for step in found]
        slope, at_0 = statistics.linear_regression(*zip(*quiet, strict=True))
        results: dict[str, Any] = {"step_ms": {"at_0": at_0, "slope": slope}, "longest_look_ms": longest_look}
        for kind in ("load", "visits", "save"):
            mine = [pair for pair in pairs if pair[0].kind == kind]
            results[kind] = self._decode([step for _, found in mine for step in found], at_0, slope)
            results[kind] |= self._copies([stretch for stretch, _ in mine], "save" if kind == "save" else "load")
        visited = [stretch for stretch in self._stretches if stretch.kind in ("load", "visits")]
        num_computed = sum(stretch.counted("num_prefill_tokens") - VISITS for stretch in visited)
        names = ("num_preemptions", "num_failed_steps", "num_finished")
        counts = {name: sum(stretch.counted(name) for stretch in self._stretches) for name in names}
        counts["num_finished"] -= VISITS * len(visited)
        return results | {
            "recomputed_tokens": num_computed,
            "disturbed": {name: count for name, count in counts.items() if count},
        }

    def _decode(self, steps: Sequence[tuple[int, float]], at_0: float, slope: float) -> dict[str, float]:
        if not steps:  # what was to be seen was over before
            return {"steps": 0}
        spent, expected = sum(ms for _, ms in steps), sum(at_0 + slope * number for number, _ in steps)
        rate = 1e3 * self._rows * len(steps)
        quiet = {"tokens_per_s": rate / spent, "quiet_tokens_per_s": rate / expected}
        return {"steps": len(steps), "decode": expected / spent, **quiet}

    def _copies(self, stretches: Sequence[Stretch], way: str) -> dict[str, float]:
        names = {"save": "num_pages_saved", "load": "num_pages_loaded"}
        gigabytes = sum(stretch.counted(names[way]) for stretch in stretches) * self._page_bytes / 1e9
        busy = sum(stretch.counted(f"page_{way}_s") for stretch in stretches)
        rate = gigabytes / busy if gigabytes else 0.0
        seconds = sum(stretch.end - stretch.begin for stretch in stretches)
        return {"seconds": seconds, "gigabytes": gigabytes, "busy_s": busy, "gb_per_s": rate}


def steps_of(stretch: Stretch, stamps: Sequence[float]) -> list[tuple[int, float]]:
    """The steps of a stretch: how many came before it since the rows began, and its milliseconds."""
    first = bisect.bisect(stamps, stretch.since)
    gaps = gaps_of(stamps, (stretch.begin, stretch.end))
    return [(bisect.bisect(stamps, end) - first, ms) for end, ms in gaps]


if __name__ == "__main__":
    main()
