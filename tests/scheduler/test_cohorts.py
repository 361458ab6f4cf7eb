"""Running sequences take turns where steps overlap on several stages: in equal parts, nobody is passed over, and who is
alone waits for nobody."""

from __future__ import annotations

import random
from collections import deque

import numpy as np
import pytest

from headrace.types.plan import StepPlan
from tests.rounds import rounds
from tests.scheduler.builders import answer, make, request


class Pipeline:
    """A scheduler whose steps take as long as there are stages: so many are in flight before the first is applied."""

    def __init__(self, num_cohorts: int) -> None:
        self.scheduler = make(
            max_running_requests=64,
            max_waiting_requests=1000,
            context_length=400,
            num_pages=8000,
            prefix_cache=False,
            overlap_depth=num_cohorts - 1,
            num_cohorts=num_cohorts,
        )
        self.in_flight: deque[StepPlan] = deque()
        self.num_added = 0

    def add(self, num_prompt: int, num_new: int) -> None:
        self.num_added += 1
        self.scheduler.add(request(self.num_added, [1] * num_prompt, num_new), 0.0)

    def step(self) -> list[StepPlan]:
        """The plans that are made now; then the oldest ends."""
        plans = []
        while (plan := self.scheduler.plan()) is not None:
            plans.append(plan)
            self.in_flight.append(plan)
        if self.in_flight:
            self.scheduler.apply(answer(self.in_flight.popleft(), 1))
        return plans


@pytest.mark.parametrize("num_cohorts", [2, 3, 5])
@pytest.mark.parametrize("num_requests", [1, 2, 5, 16, 33])
def test_each_step_has_an_equal_part_and_each_sequence_its_turn(num_cohorts: int, num_requests: int) -> None:
    pipeline = Pipeline(num_cohorts)
    for _ in range(num_requests):
        pipeline.add(1, 300)
    while pipeline.scheduler.num_waiting:
        pipeline.step()
    for _ in range(2 * num_cohorts):  # from the step of all prompts on
        pipeline.step()
    plans = [plan for _ in range(10 * num_cohorts) for plan in pipeline.step()]
    most = -(-num_requests // num_cohorts)
    sizes = [len(plan.row_slots) for plan in plans]
    assert max(sizes) <= most and min(sizes) >= 1
    in_a_round = min(num_cohorts, -(-num_requests // most))
    for first in range(0, len(plans) - in_a_round, in_a_round):
        served = np.concatenate([plan.row_slots for plan in plans[first : first + in_a_round]])
        assert sorted(served.tolist()) == sorted(set(served.tolist()))
        assert len(served) == num_requests


@pytest.mark.parametrize("num_cohorts", [2, 4])
def test_whoever_comes_or_goes_nobody_is_passed_over(num_cohorts: int) -> None:
    """Random lengths and arrivals: between two rows of one sequence there are few steps, and all come to an end."""
    for seed in range(rounds(24)):
        chance, pipeline, number = random.Random(seed), Pipeline(num_cohorts), 0
        last: dict[int, int] = {}
        for turn in range(80):
            for _ in range(chance.choice((0, 0, 0, 1, 4)) if turn < 50 else 0):
                pipeline.add(chance.choice((1, 3, 40)), chance.randint(1, 30))
            for plan in pipeline.step():
                number += 1
                entered = {init.slot for init in plan.new_slots}
                for slot in plan.row_slots.tolist():
                    assert slot in entered or number - last[slot] <= 2 * num_cohorts, f"{slot} waited, seed {seed}"
                    last[slot] = number
        while pipeline.scheduler.num_live:
            pipeline.step()
        assert not pipeline.in_flight and pipeline.scheduler.num_used_tokens == 0


def test_one_prompt_alone_goes_through_all_stages_at_once() -> None:
    """Its chunks follow each other, whatever cohort it is of: they need no token that is sampled."""
    pipeline = Pipeline(3)
    pipeline.add(150, 5)
    assert [len(plan.token_ids) for plan in pipeline.step()] == [64, 64, 22]
    assert not pipeline.step() and not pipeline.step()
    assert [len(plan.token_ids) for plan in pipeline.step()] == [1]


@pytest.mark.parametrize("num_cohorts", [2, 3])
def test_requests_that_come_together_enter_in_equal_parts(num_cohorts: int) -> None:
    """So that one stage computes the prompts of some while another one computes those of others."""
    pipeline = Pipeline(num_cohorts)
    for _ in range(7):
        pipeline.add(4, 5)
    entered = [len(plan.new_slots) for plan in pipeline.step()]
    assert entered == {2: [4, 3], 3: [3, 3, 1]}[num_cohorts]


@pytest.mark.parametrize("num_cohorts", [2, 3])
def test_parts_become_equal_again_when_those_of_one_end(num_cohorts: int) -> None:
    pipeline = Pipeline(num_cohorts)
    for number in range(6 * num_cohorts):
        pipeline.add(4, 200 if number < 3 else 4)  # those who go on are all of one cohort: the longest come first
    while pipeline.scheduler.num_waiting or pipeline.scheduler.num_live > 3:
        pipeline.step()
    for _ in range(2 * num_cohorts):
        pipeline.step()
    sizes = [len(plan.row_slots) for _ in range(6) for plan in pipeline.step()]
    assert max(sizes) == -(-3 // num_cohorts)
