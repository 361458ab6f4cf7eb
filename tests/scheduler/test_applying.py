"""What comes of a step: tokens, ends, deltas, versions, and what commands between steps do."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from headrace.scheduler import Scheduler
from headrace.types.errors import ErrorInfo
from headrace.types.plan import LAST_TOKEN, PositionLogprobs, PromptLogprobs, StepPlan, StepResult
from headrace.types.request import Delta, unpack_floats, unpack_ids
from headrace.types.sampling_params import LogprobOptions
from tests.scheduler.builders import answer, finish_all, make, make_timed, planned, request, rows, step, tokens

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


def test_deltas_say_when_a_request_started_and_had_its_first_token() -> None:
    """The first and the last do; what is preempted has started but once; one that never started has no times."""
    now = [10.0]
    scheduler = make_timed(lambda: now[0], max_running_requests=2)
    for handle, every in ((1, 1), (2, 0), (3, 0)):
        scheduler.add(request(handle, 5, 4, deliver_every=every), 0.0)
    found: list[Delta] = []
    for _ in range(2):
        plan = planned(scheduler)
        now[0] += 1.0
        found += scheduler.apply(answer(plan))
    assert [delta.times for delta in found] == [(10.0, 11.0), ()]
    scheduler.recompute_running()
    (waiting,) = scheduler.abort([3], "Aborted")
    assert waiting.times == (0.0, 0.0)
    ends = [delta for delta in finish_all(scheduler) if delta.finish is not None]
    assert {delta.handle: delta.times for delta in ends} == {1: (10.0, 11.0), 2: (10.0, 11.0)}


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


def several(plan: StepPlan, *token_ids: list[int]) -> StepResult:
    """The answer with several tokens for each sampling row, each token being its log-probability too."""
    width = max(map(len, token_ids))
    padded = np.array([[*row, *[-1] * (width - len(row))] for row in token_ids], dtype=np.int32)
    return StepResult(
        plan.step_id, padded, padded.astype(np.float32), np.array([len(row) for row in token_ids], np.int32)
    )


def test_several_tokens_a_step_meet_steps_in_flight() -> None:
    scheduler = make(overlap_depth=1)
    scheduler.add(request(1, 5, 9, logprobs=LogprobOptions(num_top=1)), 0.0)
    first, second = planned(scheduler), planned(scheduler)
    assert rows(second) == [(0, 5, 1)] and second.token_ids.tolist() == [LAST_TOKEN]
    assert scheduler.apply(_with_extras(several(first, [50, 60, 70]), 5)) == []
    third = planned(scheduler)  # position 5 is in flight; 6 and 7 are known now
    assert rows(third) == [(0, 6, 2)] and third.token_ids.tolist() == [60, 70]
    assert scheduler.apply(_with_extras(several(second, [60, 70, 80, 90]), 6)) == []
    fourth = planned(scheduler)  # 8 and 9 came with the second step; the third was issued for the first of them
    assert rows(fourth) == [(0, 8, 2)] and fourth.token_ids.tolist() == [80, 90]
    assert scheduler.apply(_with_extras(several(third, [80]), 8)) == []
    fifth = planned(scheduler)
    assert rows(fifth) == [(0, 10, 1)] and fifth.token_ids.tolist() == [LAST_TOKEN]
    delta = finished(scheduler.apply(_with_extras(several(fourth, [100, 110, 120, 130, 140]), 10)))
    assert tokens(delta) == unpack_floats(delta.logprobs).tolist() == list(range(50, 140, 10))
    assert unpack_ids(delta.extras.top_ids).tolist() == list(range(5, 14))
    assert scheduler.apply(several(fifth, [110])) == []
    assert scheduler.num_used_tokens == 0 and scheduler.metrics()["num_overshoot_tokens"] == 5


def test_behind_a_step_without_a_token_nothing_counts() -> None:
    scheduler = make(overlap_depth=1)
    scheduler.add(request(1, 5, 4), 0.0)
    scheduler.add(request(2, 5, 4), 0.0)
    scheduler.apply(answer(planned(scheduler)))
    second, third = planned(scheduler), planned(scheduler)
    empty = answer(second)
    assert scheduler.apply(msgspec.structs.replace(empty, num_tokens=np.array([0, 1], np.int32))) == []
    fourth = planned(scheduler)
    assert rows(fourth) == [(1, 7, 1)], "the other goes on, and it waits for the step behind"
    assert scheduler.apply(answer(third, lambda slot: 99 if slot == 0 else 7)) == []
    plan = planned(scheduler)
    assert [init.token_ids.tolist() for init in plan.new_slots] == [[100, 101, 102, 103, 104, 7]]
    assert rows(plan) == [(0, 4, 2)], "the whole page is found again"
    (first,) = scheduler.apply(answer(fourth))
    last = finished([*scheduler.apply(answer(plan)), *finish_all(scheduler)])
    assert tokens(first) == tokens(last) == [7] * 4
    assert (first.num_preemptions, last.num_preemptions) == (0, 1)
    assert scheduler.metrics()["num_overshoot_tokens"] == 1 and scheduler.num_used_tokens == 0


def _with_extras(result: StepResult, first: int) -> StepResult:
    """The same, with top ids that say which position they belong to."""
    positions = np.arange(first, first + result.token_ids.shape[1], dtype=np.int32)[:, None]
    values = PositionLogprobs(positions, positions.astype(np.float32), np.zeros((len(positions), 0), np.float32))
    return msgspec.structs.replace(result, extras={0: values})


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


@pytest.mark.parametrize("state", ["running", "preempted", "scored"])
def test_without_output_there_is_nothing_to_keep(state: str) -> None:
    scheduler = make(max_num_batched_tokens=8)
    options = LogprobOptions(prompt_start=0) if state == "scored" else LogprobOptions()
    scheduler.add(request(1, 21, 4, logprobs=options), 0.0)
    first = planned(scheduler)
    scheduler.apply(score(first, 1, 8) if state == "scored" else answer(first))
    scheduler.apply(score(planned(scheduler), 9, 8) if state == "scored" else answer(planned(scheduler)))
    if state == "preempted":
        scheduler._roster.preempt(0)
    scheduler.set_weights("next", 1)
    plan = planned(scheduler)
    assert len(plan.new_slots) == 1 and rows(plan)[0][1:] == (0, 8)
    assert plan.new_slots[0].logprobs == options
    if state == "scored":
        scheduler.apply(score(plan, 1, 8))
        scheduler.apply(score(planned(scheduler), 9, 8))
        scheduler.apply(score(planned(scheduler), 17, 4))
    else:
        scheduler.apply(answer(plan))
    delta = finished(finish_all(scheduler))
    assert delta.spans == (("next", 4),) and delta.span_epochs == (1,)
    assert delta.prompt_spans == ((("next", 21),) if state == "scored" else ())
    assert delta.num_preemptions == 1 and delta.num_cached_tokens == 0


def test_samples_of_one_prompt_share_it_again_after_an_update() -> None:
    scheduler = make(max_num_batched_tokens=8, max_running_requests=4)
    prompt = list(range(21))
    for handle in range(4):
        scheduler.add(request(handle, prompt, 2), 0.0)
    step(scheduler)
    step(scheduler)
    scheduler.set_weights("next", 1)
    deltas = finish_all(scheduler)
    assert [delta.spans for delta in deltas] == [(("next", 2),)] * 4
    assert scheduler.metrics()["num_prefill_tokens"] < 16 + 21 + 4 * 5


def test_a_resumed_sequence_that_computed_only_part_of_what_it_knows_is_computed_again() -> None:
    scheduler = make(max_num_batched_tokens=8)
    scheduler.add(request(1, 8, 9), 0.0)
    for _ in range(4):
        step(scheduler)
    scheduler._roster.preempt(0)
    scheduler.flush_cache()
    plan, _ = step(scheduler)
    assert rows(plan) == [(0, 0, 8)]
    scheduler.set_weights("next", 1)
    plan, _ = step(scheduler)
    assert len(plan.new_slots) == 1 and rows(plan) == [(0, 0, 8)]
    assert finished(finish_all(scheduler)).spans == (("default", 4), ("next", 5))


def test_a_label_given_twice_makes_two_spans() -> None:
    scheduler = make()
    scheduler.add(request(1, 5, 6), 0.0)
    step(scheduler)
    step(scheduler)
    scheduler.set_weights("default", 1)
    step(scheduler)
    scheduler.relabel("other")
    scheduler.relabel("default")
    delta = finished(finish_all(scheduler))
    assert [sum(count for _, count in delta.spans[:number]) for number in (1, 3)] == [2, 6]
    assert delta.span_epochs == (0, 1, 1) and {version for version, _ in delta.spans} == {"default"}


def test_prompt_scores_name_the_labels_they_were_made_under() -> None:
    scheduler = make(max_num_batched_tokens=8)
    scheduler.add(request(1, 20, 0, logprobs=LogprobOptions(prompt_start=3)), 0.0)
    scheduler.apply(score(planned(scheduler), 3, 6))
    scheduler.relabel("other")
    scheduler.apply(score(planned(scheduler), 9, 8))
    delta = finished(scheduler.apply(score(planned(scheduler), 17, 3)))
    assert delta.prompt_spans == (("default", 9), ("other", 11))


@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize("wants_scores", [True, False])
def test_a_request_for_no_tokens_names_the_weights_that_computed_it(length: int, wants_scores: bool) -> None:
    scheduler = make(max_num_batched_tokens=8)
    scheduler.add(request(1, 30, 0), 0.0)
    step(scheduler)
    scheduler.add(request(2, length, 0, logprobs=LogprobOptions(prompt_start=0 if wants_scores else None)), 0.0)
    scheduler.set_weights("next", 1)
    found = {delta.handle: delta.prompt_spans for delta in finish_all(scheduler)}
    assert found == {1: (("next", 30),), 2: (("next", length),)}


def test_kept_sequences_go_on_and_are_never_published() -> None:
    scheduler = make()
    scheduler.add(request(1, list(range(10)), 9), 0.0)
    for _ in range(3):
        step(scheduler)
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
