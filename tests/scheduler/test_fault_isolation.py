"""Who runs with whom after a step failed, and who is found to be the culprit."""

from __future__ import annotations

import pytest

from headrace.scheduler import Scheduler
from headrace.scheduler.fault_isolation import MAX_LONE_FAILURES, FaultIsolation
from headrace.scheduler.sequence import Sequence, State
from headrace.types.errors import InternalError
from headrace.types.plan import StepPlan
from headrace.types.request import Delta, unpack_ids
from headrace.types.sampling_params import LogprobOptions
from tests.scheduler.builders import ROOMY, answer, finish_all, make, planned, request, step, tokens

CAUSE = InternalError("step 7 failed: MemoryError: no room").info()


def sequences(count: int) -> list[Sequence]:
    requests = [request(handle) for handle in range(count)]
    return [Sequence.of(each, unpack_ids(each.prompt), ROOMY, 0.0) for each in requests]


def isolated(isolation: FaultIsolation) -> list[int]:
    return [sequence.handle for sequence in isolation.isolated()]


def test_failing_groups_are_halved_and_all_run_together_first() -> None:
    isolation, members = FaultIsolation(), sequences(5)
    assert not isolation.is_active and isolated(isolation) == []
    assert isolation.narrow(members, is_alone=False) is None
    assert isolated(isolation) == [0, 1, 2, 3, 4]
    isolation.narrow(members, is_alone=False)
    assert isolated(isolation) == [0, 1]
    isolation.clear(members[:2])
    assert isolated(isolation) == [2, 3, 4]
    isolation.narrow(members[3:5], is_alone=False)  # the step had room for these two only
    assert isolated(isolation) == [3]
    isolation.clear(members[3:4])
    assert isolated(isolation) == [4]
    isolation.clear(members[4:])
    assert isolated(isolation) == [2]
    members[2].state = State.ENDED
    assert isolated(isolation) == [] and not isolation.is_active


def test_one_that_fails_alone_runs_again_after_the_others() -> None:
    isolation, (first, second) = FaultIsolation(), sequences(2)
    for _ in range(2):
        assert isolation.narrow([first, second], is_alone=False) is None
    for _ in range(MAX_LONE_FAILURES - 1):
        for member in (first, second):
            assert isolated(isolation) == [member.handle]
            assert isolation.narrow([member], is_alone=True) is None
    assert isolation.narrow([first], is_alone=True) is first
    isolation.clear([second])
    assert not isolation.is_active


def test_the_last_of_several_is_no_culprit() -> None:
    isolation, members = FaultIsolation(), sequences(1)
    for _ in range(2 * MAX_LONE_FAILURES):
        assert isolation.narrow(members, is_alone=False) is None
    assert isolated(isolation) == [0]


def test_nobody_is_accused_when_all_have_been_answered() -> None:
    isolation = FaultIsolation()
    assert isolation.narrow([], is_alone=True) is None and not isolation.is_active


def run_with_culprits(
    scheduler: Scheduler, culprits: set[int], holders: dict[int, int]
) -> tuple[dict[int, Delta], int]:
    """Terminal deltas by handle, and how many steps failed, when every plan with a culprit fails. `holders` are
    the handles of those that hold slots."""
    finals: dict[int, Delta] = {}
    num_failed = 0
    while (plan := scheduler.plan()) is not None:
        holders.update({init.slot: init.seed for init in plan.new_slots})
        if culprits & {holders[slot] for slot in plan.row_slots.tolist()}:
            num_failed += 1
            deltas = scheduler.lose_step(CAUSE)
        else:
            deltas = scheduler.apply(answer(plan, lambda slot: holders[slot]))
        finals.update({delta.handle: delta for delta in deltas if delta.finish is not None})
    return finals, num_failed


