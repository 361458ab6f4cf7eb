"""A simulation held against the real thing: servers, router, scheduler, caches and HTTP, with devices that only wait.

    python -m bench.simulated_cluster --replicas 1,2,4 --groups-per-replica 8 --out cluster.json

Each replica is a process: a whole server whose executor sleeps as long as the model of step times says. `headrace
router` stands in front. This process is the client: it sends the very samples that the simulation draws, all at once,
and takes the time until the last has come. Then the simulation does the same without any of it: told only how long the
router took to pass all requests on, which on a machine that others use is most of what differs. `ratio` is simulated to
measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from headrace import AsyncEngine
from headrace.bench.http_wire import connect, post, read_body
from headrace.bench.models import write_config
from headrace.core import fake_executor
from headrace.scheduler import SchedulerLimits
from headrace.server import serve
from headrace.simulation.front_model import FrontCosts
from headrace.simulation.options import SimulationOptions
from headrace.simulation.replica_device import ReplicaDevice
from headrace.simulation.rollouts import RolloutSource
from headrace.simulation.simulator import Simulation
from headrace.simulation.step_times import DeviceProfile
from headrace.types.plan import StepPlan, StepResult

SLOW_DEVICE = DeviceProfile(
    fixed=60e-3,
    weights=60e-3,
    token=1.5e-3,
    kv_read=12e-6,
    shared_kv_read=3e-6,
    attend=300e-9,
    max_running_requests=64,
    max_num_batched_tokens=512,
    kv_pool_tokens=64 * 512,
)
"""So slow that a machine which others use is never in its way: 120 to 500 ms a step."""
NUM_IDS = 16_000
LOOK_SECONDS = 0.02


class PacedExecutor(fake_executor.FreeExecutor):
    """Answers as a free one, when a device of this model would have."""

    def __init__(self, vocab_size: int, **given: Any) -> None:
        super().__init__(vocab_size, **given)
        page = SLOW_DEVICE.page_size
        limits = SchedulerLimits(
            max_running_requests=SLOW_DEVICE.max_running_requests,
            max_waiting_requests=1,
            max_num_batched_tokens=SLOW_DEVICE.max_num_batched_tokens,
            context_length=1 << 12,
            page_size=page,
            num_pages=SLOW_DEVICE.kv_pool_tokens // page + 1,
            prefix_cache=True,
            overlap_depth=1,
            vocab_size=vocab_size,
        )
        self._device = ReplicaDevice(SLOW_DEVICE, limits, 1, _NoEnds())  # type: ignore[arg-type]
        self._ready: deque[float] = deque()
        self._free_at = 0.0

    def submit(self, plan: StepPlan) -> None:
        super().submit(plan)
        _, seconds = self._device.execute(plan)
        self._free_at = max(time.monotonic(), self._free_at) + seconds
        self._ready.append(self._free_at)

    def collect(self) -> StepResult:
        time.sleep(max(0.0, self._ready.popleft() - time.monotonic()))
        return super().collect()


class _NoEnds:
    """Where a sequence ends is the request's own word."""

    def __getitem__(self, seed: int) -> int:
        return 1 << 40


def serve_one() -> None:
    """A replica, until its parent ends it."""
    fake_executor.FreeExecutor = PacedExecutor  # type: ignore[misc]
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as scratch:
        names = ("max_running_requests", "max_num_batched_tokens", "kv_pool_tokens", "page_size")
        settings = {name: getattr(SLOW_DEVICE, name) for name in names}
        folder = write_config(Path(scratch), "small")
        engine = AsyncEngine(
            folder,
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
def cluster(num_replicas: int) -> Iterator[int]:
    """The port of a router in front of so many."""
    processes = []
    try:
        for _ in range(num_replicas):
            processes.append(_start("-m", "bench.simulated_cluster", "--serve"))
        urls = [_url(process) for process in processes]
        processes.append(_start("-m", "headrace", "router", *urls, "--port", "0"))
        port = int(_url(processes[-1]).rpartition(":")[2])
        time.sleep(2.5)  # every replica is looked at
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


async def measure(port: int, options: SimulationOptions, num_groups: int) -> tuple[list[float], int, float]:
    """The seconds of each sample, tokens, and the seconds after which the router had passed on all requests."""
    source = RolloutSource(options)
    rollouts = [each for _ in range(num_groups) for each in source.next_group().rollouts]
    bodies = [_body(each.group.prompt, each.num_output) for each in rollouts]
    connections = [await connect(port) for _ in rollouts]
    ends: list[float] = []

    async def ask(number: int) -> None:
        reader, writer = connections[number]
        writer.write(bodies[number])
        answer = json.loads(await read_body(reader))
        assert len(answer["output_ids"]) == rollouts[number].num_output, "a sample is not as long as it was asked for"
        ends.append(time.perf_counter() - began)
        writer.close()

    began = time.perf_counter()
    passing = asyncio.create_task(_until_passed_on(port, len(rollouts)))
    await asyncio.gather(*map(ask, range(len(rollouts))))
    return sorted(ends), sum(each.num_output for each in rollouts), await passing - began


async def _until_passed_on(port: int, number: int) -> float:
    """When the router had sent all requests to replicas."""
    reader, writer = await connect(port)
    num_sent = 0
    while num_sent < number:
        await asyncio.sleep(LOOK_SECONDS)
        writer.write(b"GET /workers HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        told = json.loads(await read_body(reader))
        num_sent = sum(each["num_sent"] for each in told["workers"])
    writer.close()
    return time.perf_counter()


def _body(prompt: bytes, num_output: int) -> bytes:
    import numpy as np

    ids = (1 + np.frombuffer(prompt, dtype="<i4") % NUM_IDS).tolist()
    return post("/generate", {"input_ids": ids, "sampling_params": {"max_new_tokens": num_output, "ignore_eos": True}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help="be a replica")
    parser.add_argument("--replicas", default="1,2,4")
    parser.add_argument("--groups-per-replica", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--median-output", type=int, default=64)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.serve:
        serve_one()
        return
    found = []
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as scratch:
        profile = Path(scratch) / "slow.json"
        profile.write_bytes(msgspec.json.encode(SLOW_DEVICE))
        options = SimulationOptions(
            profile=str(profile),
            groups_per_replica=arguments.groups_per_replica,
            prompt_tokens=arguments.prompt_tokens,
            median_output_tokens=arguments.median_output,
            max_output_tokens=4 * arguments.median_output,
            known_ends=True,
            grain=1,
            steps=1,
        )
        for number in map(int, arguments.replicas.split(",")):
            with cluster(number) as port:
                ends, num_tokens, passed = asyncio.run(measure(port, options, options.num_groups(number)))
            seconds = ends[-1]
            costs = FrontCosts(request=passed / len(ends), compare=0.0, offer=0.0)
            figures = Simulation(number, options, costs).run()
            simulated = figures.steps[0].taken
            found.append(
                {
                    "replicas": number,
                    "tokens": num_tokens,
                    "measured_seconds": round(seconds, 3),
                    "simulated_seconds": round(simulated, 3),
                    "ratio": round(simulated / seconds, 4),
                    "passed_on_seconds": round(passed, 3),
                    "measured_p50": round(ends[len(ends) // 2], 3),
                    "simulated_p50": round(figures.request_seconds.p50, 3),
                    "measured_tokens_per_second": round(num_tokens / seconds, 1),
                }
            )
            print(json.dumps(found[-1]), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
