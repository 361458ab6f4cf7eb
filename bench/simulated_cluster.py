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
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from bench.paced import NUM_IDS, PacedExecutor, cluster, serve_one
from headrace.bench.http_wire import connect, post, read_body
from headrace.scheduler import SchedulerLimits
from headrace.simulation.front_model import FrontCosts
from headrace.simulation.options import SimulationOptions
from headrace.simulation.replica_device import ReplicaDevice
from headrace.simulation.rollouts import RolloutSource
from headrace.simulation.simulator import Simulation
from headrace.simulation.step_times import DeviceProfile

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
LOOK_SECONDS = 0.02


def slow_executor(vocab_size: int, **given: Any) -> PacedExecutor:
    """One whose steps take what the model of a slow device says."""
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
    device = ReplicaDevice(SLOW_DEVICE, limits, 1, _NoEnds())  # type: ignore[arg-type]
    return PacedExecutor(lambda plan: device.execute(plan)[1], vocab_size, **given)


class _NoEnds:
    """Where a sequence ends is the request's own word."""

    def __getitem__(self, seed: int) -> int:
        return 1 << 40


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
        names = ("max_running_requests", "max_num_batched_tokens", "kv_pool_tokens", "page_size")
        serve_one(slow_executor, **{name: getattr(SLOW_DEVICE, name) for name in names})
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
            with cluster(("-m", "bench.simulated_cluster", "--serve"), number) as port:
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
