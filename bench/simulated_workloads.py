"""The benchmarks' workloads on one simulated replica, beside what a real one was measured to do (docs/simulation.md).

    python -m bench.simulated_workloads --grain 1

The profiles' numbers come of single steps and of prompts alone; whole workloads are no part of them, so this is a
prediction. Prints one line for each.
"""

from __future__ import annotations

import argparse

import msgspec

from headrace.bench.workloads import Workload, make_closed_loop, make_workload
from headrace.scheduler import Scheduler
from headrace.simulation.options import SimulationOptions
from headrace.simulation.replica_device import ReplicaDevice
from headrace.simulation.replica_model import limits_of
from headrace.types.request import Request, pack_ids

MEASURED = {
    ("qwen3-0.6b-h200", "A"): (27_256, 27_966),
    ("qwen3-0.6b-h200", "B"): (35_822, 35_835),
    ("qwen3-0.6b-h200", "D"): (29_463, 29_619),
    ("qwen3-8b-h200", "A"): (10_207, 10_207),
    ("qwen3-8b-h200", "B"): (14_355, 14_355),
}
"""Tokens per second, the least and the most of docs/benchmarks.md in the present shape of the engine."""


class WorkloadFigures(msgspec.Struct, frozen=True):
    """Of one run; seconds of simulated time, steps as simulated."""

    tokens_per_second: float
    seconds: float
    num_steps: int
    p50_step_ms: float
    p99_step_ms: float


def simulate_workload(
    profile: str, workload: Workload, grain: int = 1, concurrency: int | None = None
) -> WorkloadFigures:
    """All requests at once, or so many at a time."""
    options = SimulationOptions(
        profile=profile, grain=grain, prompt_tokens=2048, max_output_tokens=2048, known_ends=True
    )
    limits = msgspec.structs.replace(limits_of(options), vocab_size=1 << 20)
    requests, ends = [], []
    for index, (prompt, length) in enumerate(zip(workload.prompts, workload.output_lengths, strict=True)):
        ids, num_output = prompt[::grain], max(1, round(length / grain))
        ends.append(len(ids) + num_output)
        requests.append(Request(index, str(index), pack_ids(ids), num_output, seed=index))
    scheduler, device = Scheduler(limits), ReplicaDevice(options.device, limits, grain, ends)
    coming = iter(requests)
    for request in [next(coming) for _ in range(min(concurrency or len(requests), len(requests)))]:
        scheduler.add(request, 0.0)
    steps: list[float] = []
    while (plan := scheduler.plan()) is not None:
        result, seconds = device.execute(plan)
        steps.append(seconds)
        for delta in scheduler.apply(result):
            following = next(coming, None) if delta.finish is not None else None
            if following is not None:
                scheduler.add(following, sum(steps))
    ordered = sorted(each / grain for each in steps)
    return WorkloadFigures(
        tokens_per_second=workload.num_output_tokens / sum(steps),
        seconds=sum(steps),
        num_steps=len(steps),
        p50_step_ms=1e3 * ordered[len(ordered) // 2],
        p99_step_ms=1e3 * ordered[len(ordered) * 99 // 100],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grain", type=int, default=1)
    arguments = parser.parse_args()
    for (profile, name), (least, most) in MEASURED.items():
        is_loop = name == "D"
        workload = make_closed_loop() if is_loop else make_workload(name)  # type: ignore[arg-type]
        found = simulate_workload(profile, workload, arguments.grain, 256 if is_loop else None)
        middle = (least + most) / 2
        print(
            f"{profile} {name}: simulated {found.tokens_per_second:,.0f} tokens/s, measured {least:,} to {most:,}:"
            f" {found.tokens_per_second / middle - 1:+.1%}; steps p50 {found.p50_step_ms:.1f},"
            f" p99 {found.p99_step_ms:.1f} ms",
            flush=True,
        )


if __name__ == "__main__":
    main()
