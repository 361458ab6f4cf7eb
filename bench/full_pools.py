"""Steps that workloads take in pools that do not hold them all at once: the scheduler, and no device.

    python bench/full_pools.py --workloads A,B --percents 100,75,50,25
    python bench/full_pools.py --host-percent 100

A pool of 100 % is the peak of a run in a pool that is never full; so is a host's memory. Prints a line of JSON for each
workload. Seconds are those of a model: a step of Qwen3-8B on an H200 as docs/simulation.md has it, its copies beside it
at the rates of docs/benchmarks.md ("KV pages to the host and back"), one way after the other: what goes on after its
end, and a quarter of their time (rows had 4 % less for 0.81 s in which 6.4 GB came, which takes 0.13 s).
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import msgspec
import numpy as np

from headrace.bench.workloads import Workload, make_workload
from headrace.scheduler import Scheduler, SchedulerLimits
from headrace.simulation.replica_device import ReplicaDevice
from headrace.simulation.step_times import PROFILES
from headrace.types.plan import StepPlan
from headrace.types.request import Request, pack_ids

PAGE_SIZE = 16
PROFILE = PROFILES["qwen3-8b-h200"]
PAGE_BYTES = PAGE_SIZE * 36 * 2 * 8 * 128 * 2
"""Keys and values of that model: layers, heads, head size, bf16."""
MOVED_BYTES = 256 << 20
"""Most that is copied each way beside a step."""
SAVED_PER_SECOND, LOADED_PER_SECOND, SHARE_OF_COPIES = 47.5e9, 50.2e9, 0.25


class Outcome(msgspec.Struct, frozen=True):
    """What a run took. `num_recomputed` tokens had been computed before they were preempted; `num_saved` and
    `num_loaded` were copied to the host and back, those of sequences that had ended included."""

    num_steps: int
    num_preemptions: int
    num_recomputed: int
    peak_tokens: int
    num_saved: int
    num_loaded: int
    seconds: float


def simulate(workload: Workload, limits: SchedulerLimits) -> Outcome:
    """All requests come at once, and none ends before its last token."""
    scheduler = Scheduler(limits)
    lengths = list(map(len, workload.prompts))
    device = ReplicaDevice(PROFILE, limits, 1, np.add(lengths, workload.output_lengths).tolist())
    for handle, (prompt, count) in enumerate(zip(workload.prompts, workload.output_lengths, strict=True)):
        scheduler.add(Request(handle, str(handle), pack_ids(prompt), count, seed=handle), 0.0)
    results, peak, seconds, num_steps = [], 0, 0.0, 0
    while True:
        plan = scheduler.plan()
        if plan is not None:
            num_steps += 1
            peak = max(peak, scheduler.num_used_tokens)
            result, of_step = device.execute(plan)
            results.append(result)
            seconds += _with_copies(plan, of_step)
            continue
        if not results:
            break
        scheduler.apply(results.pop(0))
    metrics = scheduler.metrics()
    computed = metrics["num_prefill_tokens"] + metrics["num_decode_tokens"]
    needed = sum(lengths) + sum(workload.output_lengths) - len(lengths)
    return Outcome(
        num_steps,
        int(metrics["num_preemptions"]),
        int(computed + metrics["num_cached_tokens"] - needed),
        peak,
        int(metrics.get("num_pages_saved", 0)) * PAGE_SIZE,
        int(metrics.get("num_pages_loaded", 0)) * PAGE_SIZE,
        round(seconds, 2),
    )


def limits_of(workload: Workload, num_tokens: int, num_host_tokens: int = 0, **changes: Any) -> SchedulerLimits:
    """Those that a device takes for a wide model, over a pool of so many tokens."""
    fields: dict[str, Any] = {
        "max_running_requests": 512,
        "max_waiting_requests": 1 << 20,
        "max_num_batched_tokens": 768,
        "context_length": 1 << 15,
        "page_size": PAGE_SIZE,
        "num_pages": 1 + num_tokens // PAGE_SIZE,
        "prefix_cache": True,
        "overlap_depth": 1,
        "vocab_size": 1 << 20,
        "num_host_pages": num_host_tokens // PAGE_SIZE,
        "max_page_moves": MOVED_BYTES // PAGE_BYTES,
    }
    return SchedulerLimits(**(fields | changes))


def _with_copies(plan: StepPlan, seconds: float) -> float:
    """Of a step that takes so long without its copies."""
    if not len(plan.page_moves):
        return seconds
    num_loaded = int(np.count_nonzero(plan.page_moves[:, 0]))
    num_saved = len(plan.page_moves) - num_loaded
    copies = num_saved * PAGE_BYTES / SAVED_PER_SECOND + num_loaded * PAGE_BYTES / LOADED_PER_SECOND
    return max(copies, seconds + SHARE_OF_COPIES * copies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="A,B")
    parser.add_argument("--percents", default="100,75,50,25")
    parser.add_argument("--step-tokens", type=int, default=768)
    parser.add_argument("--prefill-step-tokens", type=int, default=0)
    parser.add_argument("--host-percent", type=int, default=0, help="host memory for KV, of the same peak; 0: none")
    arguments = parser.parse_args()
    for name in arguments.workloads.split(","):
        workload = make_workload(name)
        changes = {
            "max_num_batched_tokens": arguments.step_tokens,
            "prefill_step_tokens": arguments.prefill_step_tokens,
        }
        roomy = simulate(workload, limits_of(workload, 1 << 20, **changes))
        found: dict[str, Any] = {"workload": name, **msgspec.structs.asdict(roomy)}
        for percent in map(int, arguments.percents.split(",")):
            num_tokens = roomy.peak_tokens * percent // 100
            num_host_tokens = roomy.peak_tokens * arguments.host_percent // 100
            outcome = simulate(workload, limits_of(workload, num_tokens, num_host_tokens, **changes))
            facts = msgspec.structs.asdict(outcome) | {"ratio": round(outcome.num_steps / roomy.num_steps, 3)}
            found[f"{percent} %"] = {"pool_tokens": num_tokens, **facts}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
