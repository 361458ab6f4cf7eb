"""Who is preempted where the host's memory keeps what he has computed, and that all come back."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from headrace.scheduler import Scheduler, SchedulerLimits
from headrace.scheduler.roster import Roster
from headrace.scheduler.victims import victim_behind
from headrace.types.request import Request, pack_ids
from tests.rounds import rounds
from tests.scheduler.builders import ROOMY, answer, finish_all, make, planned, request, step
from tests.scheduler.harness import Harness
from tests.scheduler.test_properties import play_event

EVENTS = ("issue",) * 20 + ("land",) * 16 + ("add",) * 4 + ("abort", "flush", "update", "drain", "lose_step", "books")


def hosted_limits(choose: random.Random, depth: int) -> SchedulerLimits:
    """A pool for eight sequences of 24 tokens, whose ends are known, and of host pages none to more than are needed."""
    page_size = choose.choice((1, 2, 4))
    return msgspec.structs.replace(
        ROOMY,
        max_running_requests=24,
        max_waiting_requests=10_000,
        max_num_batched_tokens=choose.choice((12, 30, 200)),
        context_length=40,
        page_size=page_size,
        num_pages=1 + choose.choice((196, 220)) // page_size,
        overlap_depth=depth,
        vocab_size=5,
        num_host_pages=choose.choice((8, 60, 400)),
        max_page_moves=choose.choice((2, 9, 100)),
    )


def bounded_request(choose: random.Random, handle: int) -> Request:
    """Of a known end, most of them samples of three prompts."""
    stem = random.Random(choose.choice((1, 2, 3, 4 + handle)))
    prompt = [stem.randrange(5) for _ in range(stem.randint(1, 9))]
    key, priority = choose.choice(("", "", "b")), choose.choice((0, 0, 0, 0, 1))
    stops = (2,) if choose.random() < 0.1 else ()
    longest = choose.randint(choose.choice((1, 12)), 24 - len(prompt))
    return Request(
        handle,
        f"r{handle}",
        pack_ids(prompt),
        longest,
        seed=handle,
        stop_token_ids=stops,
        priority=priority,
        extra_key=key,
    )


def play(seed: int, depth: int) -> Harness:
    choose = random.Random(seed)
    harness = Harness(hosted_limits(choose, depth))
    now = 0.0
    for _ in range(choose.choice((30, 60))):
        name = choose.choice(EVENTS)
        if name == "add":
            for _ in range(choose.choice((1, 16, 32))):
                harness.add(bounded_request(choose, len(harness.received)), now)
            now += choose.choice((0.0, 0.3, 1.0))
        else:
            play_event(name, choose, harness, 0, now)
    harness.end(choose.choice((None, None, 3)))
    return harness


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_random_events_keep_every_promise(depth: int) -> None:
    total: Counter[str] = Counter()
    for seed in range(rounds(20)):
        harness = play(seed * 3 + depth, depth)
        metrics = harness.scheduler.metrics()
        total.update({name: int(value) for name, value in metrics.items()})
        offload = harness.scheduler._roster.leases.offload
        assert offload is not None and offload.tier.num_kept == 0, seed
    assert total["num_preemptions"] > 12 and total["num_pages_loaded"] > 10 and total["num_resumed_tokens"] > 100
    assert total["num_invariant_breaches"] == 0


def crowded(**changes: int) -> Scheduler:
    """Forty sequences of 4 + 24 tokens, all at once, for a pool of 256."""
    fields = {"num_pages": 65, "max_running_requests": 40, "max_num_batched_tokens": 999, "num_host_pages": 400}
    scheduler = make(**{**fields, "max_page_moves": 100, **changes})
    for handle in range(40):
        scheduler.add(request(handle, 4, 24), 0.0)
    return scheduler


def test_more_run_than_will_fit_to_their_ends_and_little_is_computed_again() -> None:
    scheduler, bare = crowded(), crowded(num_host_pages=0)
    num_running = [len(step(each)[0].row_slots) for each in (scheduler, bare)]
    assert num_running[0] > num_running[1] + 3
    assert sum(delta.finish is not None for delta in finish_all(scheduler)) == 40
    finish_all(bare)
    metrics, expected = scheduler.metrics(), bare.metrics()
    assert metrics["num_steps"] < expected["num_steps"] and expected["num_preemptions"] == 0
    num_again = metrics["num_prefill_tokens"] - expected["num_prefill_tokens"]
    assert 0 < num_again <= 2 * scheduler.limits.page_size * metrics["num_preemptions"]


def test_a_host_memory_that_would_soon_be_full_lets_nobody_in_beyond_the_pool() -> None:
    scheduler, bare = crowded(num_host_pages=32), crowded(num_host_pages=0)
    for _ in range(30):
        plans = [step(each)[0] for each in (scheduler, bare)]
        assert len(plans[0].row_slots) <= len(plans[1].row_slots) + 1
    finish_all(scheduler)
    assert scheduler.metrics()["num_preemptions"] == 0
    assert make(num_pages=65, num_host_pages=33).limits.lends_host_room


def running(*sequences: tuple[int, int, float], **fields: Any) -> Roster:
    """Three steps into the run of sequences of (prompt, output, moment), in a pool with room."""
    scheduler = make(num_pages=401, max_running_requests=40, max_num_batched_tokens=999, num_host_pages=400)
    for handle, (prompt, count, moment) in enumerate(sequences):
        scheduler.add(request(handle, prompt, count, **fields), moment)
    for _ in range(3):
        step(scheduler)
    return scheduler._roster


def victim(roster: Roster, handle: int) -> int:
    """Who is preempted where pages run out for this one, by handle."""
    return roster.table.sequence(victim_behind(roster, roster.by_handle[handle].slot)).handle


def test_one_goes_who_holds_most_beyond_what_he_has_left_of_those_that_came_last() -> None:
    roster = running((4, 24, 0.0), (30, 20, 0.0), (20, 28, 5.0), (16, 15, 5.0), (4, 14, 5.0))
    assert [victim(roster, handle) for handle in range(5)] == [3, 3, 3, 4, 4]


def test_who_ends_soon_stays() -> None:
    roster = running((4, 28, 0.0), (24, 10, 0.0), (4, 20, 0.0))
    assert [victim(roster, handle) for handle in (0, 2, 1)] == [2, 1, 1]


def test_where_ends_are_not_known_the_last_in_rank_goes() -> None:
    roster = running((4, 28, 0.0), (20, 14, 0.0), (4, 13, 0.0), stop_token_ids=(3,))
    assert [victim(roster, handle) for handle in range(3)] == [2, 2, 2]


def test_who_was_kept_across_new_weights_stays_where_another_can_go() -> None:
    """What he has computed is of the old ones, and could not be found again."""
    roster = running((4, 28, 0.0), (20, 14, 0.0), (4, 13, 0.0))
    assert victim(roster, 0) == 1
    roster.leases.never_publish(roster.by_handle[1].slot)
    assert victim(roster, 0) == 2


def test_the_first_in_rank_and_who_came_earlier_are_never_preempted_for_later_ones() -> None:
    scheduler = crowded()
    for handle in range(40, 60):
        scheduler.add(request(handle, 4, 20), 5.0)
        scheduler.add(request(100 + handle, 4, 20, priority=1), 5.0)
    finals = {each.handle: each for each in finish_all(scheduler) if each.finish is not None}
    assert len(finals) == 80 and finals[140].num_preemptions == 0
    assert sum(finals[handle].num_preemptions for handle in range(60)) > 0
    order = list(finals)
    assert max(map(order.index, range(140, 160))) < max(map(order.index, range(60)))


def test_a_pause_lets_all_come_back() -> None:
    scheduler = crowded()
    while not scheduler.metrics()["num_preemptions"]:
        step(scheduler)
    num_waiting = len(scheduler._roster.waiting)
    finals = []
    while (plan := scheduler.plan(admit_new=False)) is not None:
        finals += [delta for delta in scheduler.apply(answer(plan)) if delta.finish is not None]
    assert scheduler.num_started == 0 and len(scheduler._roster.waiting) == num_waiting
    assert len(finals) == 40 - num_waiting


def flush(scheduler: Scheduler) -> None:
    scheduler.flush_cache()


def update(scheduler: Scheduler) -> None:
    scheduler.set_weights("next", 1)


def recompute(scheduler: Scheduler) -> None:
    scheduler.recompute_running()
    update(scheduler)


def lose_numbers(scheduler: Scheduler) -> None:
    plan = planned(scheduler)
    result = answer(plan)
    result.logprobs[0] = np.nan
    scheduler.apply(result)


@pytest.mark.parametrize("forget", [flush, update, recompute, lose_numbers])
def test_nothing_is_kept_that_nobody_can_find_any_more(forget: Callable[[Scheduler], None]) -> None:
    """It would take the host's room from those that are preempted after it. What was preempted is computed again."""
    scheduler = crowded()
    offload = scheduler._roster.leases.offload
    assert offload is not None
    while not offload.tier.num_kept:
        step(scheduler)
    forget(scheduler)
    assert offload.tier.num_kept == 0
    finish_all(scheduler)
    assert scheduler.num_live == 0 and offload.tier.num_kept == 0
