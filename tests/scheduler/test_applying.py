"""What comes of a step: tokens, ends, deltas, versions, and what commands between steps do."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.scheduler import Scheduler
from headrace.types.errors import ErrorInfo
from headrace.types.plan import PositionLogprobs, PromptLogprobs, StepPlan, StepResult
from headrace.types.request import Delta, unpack_floats, unpack_ids
from headrace.types.sampling_params import LogprobOptions
from tests.scheduler.builders import answer, finish_all, make, planned, request, rows, step, tokens

ERROR = ErrorInfo("DeadlineError", "too late")


def finished(deltas: list[Delta]) -> Delta:
    """The only delta, which must be terminal."""
    (delta,) = deltas
    assert delta.finish is not None
    return delta


def test_a_request_that_does_not_stream_gets_one_delta() -> None:
    scheduler = make()
    scheduler.add(request(1, 5, 3), 0.0)
    assert [step(scheduler)[1] for _ in range(2)] == [[], []]
    delta = finished(step(scheduler)[1])
    assert delta.finish is not None and delta.finish.type == "length" and delta.finish.matched is None
    assert tokens(delta) == [7, 7, 7] and unpack_floats(delta.logprobs).tolist() == [-0.5] * 3
    assert delta.spans == (("default", 3),) and scheduler.plan() is None


def test_a_streaming_request_gets_a_delta_every_so_many_tokens() -> None:
    scheduler = make()
    scheduler.add(request(1, 5, 7, deliver_every=3), 0.0)
    counts = [[len(tokens(delta)) for delta in step(scheduler)[1]] for _ in range(7)]
    assert counts == [[], [], [3], [], [], [3], [1]]


def test_stop_ids_end_a_sequence_and_are_kept() -> None:
    scheduler = make()
    scheduler.add(request(1, 5, 9, stop_token_ids=(7, 8)), 0.0)
    step(scheduler, 6)
    delta = finished(step(scheduler, 8)[1])
    assert delta.finish is not None and (delta.finish.type, delta.finish.matched) == ("stop", 8)
    assert tokens(delta) == [6, 8]


def test_more_stop_ids_than_fit_a_row_work_too() -> None:
    scheduler = make()
    scheduler.add(request(1, 5, 9, stop_token_ids=tuple(range(100, 140))), 0.0)
    scheduler.add(request(2, 5, 9, stop_token_ids=(1,)), 0.0)
    assert step(scheduler, 99)[1] == []
    assert finished(step(scheduler, 139)[1]).handle == 1
    assert step(scheduler, 139)[1] == []


def test_stop_ids_do_not_end_a_sequence_before_its_minimum() -> None:
    scheduler = make()
    scheduler.add(request(1, 5, 9, stop_token_ids=(7,), min_new_tokens=2), 0.0)
    assert tokens(finished(finish_all(scheduler))) == [7, 7, 7]


def test_scoring_finishes_without_tokens() -> None:
    scheduler = make(max_num_batched_tokens=4)
    for handle, length in ((1, 10), (2, 1)):
        scheduler.add(request(handle, length, 0), 0.0)
    deltas = finish_all(scheduler)
    assert sorted(delta.handle for delta in deltas) == [1, 2]
    assert all(d.finish and d.finish.type == "length" and not d.token_ids and not d.spans for d in deltas)
    assert scheduler.num_used_tokens == 0


def score(plan: StepPlan, first: int, count: int) -> StepResult:
    """The answer with prompt values -first, -(first + 1), .. for row 0."""
    values = -np.arange(first, first + count, dtype=np.float32)
    column = np.arange(first, first + count, dtype=np.int32)[:, None]
    extras = PositionLogprobs(column, column.astype(np.float32), np.zeros((count, 0), np.float32))
    base = answer(plan)
    scored = {0: PromptLogprobs(first, values, extras)}
    return StepResult(base.step_id, base.token_ids, base.logprobs, base.num_tokens, {}, scored)


def test_prompt_logprobs_come_once_with_the_first_delta() -> None:
    scheduler = make(max_num_batched_tokens=3)
    options = LogprobOptions(prompt_start=0, num_top=1)
    scheduler.add(request(1, 5, 2, logprobs=options, deliver_every=1), 0.0)
    assert scheduler.apply(score(planned(scheduler), 1, 3)) == []
    plan = planned(scheduler)
    one = np.ones((1, 1), np.int32)
    extras = {0: PositionLogprobs(one, one.astype(np.float32), np.zeros((1, 0), np.float32))}
    result = score(plan, 4, 1)
    deltas = scheduler.apply(
        StepResult(plan.step_id, result.token_ids, result.logprobs, result.num_tokens, extras, result.prompt_logprobs)
    )
    (delta,) = deltas
    values = unpack_floats(delta.prompt_logprobs).tolist()
    assert np.isnan(values[0]) and values[1:] == [-1, -2, -3, -4]
    assert unpack_ids(delta.prompt_extras.top_ids).tolist() == [0, 1, 2, 3, 4]
    assert unpack_ids(delta.extras.top_ids).tolist() == [1]
    plan = planned(scheduler)
    base = answer(plan)
    (last,) = scheduler.apply(StepResult(plan.step_id, base.token_ids, base.logprobs, base.num_tokens, extras))
    assert last.finish is not None and not last.prompt_logprobs and unpack_ids(last.extras.top_ids).tolist() == [1]


def test_a_resumed_prompt_is_not_scored_again() -> None:
    scheduler = make(max_num_batched_tokens=6)
    scheduler.add(request(1, 14, 3, logprobs=LogprobOptions(prompt_start=0)), 0.0)
    scheduler.apply(score(planned(scheduler), 1, 6))
    scheduler._roster.preempt(0)
    plan = planned(scheduler)
    assert plan.new_slots[0].logprobs.prompt_start == 7 and rows(plan)[0][1] == 4
    scheduler.apply(score(plan, 7, 4))
    scheduler.apply(score(planned(scheduler), 11, 3))
    scheduler._roster.preempt(0)
    plan = planned(scheduler)
    assert plan.new_slots[0].logprobs.prompt_start is None
    scheduler.apply(answer(plan))
    values = unpack_floats(finished(finish_all(scheduler)).prompt_logprobs).tolist()
    assert values[1:] == [-position for position in range(1, 14)]


def test_several_tokens_a_step_end_at_the_first_stop() -> None:
    scheduler = make()
    scheduler.add(request(1, 5, 20, stop_token_ids=(9,)), 0.0)
    scheduler.add(request(2, 5, 4), 0.0)
    plan = planned(scheduler)
    token_ids = np.array([[5, 6, 7], [1, 2, 0]], dtype=np.int32)
    logprobs = -token_ids.astype(np.float32)
    assert scheduler.apply(StepResult(plan.step_id, token_ids, logprobs, np.array([3, 2], np.int32))) == []
    plan = planned(scheduler)
    assert rows(plan) == [(0, 5, 3), (1, 5, 2)] and plan.token_ids.tolist() == [5, 6, 7, 1, 2]
    token_ids = np.array([[8, 9, 4], [3, 4, 5]], dtype=np.int32)
    deltas = scheduler.apply(
        StepResult(plan.step_id, token_ids, -token_ids.astype(np.float32), np.array([3, 3], np.int32))
    )
    assert {delta.handle: tokens(delta) for delta in deltas} == {1: [5, 6, 7, 8, 9], 2: [1, 2, 3, 4]}
    assert unpack_floats(deltas[0].logprobs).tolist() in ([-5, -6, -7, -8, -9], [-1, -2, -3, -4])
    assert scheduler.num_started == 0 and scheduler.metrics()["num_overshoot_tokens"] == 2


def started(state: str) -> Scheduler:
    """A scheduler whose only request (11 prompt tokens, handle 1) is in the named state."""
    scheduler = make(max_num_batched_tokens=8, overlap_depth=1)
    scheduler.add(request(1, 11, 9), 0.0)
    if state == "waiting":
        return scheduler
    first = planned(scheduler)
    if state == "prefill":
        scheduler.apply(answer(first))
        return scheduler
    second = planned(scheduler)
    scheduler.apply(answer(first))
    if state == "in flight":
        return scheduler
    scheduler.apply(answer(second))
    if state == "preempted":
        scheduler._roster.preempt(0)
    elif state == "leaving":
        planned(scheduler)
        scheduler._roster.preempt(0)
    return scheduler


@pytest.mark.parametrize(
    ("state", "count"),
    [("waiting", 0), ("prefill", 0), ("in flight", 0), ("running", 1), ("preempted", 1), ("leaving", 1)],
)
def test_abort_answers_in_every_state_with_what_there_is(state: str, count: int) -> None:
    scheduler = started(state)
    delta = finished(scheduler.abort([1, 77], "enough"))
    assert delta.finish is not None and (delta.finish.type, delta.finish.message) == ("abort", "enough")
    assert len(tokens(delta)) == len(unpack_floats(delta.logprobs)) == sum(n for _, n in delta.spans) == count
    assert scheduler.num_started == scheduler.num_waiting == 0
    assert scheduler.abort([1], "again") == scheduler.abort(None, "again") == []
    while scheduler.num_in_flight:
        step_id = scheduler._in_flight[0].step_id
        samples = int(np.count_nonzero(scheduler._in_flight[0].rows.samples))
        ones = np.ones((samples, 1), np.int32)
        assert scheduler.apply(StepResult(step_id, ones, ones.astype(np.float32), ones[:, 0])) == []
    assert scheduler.num_used_tokens == 0 and scheduler.plan() is None


def test_failing_and_discarding_are_kinds_of_ending() -> None:
    scheduler = make()
    for handle in range(4):
        scheduler.add(request(handle), 0.0)
    step(scheduler)
    delta = finished(scheduler.fail([2], ERROR))
    assert delta.finish is not None and (delta.finish.type, delta.finish.error) == ("error", ERROR)
    scheduler.discard([0, 0, 99])
    assert sorted(delta.handle for delta in finish_all(scheduler)) == [1, 3]
    metrics = scheduler.metrics()
    assert (metrics["num_finished"], metrics["num_failed"], metrics["num_aborted"]) == (3, 1, 0)


def test_only_requests_that_never_started_expire() -> None:
    scheduler = make(max_running_requests=1)
    for handle, now in ((1, 0.0), (2, 1.0), (3, 5.0)):
        scheduler.add(request(handle), now)
    step(scheduler)
    assert finished(scheduler.expire(4.0, ERROR)).handle == 2
    assert scheduler.expire(4.0, ERROR) == [] and scheduler.num_waiting == 1


def test_tokens_bear_the_version_their_step_was_issued_with() -> None:
    scheduler = make(overlap_depth=1)
    scheduler.add(request(1, 5, 6), 0.0)
    first = planned(scheduler)
    scheduler.relabel("a")
    second = planned(scheduler)
    scheduler.apply(answer(first))
    scheduler.relabel("b")
    scheduler.relabel("b")
    third = planned(scheduler)
    scheduler.apply(answer(second))
    scheduler.apply(answer(third))
    delta = finished(finish_all(scheduler))
    assert delta.spans == (("default", 1), ("a", 1), ("b", 4))


def test_new_weights_never_meet_old_pages() -> None:
    scheduler = make()
    scheduler.add(request(1, list(range(20)), 1), 0.0)
    finish_all(scheduler)
    scheduler.set_weights("next", 1)
    scheduler.add(request(2, list(range(20)), 1), 0.0)
    plan, deltas = step(scheduler)
    assert plan.epoch == 1 and finished(deltas).num_cached_tokens == 0
    assert finished(deltas).spans == (("next", 1),)


@pytest.mark.parametrize("says_so", [True, False])
def test_kept_sequences_go_on_and_are_never_published(says_so: bool) -> None:
    scheduler = make()
    scheduler.add(request(1, list(range(10)), 9), 0.0)
    for _ in range(3):
        step(scheduler)
    if says_so:
        scheduler.keep_running()
    scheduler.set_weights("next", 1)
    plan, _ = step(scheduler)
    assert plan.new_slots == () and rows(plan) == [(0, 12, 1)]
    assert finished(finish_all(scheduler)).spans == (("default", 3), ("next", 6))
    scheduler.add(request(2, list(range(10)) + [7] * 9, 1), 0.0)
    assert finished(finish_all(scheduler)).num_cached_tokens == 0


def test_recomputed_sequences_rebuild_their_pages_before_anything_new() -> None:
    scheduler = make(max_running_requests=2)
    for handle in range(3):
        scheduler.add(request(handle, list(range(10)), 6), 0.0)
    step(scheduler)
    scheduler.recompute_running()
    assert scheduler.num_running == 0 and scheduler.num_started == 2
    scheduler.set_weights("next", 1)
    plan, _ = step(scheduler)
    assert [init.seed for init in plan.new_slots] == [0, 1] and plan.row_starts.tolist() == [0, 8]
    assert plan.new_slots[0].token_ids.tolist() == [*range(10), 7]
    deltas = {delta.handle: delta for delta in finish_all(scheduler)}
    assert deltas[0].spans == (("default", 1), ("next", 5)) and deltas[2].spans == (("next", 6),)
    assert deltas[0].num_preemptions == 1


def test_a_prompt_half_scored_under_old_weights_is_scored_anew() -> None:
    scheduler = make(max_num_batched_tokens=6)
    scheduler.add(request(1, 10, 1, logprobs=LogprobOptions(prompt_start=0)), 0.0)
    scheduler.apply(score(planned(scheduler), 1, 6))
    scheduler.recompute_running()
    scheduler.set_weights("next", 1)
    assert planned(scheduler).new_slots[0].logprobs.prompt_start == 0


def test_a_waiting_prompt_half_scored_under_old_weights_is_scored_anew() -> None:
    scheduler = make(max_num_batched_tokens=6)
    scheduler.add(request(1, 10, 1, logprobs=LogprobOptions(prompt_start=0)), 0.0)
    scheduler.apply(score(planned(scheduler), 1, 6))
    planned(scheduler)
    assert scheduler.lose_step(ERROR) == [] and scheduler.num_running == 0
    scheduler.recompute_running()
    scheduler.set_weights("next", 1)
    assert planned(scheduler).new_slots[0].logprobs.prompt_start == 0


def test_flush_frees_what_is_cached_and_harms_nothing() -> None:
    scheduler = make()
    scheduler.add(request(1, list(range(20)), 1), 0.0)
    finish_all(scheduler)
    scheduler.add(request(2, list(range(20)), 9), 0.0)
    step(scheduler)
    assert scheduler.flush_cache() == 1, "page 5 of the first prompt; the second leases the others"
    assert scheduler.metrics()["num_cached_pages"] == 0
    assert tokens(finished(finish_all(scheduler))) == [7] * 9
    assert scheduler.metrics()["num_free_pages"] == 100


def test_a_lost_step_sends_everybody_back_and_harms_nobody() -> None:
    scheduler = make(max_num_batched_tokens=8, max_running_requests=2)
    for handle in (1, 2, 3):
        scheduler.add(request(handle, 8, 4), 0.0)
    step(scheduler)
    planned(scheduler)
    assert scheduler.lose_step(ERROR) == []
    assert scheduler.num_in_flight == scheduler.num_used_tokens == scheduler.num_running == 0
    assert scheduler.metrics()["num_cached_pages"] == 0, "pages that were never written are not cached"
    deltas = finish_all(scheduler)
    assert [delta.handle for delta in deltas] == [1, 2, 3] and [tokens(delta) for delta in deltas] == [[7] * 4] * 3
    assert scheduler.metrics()["num_failed_steps"] == 1 and scheduler.metrics()["num_failed"] == 0


def test_results_must_come_in_order() -> None:
    scheduler = make(overlap_depth=1)
    scheduler.add(request(1, 5, 6), 0.0)
    planned(scheduler)
    with pytest.raises(AssertionError, match="result 1 came for step 0"):
        scheduler.apply(answer(planned(scheduler)))


def test_metrics_account_for_every_page() -> None:
    scheduler = make()
    scheduler.add(request(1, 10, 3), 0.0)
    step(scheduler)
    metrics = scheduler.metrics()
    assert metrics["num_running"] == 1 and metrics["num_waiting"] == 0
    assert metrics["num_used_tokens"] == 12 and metrics["max_total_num_tokens"] == 400
    finish_all(scheduler)
    metrics = scheduler.metrics()
    assert metrics["num_used_tokens"] == 0 and metrics["num_free_pages"] + metrics["num_cached_pages"] == 100
    expected = {"num_steps": 3, "num_scheduled_tokens": 12, "num_prefill_tokens": 10, "num_decode_tokens": 2}
    assert {name: metrics[name] for name in expected} == expected
    assert metrics["num_generated_tokens"] == 3 and metrics["num_finished"] == 1