@pytest.mark.parametrize("culprits", [{1}, {8}, {3, 4}, {1, 5, 8}, set(range(1, 9))])
def test_only_culprits_fail(culprits: set[int]) -> None:
    scheduler = make()
    for handle in range(1, 9):
        scheduler.add(request(handle, 3, 6), 0.0)
    first, _ = step(scheduler)
    step(scheduler)
    finals, num_failed = run_with_culprits(scheduler, culprits, {init.slot: init.seed for init in first.new_slots})
    assert sorted(finals) == list(range(1, 9))
    for handle, delta in finals.items():
        assert delta.finish is not None
        if handle in culprits:
            assert delta.finish.type == "error" and "no room" in delta.finish.message
            assert tokens(delta) == [7, 7], "it keeps the tokens it had"
        else:
            assert delta.finish.type == "length" and tokens(delta) == [7, 7] + [handle] * 4
    metrics = scheduler.metrics()
    assert num_failed == metrics["num_failed_steps"] <= 2 + len(culprits) * (3 + MAX_LONE_FAILURES)
    assert metrics["num_isolated_failures"] == metrics["num_failed"] == len(culprits)
    assert metrics["num_used_tokens"] == 0


def test_nobody_else_runs_until_the_suspects_are_cleared() -> None:
    scheduler = make(max_running_requests=5, overlap_depth=1)
    for handle in range(1, 4):
        scheduler.add(request(handle, 3, 6), 0.0)
    step(scheduler)
    scheduler.add(request(4, 3, 6, priority=1), 0.0)
    planned(scheduler)
    scheduler.lose_step(CAUSE)
    suspects = planned(scheduler)
    assert sorted(init.seed for init in suspects.new_slots) == [1, 2, 3, 4], "the step that failed had all four"
    scheduler.add(request(5, 3, 6, priority=9), 0.0)
    assert scheduler.plan() is None, "isolated steps are not overlapped"
    scheduler.lose_step(CAUSE)
    first = planned(scheduler)
    assert len(first.row_slots) == 2
    scheduler.apply(answer(first))
    second = planned(scheduler)
    assert len(second.row_slots) == 2
    scheduler.apply(answer(second))
    assert 5 in [init.seed for init in planned(scheduler).new_slots]


def test_a_long_prompt_is_cleared_only_when_all_of_it_passed() -> None:
    scheduler = make(max_num_batched_tokens=8)
    scheduler.add(request(1, 20, 4), 0.0)
    scheduler.add(request(2, 4, 4), 0.0)
    planned(scheduler)
    scheduler.lose_step(CAUSE)
    seen: list[StepPlan] = []
    for _ in range(3):
        seen.append(planned(scheduler))
        assert len(seen[-1].row_slots) == 1, "the first alone had a row in the step that failed"
        scheduler.apply(answer(seen[-1]))
    assert [len(plan.token_ids) for plan in seen] == [8, 8, 4]
    assert len(planned(scheduler).row_slots) == 2


def test_scored_prompts_are_suspects_too() -> None:
    scheduler = make(max_num_batched_tokens=8)
    scheduler.add(request(1, 6, 0), 0.0)
    scheduler.add(request(2, 6, 3), 0.0)
    scheduler.add(request(3, 6, 0, logprobs=LogprobOptions(num_top=1)), 0.0)
    planned(scheduler)
    scheduler.lose_step(CAUSE)
    assert sorted(delta.handle for delta in finish_all(scheduler)) == [1, 2, 3]


def test_a_suspect_may_be_aborted_and_the_others_go_on() -> None:
    scheduler = make()
    for handle in range(1, 4):
        scheduler.add(request(handle, 3, 2), 0.0)
    planned(scheduler)
    scheduler.lose_step(CAUSE)
    assert [delta.handle for delta in scheduler.abort([1, 2], "enough")] == [1, 2]
    scheduler.add(request(4, 3, 2), 0.0)
    assert sorted(delta.handle for delta in finish_all(scheduler)) == [3, 4]


def test_weights_may_change_meanwhile() -> None:
    scheduler = make()
    for handle in range(1, 4):
        scheduler.add(request(handle, 3, 4), 0.0)
    step(scheduler)
    planned(scheduler)
    scheduler.lose_step(CAUSE)
    step(scheduler)
    scheduler.recompute_running()
    scheduler.set_weights("next", 1)
    deltas = finish_all(scheduler)
    assert [delta.finish.type if delta.finish else "" for delta in deltas] == ["length"] * 3
    assert all(sum(count for _, count in delta.spans) == 4 for delta in deltas)
