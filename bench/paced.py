"""Real servers behind a real router, with devices that only wait: processes, and the executor of each.

For `simulated_cluster`, where a step takes what a model of a device says, and `replicas`, where each takes as long.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from headrace import AsyncEngine
from headrace.bench.models import write_config
from headrace.core import fake_executor
from headrace.server import serve
from headrace.types.plan import StepPlan, StepResult

NUM_IDS = 16_000
"""Token ids below this are known to the model that the servers are started with."""
_SEEN_SECONDS = 2.5


class PacedExecutor(fake_executor.FreeExecutor):
    """Answers as a free one, when a device would have that takes `seconds_of` a plan."""

    def __init__(self, seconds_of: Callable[[StepPlan], float], vocab_size: int, **given: Any) -> None:
        super().__init__(vocab_size, **given)
        self._seconds_of = seconds_of
        self._ready: deque[float] = deque()
        self._free_at = 0.0

    def submit(self, plan: StepPlan) -> None:
        super().submit(plan)
        self._free_at = max(time.monotonic(), self._free_at) + self._seconds_of(plan)
        self._ready.append(self._free_at)

    def collect(self) -> StepResult:
        time.sleep(max(0.0, self._ready.popleft() - time.monotonic()))
        return super().collect()


def serve_one(make_executor: Callable[..., PacedExecutor], **settings: Any) -> None:
    """Be a replica, until the parent ends it."""
    fake_executor.FreeExecutor = make_executor  # type: ignore[misc, assignment]
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as scratch:
        engine = AsyncEngine(
            write_config(Path(scratch), "small"),
            executor="free",
            inprocess=True,
            load_format="dummy",
            skip_tokenizer_init=True,
            progress=False,
            overlap_depth=1,
            **settings,
        )
        server = asyncio.run_coroutine_threadsafe(serve(engine), engine.loop).result()
        print(f"url={server.url}", flush=True)
        sys.stdin.read()
        engine.close()


@contextlib.contextmanager
def cluster(replica: Sequence[str], num_replicas: int, *router_flags: str) -> Iterator[int]:
    """The port of a router in front of so many processes `python REPLICA`, each of which calls `serve_one`."""
    processes = []
    try:
        for _ in range(num_replicas):
            processes.append(_start(*replica))
        urls = [_url(process) for process in processes]
        processes.append(_start("-m", "headrace", "router", *urls, "--port", "0", *router_flags))
        port = int(_url(processes[-1]).rpartition(":")[2])
        time.sleep(_SEEN_SECONDS)  # every replica is looked at
        yield port
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(30)


def _start(*words: str) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([sys.executable, *words], text=True, **pipes)  # type: ignore[call-overload, no-any-return]


def _url(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if "url=http" in line:
            return line.partition("url=")[2].split()[0]
    raise SystemExit("a process ended before it had an address")
