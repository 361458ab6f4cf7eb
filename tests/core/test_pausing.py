"""Pause modes, resume, and what happens to requests meanwhile."""

from __future__ import annotations

import pytest

from headrace.core.fake_executor import FreeExecutor
from headrace.types.messages import Abort, AbortUpdate, CommitUpdate, GiveUp, Pause, Resume
from headrace.types.weights import UpdateReport
from tests.core.harness import VOCAB_SIZE, Core, new_tensors, request


@pytest.mark.parametrize("overlap_depth", [0, 1, 3])
def test_keep_stops_steps_and_goes_on_where_it_stopped(overlap_depth: int) -> None:
    core = Core(overlap_depth=overlap_depth)
    core.submit(request(1, max_new_tokens=20, deliver_every=1))
    core.turn(5)
    core.call(Pause, "keep")
    before = core.tokens(1)
    assert core.status().paused == "keep"
    core.turn(10)
    assert core.tokens(1) == before
    assert not core.is_busy
    core.call(Resume)
    core.settle()
    assert core.tokens(1) == list(range(6, 26))
    assert core.link.deltas[1][-1].num_preemptions == 0


def test_recompute_gives_up_kv_and_keeps_tokens() -> None:
    core = Core(prefix_cache=False)
    core.submit(request(1, max_new_tokens=20))
    core.turn(5)
    assert core.status().num_used_tokens > 0
    core.call(Pause, "recompute")
    assert core.status().num_used_tokens == 0
    assert (core.status().num_running, core.status().num_waiting) == (0, 1)
    core.call(Resume)
    core.settle()
    assert core.tokens(1) == list(range(6, 26))
    assert core.link.deltas[1][-1].num_preemptions == 1


def test_abort_answers_running_and_queued_before_the_reply() -> None:
    core = Core(max_running_requests=1)
    core.submit(request(1, max_new_tokens=50), request(2, max_new_tokens=50))
    core.turn(4)
    call_id = core.start(Pause, "abort")
    core.turn()
    core.answer(call_id)
    assert core.finish_types(1, 2) == ["abort", "abort"]
    assert core.tokens(1) and not core.tokens(2)
    kinds = [type(output).__name__ for output in core.link.outputs]
    assert kinds[-2:] == ["Deltas", "Reply"]


def test_drain_lets_started_ones_finish_and_starts_no_other() -> None:
    core = Core(max_running_requests=1)
    core.submit(request(1, max_new_tokens=20), request(2, max_new_tokens=20))
    core.turn(3)
    call_id = core.start(Pause, "drain")
    core.turn()
    assert call_id not in core.link.replies
    core.settle()
    core.answer(call_id)
    assert core.finish_types(1, 2) == ["length", None]
    core.call(Resume)
    core.settle()
    assert core.finish_types(2) == ["length"]


def test_drain_has_a_deadline_and_then_nothing_is_paused() -> None:
    core = Core()
    core.submit(request(1, max_new_tokens=200))
    core.turn(3)
    call_id = core.start(Pause, "drain", deadline=core.clock.now + 30.0)
    core.turn()
    core.clock.now += 30.0
    core.turn()
    assert core.error(call_id).code == "DeadlineError"
    assert core.status().paused == ""
    core.settle()
    assert core.finish_types(1) == ["length"]


@pytest.mark.parametrize("before", ["keep", "recompute", "abort"])
@pytest.mark.parametrize("how", ["late", "given up"])
def test_a_drain_that_is_undone_leaves_the_pause_before_it(before: str, how: str) -> None:
    core = Core()
    core.submit(request(1, max_new_tokens=200, deliver_every=1))
    core.turn(3)
    core.call(Pause, before)
    core.submit(request(2, max_new_tokens=200))
    drain = core.start(Pause, "drain", deadline=core.clock.now + 5.0)
    core.turn(3)
    assert core.status().paused == ("drain" if before == "keep" else core.status().paused)
    if how == "late":
        core.clock.now += 5.0
        core.turn()
    else:
        core.call(GiveUp, drain)
    if before == "keep":
        assert core.error(drain).code == "DeadlineError"
        assert core.status().paused == "keep"
        found = core.tokens(1)
        core.turn(5)
        assert core.tokens(1) == found  # no step is left of the drain
    core.call(Resume)
    assert core.status().paused == ""


