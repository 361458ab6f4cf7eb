"""What scheduling costs: the real scheduler and prefix cache with an executor that costs nothing. Needs no torch.

Prints microseconds per step by number of running sequences, per life of a request, and per page matched and inserted;
with --json, one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Iterator

import numpy as np

from headrace.cache import LeaseTable, Namespace
from headrace.scheduler import Scheduler, SchedulerLimits
from headrace.types.plan import StepPlan, StepResult
from headrace.types.request import Request, pack_ids

VOCAB_SIZE = 32000
PROMPT_LENGTH = 512
OUTPUT_LENGTH = 128
PAGE_SIZE = 16


def free_result(plan: StepPlan) -> StepResult:
    """What an executor that costs nothing answers: token 5 everywhere."""
    count = int(np.count_nonzero(plan.row_samples))
    ones = np.ones(count, dtype=np.int32)
    return StepResult(plan.step_id, np.full((count, 1), 5, np.int32), np.zeros((count, 1), np.float32), ones)


def make_requests(num_requests: int, num_output: int, seed: int = 0) -> Iterator[Request]:
    """Unique prompts with stop ids that never come."""
    generator = np.random.default_rng(seed)
    for handle in range(num_requests):
        prompt = pack_ids(generator.integers(0, VOCAB_SIZE, PROMPT_LENGTH, dtype=np.int32))
        yield Request(handle, str(handle), prompt, num_output, seed=handle, stop_token_ids=(2, 3))


def make_scheduler(num_running: int, depth: int) -> Scheduler:
    """A scheduler with enough pages for its running sequences and as many cached ones."""
    per_sequence = (PROMPT_LENGTH + 4096) // PAGE_SIZE + 1
    limits = SchedulerLimits(
        max_running_requests=num_running,
        max_waiting_requests=1 << 20,
        max_num_batched_tokens=8192,
        context_length=8192,
        page_size=PAGE_SIZE,
        num_pages=2 * num_running * per_sequence + 1,
        prefix_cache=True,
        overlap_depth=depth,
        vocab_size=VOCAB_SIZE,
    )
    return Scheduler(limits)


def step(scheduler: Scheduler, pending: list[StepPlan]) -> float:
    """One plan and one apply, as a core with overlap does them; returns the seconds the scheduler took."""
    begin = time.perf_counter()
    plan = scheduler.plan()
    seconds = time.perf_counter() - begin
    if plan is not None:
        pending.append(plan)
    if plan is None or len(pending) > scheduler.limits.overlap_depth:
        result = free_result(pending.pop(0))
        begin = time.perf_counter()
        scheduler.apply(result)
        seconds += time.perf_counter() - begin
    return seconds


def microseconds_per_step(num_running: int, depth: int, num_waiting: int, num_steps: int = 400) -> float:
    """Median microseconds of a steady decode step with `num_running` rows and `num_waiting` requests behind them."""
    scheduler = make_scheduler(num_running, depth)
    for request in make_requests(num_running + num_waiting, 4096):
        scheduler.add(request, 0.0)
    pending: list[StepPlan] = []
    while scheduler.num_running < num_running:
        step(scheduler, pending)
    for _ in range(50):
        step(scheduler, pending)
    return float(np.median([step(scheduler, pending) for _ in range(num_steps)])) * 1e6


def microseconds_per_life(num_running: int, depth: int, num_requests: int) -> tuple[float, float]:
    """(per life, per step) microseconds of serving many requests whole: adding, steps, and ending."""
    scheduler = make_scheduler(num_running, depth)
    seconds = 0.0
    for request in make_requests(num_requests, OUTPUT_LENGTH):
        begin = time.perf_counter()
        scheduler.add(request, 0.0)
        seconds += time.perf_counter() - begin
    pending: list[StepPlan] = []
    num_steps = 0
    while scheduler.num_running or scheduler.num_waiting or pending:
        seconds += step(scheduler, pending)
        num_steps += 1
    assert scheduler.metrics()["num_finished"] == num_requests
    return seconds * 1e6 / num_requests, seconds * 1e6 / num_steps


def microseconds_per_page(num_sequences: int, num_pages: int, num_shared: int) -> float:
    """Microseconds per page of matching, leasing, publishing and closing sequences of 1,000 tokens, of which the first
    `num_shared` are one of 100 common prefixes, in a pool of `num_pages`."""
    per_sequence = 1000 // PAGE_SIZE
    units = b""
    leases = LeaseTable(
        lambda _, first, last: units[4 * first : 4 * last],
        num_slots=1,
        num_columns=64,
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        prefix_cache=True,
    )
    generator = np.random.default_rng(1)
    prefixes = generator.integers(0, VOCAB_SIZE, (100, num_shared), dtype=np.int32)
    seconds = 0.0
    for index in range(num_sequences):
        own = generator.integers(0, VOCAB_SIZE, 1000 - num_shared, dtype=np.int32)
        units = np.concatenate([prefixes[index % 100], own]).tobytes()
        begin = time.perf_counter()
        match = leases.match(Namespace(0), units, per_sequence)
        leases.open(0, Namespace(0), match)
        leases.grow(0, per_sequence - match.num_pages)
        leases.publish(0, 1000)
        leases.close(0)
        seconds += time.perf_counter() - begin
    return seconds * 1e6 / (num_sequences * per_sequence)


def measure(num_sequences: int) -> dict[str, object]:
    """All figures, by name."""
    unbounded = num_sequences * 63 + 1
    figures: dict[str, object] = {"num_waiting": 10_000, "num_cache_sequences": num_sequences}
    for depth in (0, 1):
        figures[f"microseconds_per_step_depth_{depth}"] = {
            rows: round(microseconds_per_step(rows, depth, 10_000), 1) for rows in (16, 64, 256, 1024)
        }
    life, per_step = microseconds_per_life(256, 1, 2000)
    figures["microseconds_per_life"] = round(life, 1)
    figures["microseconds_per_step_whole_lives_256"] = round(per_step, 1)
    figures["microseconds_per_page"] = {
        "unique": round(microseconds_per_page(num_sequences, unbounded, 0), 3),
        "shared": round(microseconds_per_page(num_sequences, unbounded, 800), 3),
        "unique_evicting": round(microseconds_per_page(num_sequences, 20_000, 0), 3),
        "shared_evicting": round(microseconds_per_page(num_sequences, 20_000, 800), 3),
    }
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--cache-sequences", type=int, default=100_000)
    arguments = parser.parse_args()
    gc.freeze()
    figures = measure(arguments.cache_sequences)
    for name, value in figures.items():
        print(f"{name}: {value}")
    if arguments.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
