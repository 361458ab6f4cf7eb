"""Steps that workloads take in pools that do not hold them all at once: the scheduler, and no device.

    python bench/full_pools.py --workloads A,B --percents 100,75,50,25

A pool of 100 % is the peak of a run in a pool that is never full. Prints a line of JSON for each workload.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import msgspec
import numpy as np

from headrace.bench.workloads import Workload, make_workload
from headrace.scheduler import Scheduler, SchedulerLimits
from headrace.types.plan import StepResult
from headrace.types.request import Request, pack_ids

PAGE_SIZE = 16
TOKEN = 7


class Outcome(msgspec.Struct, frozen=True):
    """What a run took. `num_recomputed` tokens had been computed before they were preempted."""

    num_steps: int
    num_preemptions: int
    num_recomputed: int
    peak_tokens: int


def simulate(workload: Workload, limits: SchedulerLimits) -> Outcome:
    """All requests come at once, and none ends before its last token."""
    scheduler = Scheduler(limits)
    for handle, (prompt, count) in enumerate(zip(workload.prompts, workload.output_lengths, strict=True)):
        scheduler.add(Request(handle, str(handle), pack_ids(prompt), count, seed=handle), 0.0)
    waiting, num_steps, peak = [], 0, 0
    while True:
        plan = scheduler.plan()
        if plan is not None:
            num_steps += 1
            peak = max(peak, scheduler.num_used_tokens)
            waiting.append(plan)
            continue
        if not waiting:
            break
        oldest = waiting.pop(0)
        count = int(np.count_nonzero(oldest.row_samples))
        tokens, ones = np.full((count, 1), TOKEN, np.int32), np.ones(count, np.int32)
        scheduler.apply(StepResult(oldest.step_id, tokens, np.zeros((count, 1), np.float32), ones))
    metrics = scheduler.metrics()
    computed = metrics["num_prefill_tokens"] + metrics["num_decode_tokens"]
    needed = sum(len(p) + n - 1 for p, n in zip(workload.prompts, workload.output_lengths, strict=True))
    recomputed = computed + metrics["num_cached_tokens"] - needed
    return Outcome(num_steps, int(metrics["num_preemptions"]), int(recomputed), peak)


def limits_of(workload: Workload, num_tokens: int, **changes: Any) -> SchedulerLimits:
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
    }
    return SchedulerLimits(**(fields | changes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="A,B")
    parser.add_argument("--percents", default="100,75,50,25")
    parser.add_argument("--step-tokens", type=int, default=768)
    arguments = parser.parse_args()
    for name in arguments.workloads.split(","):
        workload = make_workload(name)
        changes = {"max_num_batched_tokens": arguments.step_tokens}
        roomy = simulate(workload, limits_of(workload, 1 << 20, **changes))
        found: dict[str, Any] = {"workload": name, "peak_tokens": roomy.peak_tokens, "steps": roomy.num_steps}
        for percent in map(int, arguments.percents.split(",")):
            num_tokens = roomy.peak_tokens * percent // 100
            outcome = simulate(workload, limits_of(workload, num_tokens, **changes))
            facts = msgspec.structs.asdict(outcome) | {"ratio": round(outcome.num_steps / roomy.num_steps, 3)}
            found[f"{percent} %"] = {"pool_tokens": num_tokens, **facts}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