@pytest.mark.parametrize("mode", ["keep", "recompute", "abort", "drain"])
def test_a_pause_given_up_after_its_answer_pauses_nobody(mode: str) -> None:
    core = Core()
    core.submit(request(1, max_new_tokens=30))
    core.turn(3)
    pause = core.start(Pause, mode)
    core.until(lambda: pause in core.link.replies)
    core.call(GiveUp, pause)
    assert core.status().paused == ""
    core.submit(request(2, max_new_tokens=3))
    core.settle()
    assert core.finish_types(2) == ["length"]


def test_of_two_pausers_the_one_who_gives_up_takes_nothing_from_the_other() -> None:
    core = Core()
    first, second = core.start(Pause, "keep"), core.start(Pause, "abort")
    core.turn()
    core.call(GiveUp, second)
    assert core.status().paused == "keep"
    third = core.start(Pause, "recompute")
    core.turn()
    core.call(GiveUp, first)
    assert core.status().paused == "recompute"
    core.call(GiveUp, third)
    assert core.status().paused == ""
    late = core.start(Pause, "keep")
    core.turn()
    core.call(Resume)
    core.call(Pause, "abort")
    core.call(GiveUp, late)  # a resume has ended it, and another pause is none of its business
    assert core.status().paused == "abort"


def test_each_of_two_drains_has_its_own_deadline() -> None:
    core = Core()
    core.submit(request(1, max_new_tokens=60))
    core.turn(3)
    hasty, patient = (
        core.start(Pause, "drain", deadline=core.clock.now + 5.0),
        core.start(Pause, "drain", deadline=core.clock.now + 90.0),
    )
    core.turn()
    assert core.loop._time_to_deadline() <= 5.0
    core.clock.now += 5.0
    core.turn()
    assert core.error(hasty).code == "DeadlineError"
    assert patient not in core.link.replies and core.status().paused == "drain"
    core.settle()
    core.answer(patient)
    assert core.status().paused == "drain"


def test_a_later_pause_or_resume_replaces_a_drain() -> None:
    core = Core()
    core.submit(request(1, max_new_tokens=200))
    core.turn(3)
    first = core.start(Pause, "drain")
    joined = core.start(Pause, "drain")
    core.turn()
    core.call(Pause, "keep")
    assert core.error(first).code == core.error(joined).code == "UpdateConflictError"
    assert core.status().paused == "keep"
    again = core.start(Pause, "drain")
    core.turn(3)
    core.call(Resume)
    assert core.error(again).code == "UpdateConflictError"
    core.settle()
    assert core.finish_types(1) == ["length"]


def test_a_drain_that_was_replaced_pauses_nobody_any_more() -> None:
    core = Core()
    core.submit(request(1, max_new_tokens=200))
    core.turn(3)
    drain = core.start(Pause, "drain")
    core.turn()
    keep = core.start(Pause, "keep")
    core.turn()
    assert core.error(drain).code == "UpdateConflictError"
    core.call(GiveUp, keep)
    assert core.status().paused == ""
    core.settle()
    assert core.finish_types(1) == ["length"]


@pytest.mark.parametrize("ends", [False, True])
def test_whether_a_drain_ends_or_is_undone_no_step_is_in_flight_then(ends: bool) -> None:
    executor = FreeExecutor(VOCAB_SIZE)
    core = Core(executor, overlap_depth=3)
    core.submit(request(1, max_new_tokens=50 if ends else 200, deliver_every=1))
    core.turn(5)
    assert executor._plans
    core.call(Pause, "keep")
    drain = core.start(Pause, "drain")
    if ends:
        core.until(lambda: drain in core.link.replies)
        core.answer(drain)
    else:
        core.turn(5)
        assert executor._plans
        core.start(GiveUp, drain)
        core.turn()
        assert core.error(drain).code == "DeadlineError"
    assert not executor._plans and core.status().paused == ("drain" if ends else "keep")


