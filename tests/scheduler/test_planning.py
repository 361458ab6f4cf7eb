"""What one step holds: budget, order, sharing, admission, preemption."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.scheduler import limits
from headrace.scheduler.prefix_groups import find_groups
from headrace.types.plan import LAST_TOKEN
from headrace.types.sampling_params import LogprobOptions
from tests.scheduler.builders import answer, finish_all, make, planned, request, rows, step, tokens

NEVER = (8,)
"""A stop id that no step brings: when its request ends is not known."""


def test_the_first_plan_of_a_request_says_all_about_it() -> None:
    scheduler = make()
    scheduler.add(request(3, [5, 6, 7, 8, 9], 4, stop_token_ids=(2,), min_new_tokens=1), 0.0)
    plan = planned(scheduler)
    (init,) = plan.new_slots
    assert (init.seed, init.num_prompt_tokens, init.min_length, init.stop_token_ids) == (3, 5, 6, (2,))
    assert init.token_ids.tolist() == plan.token_ids.tolist() == [5, 6, 7, 8, 9]
    assert rows(plan) == [(init.slot, 0, 5)] and plan.row_samples.tolist() == [True]
    assert plan.page_slots.tolist() == [init.slot] * 2 and plan.page_columns.tolist() == [0, 1]
    assert 0 not in plan.page_ids.tolist() and plan.epoch == 0
    for name in ("page_slots", "page_columns", "page_ids", "row_slots", "row_starts", "row_lengths", "token_ids"):
        assert getattr(plan, name).dtype == np.int32, name
    scheduler.apply(answer(plan, 31))
    plan = planned(scheduler)
    assert plan.new_slots == () and rows(plan) == [(init.slot, 5, 1)] and plan.token_ids.tolist() == [31]


def test_single_tokens_come_first_and_the_budget_is_kept() -> None:
    scheduler = make(max_num_batched_tokens=10)
    scheduler.add(request(1, 4), 0.0)
    scheduler.add(request(2, 20), 0.0)
    assert [length for _, _, length in rows(planned(scheduler))] == [4, 6]


def test_long_prompts_are_computed_in_chunks() -> None:
    scheduler = make(max_num_batched_tokens=10)
    scheduler.add(request(1, 25), 0.0)
    plans = [step(scheduler)[0] for _ in range(4)]
    assert [(start, length) for plan in plans for _, start, length in rows(plan)] == [
        (0, 10),
        (10, 10),
        (20, 5),
        (25, 1),
    ]
    assert [plan.row_samples.tolist() for plan in plans] == [[False], [False], [True], [True]]
    assert scheduler.metrics()["num_chunked_prompts"] == 1


def test_while_few_run_a_step_takes_more_of_their_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FEW_ROWS", 2)
    scheduler = make(max_num_batched_tokens=4, prefill_step_tokens=10)
    for handle, length in enumerate((8, 20, 9)):
        scheduler.add(request(handle, [handle + 1] * length, 9), 0.0)
    lengths = [[length for _, _, length in rows(step(scheduler)[0])] for _ in range(5)]
    assert lengths[:2] == [[8, 2], [1, 9]] and lengths[2] == [1, 9] and lengths[3] == [1, 1, 8]
    assert lengths[4] == [1, 1, 1]


def test_beside_rows_that_decode_a_prompt_comes_in_smaller_pieces_the_more_it_attends_to() -> None:
    """A token costs 1 and as much again for each 10 positions before it; nobody waits for the first prompt."""
    scheduler = make(max_step_cost=20, attended_per_token=10)
    scheduler.add(request(1, 60, 2), 0.0)
    assert [length for _, _, length in rows(step(scheduler)[0])] == [60], "nothing decodes"
    scheduler.add(request(2, 50, 9), 0.0)
    scheduler.add(request(3, 4), 0.0)
    lengths = [[length for _, _, length in rows(step(scheduler)[0])] for _ in range(5)]
    assert lengths == [[1, 12], [38, 4], [1, 1], [1, 1], [1]]


def test_a_prompt_goes_on_however_dear_its_tokens_are() -> None:
    scheduler = make(max_step_cost=1, attended_per_token=1)
    scheduler.add(request(1, 2, 20), 0.0)
    step(scheduler)
    scheduler.add(request(2, 9, 1), 0.0)
    assert [length for _, _, length in rows(step(scheduler)[0])] == [1, 1]
    assert len(finish_all(scheduler)) > 0 and scheduler.metrics()["num_finished"] == 2


@pytest.mark.parametrize("num_cohorts", [1, 2])
def test_no_more_run_than_the_steps_behind_a_large_one_have_tokens_for(
    monkeypatch: pytest.MonkeyPatch, num_cohorts: int
) -> None:
    """Else those of the lowest rank would wait, half-way, for others to end."""
    monkeypatch.setattr(limits, "FEW_ROWS", 4)
    settings = {"max_num_batched_tokens": 3, "prefill_step_tokens": 40, "num_cohorts": num_cohorts}
    scheduler = make(max_running_requests=20, **settings)
    for handle in range(15):
        scheduler.add(request(handle, 2, 9), 0.0)
    most = max(4, 3 * num_cohorts)
    num_started = []
    while (plan := scheduler.plan()) is not None:
        num_started.append(scheduler.num_started)
        assert num_cohorts > 1 or len(rows(plan)) == scheduler.num_started
        scheduler.apply(answer(plan))
    assert max(num_started) == most and scheduler.metrics()["num_finished"] == 15


def test_more_rows_than_budget_are_served_by_rank() -> None:
    scheduler = make(max_num_batched_tokens=2)
    for handle in range(3):
        scheduler.add(request(handle, 1, 5), 0.0)
    finished = [delta.handle for delta in finish_all(scheduler)]
    assert finished == [0, 1, 2]


def test_higher_priority_goes_first_then_first_come() -> None:
    scheduler = make(max_running_requests=1)
    for handle, priority in ((1, 0), (2, 5), (3, 5), (4, -1)):
        scheduler.add(request(handle, priority=priority), 0.0)
    assert [delta.handle for delta in finish_all(scheduler)] == [2, 3, 1, 4]


def test_a_started_request_is_not_displaced_by_a_higher_priority() -> None:
    scheduler = make(max_running_requests=1)
    scheduler.add(request(1), 0.0)
    step(scheduler)
    scheduler.add(request(2, priority=9), 0.0)
    assert [delta.handle for delta in finish_all(scheduler)] == [1, 2]


def test_equal_prompts_prefill_their_shared_pages_once() -> None:
    scheduler = make(num_pages=200)
    for handle in range(8):
        scheduler.add(request(handle, list(range(30))), 0.0)
    plan, _ = step(scheduler)
    assert [length for _, _, length in rows(plan)] == [30] + [2] * 7
    metrics = scheduler.metrics()
    assert metrics["num_prefill_tokens"] == 30 + 7 * 2 and metrics["num_cached_tokens"] == 7 * 28
    assert metrics["num_prompt_tokens"] == 240 and metrics["num_shared_prefills"] == 7
    assert all(delta.num_cached_tokens == (28 if delta.handle else 0) for delta in finish_all(scheduler))


def test_a_repeated_prompt_is_found_and_its_last_token_computed_anyway() -> None:
    scheduler = make(page_size=16, context_length=300, max_num_batched_tokens=300)
    for handle, length, cached in ((1, 130, 0), (2, 130, 128), (3, 128, 112), (4, 129, 128)):
        scheduler.add(request(handle, list(range(length))), 0.0)
        (delta,) = finish_all(scheduler)
        assert delta.num_cached_tokens == cached


def test_generated_pages_are_found_by_the_next_turn() -> None:
    scheduler = make()
    scheduler.add(request(1, [1, 2, 3], 10), 0.0)
    finish_all(scheduler)
    scheduler.add(request(2, [1, 2, 3] + [7] * 10 + [4, 5], 1), 0.0)
    (delta,) = finish_all(scheduler)
    assert delta.num_cached_tokens == 12, "the last sampled token has no KV"


def test_prompt_logprobs_limit_the_hit() -> None:
    for start, cached in ((None, 16), (0, 0), (1, 0), (5, 4), (9, 8), (17, 16), (20, 16)):
        scheduler = make()
        for handle in range(2):
            scheduler.add(request(handle, list(range(20)), 1, logprobs=LogprobOptions(prompt_start=start)), 0.0)
        plan = planned(scheduler)
        assert plan.row_starts.tolist() == [0, cached], start


def test_without_the_prefix_cache_nothing_is_shared() -> None:
    scheduler = make(prefix_cache=False)
    for handle in range(2):
        scheduler.add(request(handle, list(range(20))), 0.0)
    assert planned(scheduler).row_lengths.tolist() == [20, 20]


def test_namespaces_share_nothing() -> None:
    scheduler = make()
    for handle, extra_key in enumerate(("a", "b", "a")):
        scheduler.add(request(handle, list(range(20)), extra_key=extra_key), 0.0)
    assert planned(scheduler).row_lengths.tolist() == [20, 4, 20]  # one prompt of one namespace stays together


def test_thirty_two_requests_run_together() -> None:
    scheduler = make(max_running_requests=32, num_pages=1000, max_num_batched_tokens=256)
    for handle in range(32):
        scheduler.add(request(handle, 20, 64), 0.0)
    assert len(finish_all(scheduler)) == 32
    assert scheduler.metrics()["num_steps"] <= 80


def test_admission_waits_for_pages_in_order() -> None:
    scheduler = make(num_pages=11)
    scheduler.add(request(1, 20, 8, stop_token_ids=NEVER), 0.0)
    scheduler.add(request(2, 30, 1, stop_token_ids=NEVER), 0.0)
    scheduler.add(request(3, 1, 1, stop_token_ids=NEVER), 0.0)
    assert len(rows(planned(scheduler))) == 1, "a request never passes one that does not fit yet"
    assert scheduler.num_running == 1 and scheduler.num_waiting == 2


def test_the_last_in_rank_is_preempted_and_resumes_from_its_pages() -> None:
    scheduler = make(num_pages=9, context_length=32)
    scheduler.add(request(1, 7, 20, stop_token_ids=NEVER), 0.0)
    scheduler.add(request(2, 7, 20, stop_token_ids=NEVER), 0.0)
    scheduler.add(request(3, 7, 20, stop_token_ids=NEVER, priority=-1), 0.0)
    finished = []
    inits: list[int] = []
    while scheduler.num_started or scheduler.num_waiting:
        plan, deltas = step(scheduler)
        inits += [init.seed for init in plan.new_slots]
        finished += deltas
    assert inits[:3] == [1, 2, 2] and [delta.handle for delta in finished] == [1, 2, 3]
    assert [delta.num_preemptions for delta in finished] == [0, 1, 0]
    assert all(tokens(delta) == [7] * 20 for delta in finished)
    metrics = scheduler.metrics()
    assert metrics["num_preemptions"] == 1 and metrics["num_resumed_tokens"] > 0
    assert finished[1].num_cached_tokens == 0, "the prompt was cached when it ran, not on admission"


def test_preemption_publishes_the_pages_generated_so_far() -> None:
    scheduler = make()
    scheduler.add(request(1, 3, 20), 0.0)
    for _ in range(10):
        step(scheduler)
    scheduler._roster.preempt(0)
    plan = planned(scheduler)
    assert plan.new_slots[0].token_ids.tolist() == [100, 101, 102] + [7] * 10
    assert rows(plan) == [(0, 12, 1)]


def test_no_more_are_preempted_than_the_pages_in_flight_leave_missing() -> None:
    scheduler = make(num_pages=7, overlap_depth=1, context_length=20, prefix_cache=False)
    for handle in (1, 2, 3):
        scheduler.add(request(handle, 3, 10, stop_token_ids=NEVER), 0.0)
    pending = [planned(scheduler)]
    while not scheduler.metrics()["num_preemptions"]:
        plan = scheduler.plan()
        if plan is None:
            scheduler.apply(answer(pending.pop(0)))
        else:
            pending.append(plan)
    assert scheduler.metrics()["num_preemptions"] == 1 and scheduler.num_running >= 1
    assert scheduler.num_started == scheduler.num_running + 1


def test_nothing_new_enters_while_a_preempted_sequence_waits() -> None:
    scheduler = make(overlap_depth=1)
    scheduler.add(request(1, 5, 20), 0.0)
    first = planned(scheduler)
    second = planned(scheduler)
    scheduler._roster.preempt(0)
    scheduler.add(request(2, 5, 3, priority=7), 0.0)
    scheduler.apply(answer(first))
    assert scheduler.plan() is None, "the preempted sequence still holds its slot"
    scheduler.apply(answer(second))
    plan = planned(scheduler)
    assert [init.seed for init in plan.new_slots] == [1, 2]
    assert plan.new_slots[0].token_ids.tolist() == [100, 101, 102, 103, 104, 7, 7]


def test_overlap_refers_to_tokens_not_known_yet() -> None:
    scheduler = make(overlap_depth=2)
    scheduler.add(request(1, 5, 9), 0.0)
    plans = [planned(scheduler) for _ in range(3)]
    assert scheduler.plan() is None and scheduler.num_in_flight == 3
    assert [plan.token_ids.tolist()[-1] for plan in plans] == [104, LAST_TOKEN, LAST_TOKEN]
    scheduler.apply(answer(plans[0], 31))
    scheduler.apply(answer(plans[1], 32))
    assert planned(scheduler).token_ids.tolist() == [LAST_TOKEN]
    scheduler.apply(answer(plans[2], 33))
    assert scheduler.num_in_flight == 1


def test_a_known_end_is_not_planned_past() -> None:
    scheduler = make(overlap_depth=3)
    scheduler.add(request(1, 5, 2), 0.0)
    plans = [planned(scheduler), planned(scheduler)]
    assert scheduler.plan() is None
    assert [delta for plan in plans for delta in scheduler.apply(answer(plan))][0].finish is not None
    assert scheduler.metrics()["num_overshoot_tokens"] == 0


def test_slot_and_pages_return_with_the_last_step_that_refers_to_them() -> None:
    scheduler = make(overlap_depth=1, max_running_requests=1, prefix_cache=False)
    scheduler.add(request(1, 5, 9, stop_token_ids=(2,)), 0.0)
    scheduler.add(request(2, 5, 9), 0.0)
    first, second = planned(scheduler), planned(scheduler)
    (delta,) = scheduler.apply(answer(first, 2))
    assert delta.finish is not None and delta.finish.matched == 2 and scheduler.num_started == 0
    assert scheduler.num_used_tokens == 8 and scheduler.plan() is None
    assert scheduler.apply(answer(second)) == []
    assert scheduler.num_used_tokens == 0 and scheduler.metrics()["num_overshoot_tokens"] == 1
    assert planned(scheduler).new_slots[0].seed == 2


def test_draining_admits_nothing_new() -> None:
    scheduler = make()
    scheduler.add(request(1, 5, 3), 0.0)
    step(scheduler)
    scheduler.add(request(2), 0.0)
    plan = scheduler.plan(admit_new=False)
    assert plan is not None and len(rows(plan)) == 1
    scheduler.apply(answer(plan))
    while (plan := scheduler.plan(admit_new=False)) is not None:
        scheduler.apply(answer(plan))
    assert scheduler.num_started == 0 and scheduler.num_waiting == 1


def test_rows_admitted_together_are_grouped_by_their_prefix() -> None:
    scheduler = make(num_pages=200)
    for handle, start in enumerate((0, 0, 0, 50, 50, 90)):
        scheduler.add(request(handle, list(range(start, start + 10)), 4), 0.0)
    first, _ = step(scheduler)
    assert first.prefix_groups.tolist() == [[1, 2, 2]], "the row that computes the pages does not start behind them"
    second, _ = step(scheduler)
    assert second.prefix_groups.tolist() == [[0, 3, 2], [3, 2, 2]]
    third, _ = step(scheduler)
    assert third.prefix_groups.tolist() == second.prefix_groups.tolist()


def test_groups_are_cut_where_sharing_drops() -> None:
    pages = np.array(
        [[1, 2, 3, 4], [1, 2, 3, 5], [1, 6, 7, 8], [1, 6, 7, 9], [1, 6, 7, 9], [0, 0, 0, 0]], dtype=np.int32
    )
    slots = np.arange(5)
    full = np.array([4, 4, 4, 3, 3])
    assert find_groups(pages, slots, full, 4).tolist() == [[0, 2, 3], [2, 3, 3]]
    assert find_groups(pages, slots, full, 1).tolist() == [[0, 5, 1]]
    assert find_groups(pages, slots, np.array([4, 0, 4, 3, 3]), 4).tolist() == [[2, 3, 3]]
    assert find_groups(pages, np.array([0, 5]), np.array([1, 1]), 4).tolist() == []
    assert find_groups(pages, slots, full, 0).shape == (0, 3)