def test_a_drain_while_paused_runs_what_was_kept() -> None:
    core = Core()
    core.submit(request(1, max_new_tokens=20))
    core.turn(3)
    core.call(Pause, "keep")
    core.submit(request(2))
    core.call(Pause, "drain")
    assert core.finish_types(1, 2) == ["length", None]
    assert core.status().paused == "drain"


def test_a_drain_of_requests_that_an_update_holds_waits_for_its_sender_no_longer_than_it_must() -> None:
    """He may be who asks for it, so he is told at once, unless a call of his is in progress: that has an end."""
    core, tensors = Core(), new_tensors(3.0)
    core.submit(request(1, max_new_tokens=200))
    core.turn(3)
    session = core.begin(tensors, mode="inplace", in_flight="keep")
    core.stage(session, tensors, ["k.weight"])
    refusal = core.refused(Pause, "drain")
    assert (refusal.code, refusal.field) == ("UpdateConflictError", "mode")
    assert f"session {session} holds requests in flight" in refusal.message
    assert core.status().paused == ""
    core.stage(session, tensors, [name for name in tensors if name != "k.weight"])
    commit, drain = core.start(CommitUpdate, session), core.start(Pause, "drain")
    core.settle()
    core.answer(commit, UpdateReport)
    core.answer(drain)
    assert core.finish_types(1) == ["length"] and core.status().paused == "drain"


def test_a_drain_that_an_update_keeps_waiting_names_it() -> None:
    core, tensors = Core(), new_tensors(3.0)
    core.submit(request(1, max_new_tokens=200))
    core.turn(3)
    drain = core.start(Pause, "drain", deadline=core.clock.now + 5.0)
    core.turn()
    session = core.begin(tensors, mode="inplace", in_flight="keep")
    core.stage(session, tensors, ["k.weight"])
    core.clock.now += 5.0
    core.turn()
    assert f"held by session {session} at the deadline" in core.error(drain).message
    assert core.status().paused == ""
    core.call(AbortUpdate, session)


def test_requests_queue_behind_a_pause_and_are_refused_in_time() -> None:
    core = Core(pause_timeout=10.0)
    core.submit(request(1, max_new_tokens=50))
    core.turn(3)
    core.call(Pause, "keep")
    core.submit(request(2))
    core.settle()
    core.clock.now += 6.0
    core.submit(request(3))
    core.settle()
    assert core.finish_types(1, 2, 3) == [None, None, None]
    core.clock.now += 4.1
    core.settle()
    assert core.finish_types(1, 2, 3) == [None, "error", None]
    finish = core.finish(2)
    assert finish is not None and finish.error is not None
    assert finish.error.code == "PauseTimeoutError"
    assert finish.error.retryable
    core.call(Resume)
    core.settle()
    assert core.finish_types(1, 3) == ["length", "length"]


def test_waiting_before_the_pause_does_not_count_against_it() -> None:
    core = Core(pause_timeout=10.0, max_running_requests=1)
    core.submit(request(1, max_new_tokens=200), request(2))
    core.turn(3)
    core.clock.now += 100.0
    core.call(Pause, "keep")
    core.clock.now += 9.0
    core.turn(3)
    assert core.finish_types(2) == [None]
    core.clock.now += 1.5
    core.turn(3)
    assert core.finish_types(2) == ["error"]


def test_abort_works_while_paused() -> None:
    core = Core()
    core.submit(request(1, max_new_tokens=50))
    core.turn(4)
    core.call(Pause, "keep")
    core.submit(request(2))
    core.send(Abort((1, 2)))
    core.settle()
    assert core.finish_types(1, 2) == ["abort", "abort"]
    assert len(core.tokens(1)) > 0
    assert core.status().num_used_tokens == 0


def test_a_paused_loop_sleeps_until_its_next_deadline() -> None:
    core = Core(pause_timeout=10.0)
    core.submit(request(1, max_new_tokens=50))
    core.turn(3)
    core.call(Pause, "keep")
    core.submit(request(2))
    core.settle()
    assert 9.0 < core.loop._time_to_deadline() <= 10.0
    core.send(Abort((1, 2, 3)))
    core.settle()
    assert core.loop._time_to_deadline() > 1000.0
