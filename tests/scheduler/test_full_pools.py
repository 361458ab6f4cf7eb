"""Pools that do not hold all that comes: who is let in, so that nobody has to leave and the batch ends soon."""

from __future__ import annotations

import random

import numpy as np
import pytest

from bench.full_pools import limits_of, simulate
from headrace.bench.workloads import Scale, make_workload
from headrace.scheduler.pool_forecast import PoolForecast
from tests.scheduler.builders import make, planned, request, step


def most_held(sequences: list[tuple[int, int]]) -> int:
    """Of sequences that hold so much now and end in so many steps, the most at one time, by trying each."""
    ends = {left for _, left in sequences}
    return max((sum(held + end for held, left in sequences if left >= end) for end in ends), default=0)


def test_a_forecast_is_what_each_step_would_show() -> None:
    choose = random.Random(0)
    for _ in range(3000):
        running = [(choose.randrange(30), choose.randrange(12)) for _ in range(choose.randrange(7))]
        others = [(choose.randrange(30), choose.randrange(12)) for _ in range(3)]
        fits_without = most_held(running)
        num_tokens = fits_without + choose.randrange(40)
        held, left = (np.array([each[at] for each in running], dtype=np.int64) for at in (0, 1))
        forecast = PoolForecast(held, left, num_tokens)
        columns = (np.array([each[at] for each in others], dtype=np.int64) for at in (0, 1))
        expected = [most_held([*running, each]) <= num_tokens for each in others]
        assert forecast.fits(*columns).tolist() == expected
        if expected[0]:
            more = forecast.with_one(*others[0])
            found = more.fits(np.array([others[1][0]]), np.array([others[1][1]]))
            assert found.tolist() == [most_held([*running, *others[:2]]) <= num_tokens]


def test_short_ones_that_came_with_it_pass_one_that_has_no_room_yet() -> None:
    scheduler = make(num_pages=65, max_running_requests=16, max_num_batched_tokens=999)  # 256 tokens
    for handle in range(1, 10):
        scheduler.add(request(handle, 8, 23), 0.0)  # 31 at its end
    scheduler.add(request(10, 5, 2), 0.0)
    scheduler.add(request(11, 5, 1), 1.5)  # of another second
    entered = [init.seed for init in planned(scheduler).new_slots]
    assert entered[-1] == 10 and entered[:-1] == list(range(1, len(entered))) and 7 <= len(entered) <= 9
    assert scheduler.num_waiting == 11 - len(entered)


def test_those_that_may_fill_the_pool_by_themselves_come_in_as_if_nobody_knew() -> None:
    scheduler = make(num_pages=11)
    for handle in (1, 2, 3):
        scheduler.add(request(handle, 4, 36), 0.0)
    assert len(planned(scheduler).new_slots) == 3


def test_where_ends_are_known_nobody_is_preempted() -> None:
    """As long as each prompt is computed in a step."""
    choose = random.Random(1)
    for _ in range(30):
        page_size = choose.choice((1, 4, 16))
        scheduler = make(
            page_size=page_size,
            num_pages=1 + 800 // page_size,
            prefix_cache=False,
            max_num_batched_tokens=9999,
            max_running_requests=64,
        )
        handles = range(choose.randrange(1, 90))
        for handle in handles:
            scheduler.add(request(handle, choose.randrange(1, 30), choose.randrange(1, 60)), choose.choice((0.0, 2.0)))
        finished = 0
        while scheduler.num_live:
            finished += sum(delta.finish is not None for delta in step(scheduler)[1])
        assert finished == len(handles) and scheduler.metrics()["num_preemptions"] == 0


@pytest.mark.parametrize(("name", "divisor"), [("A", 1), ("B", 2)])
def test_steps_of_workloads_in_pools_of_half_their_peak_and_more(name: str, divisor: int) -> None:
    """Before ends were looked at: 1.4 and 1.2 at three quarters, 1.8 and 1.6 at a half, 30 to 110 preemptions. With as
    much host memory as the peak a half is kept full."""
    workload = make_workload(name, scale=Scale(num_divisor=divisor))  # type: ignore[arg-type]
    roomy = simulate(workload, limits_of(workload, 1 << 20))
    for percent, most in ((100, 1.01), (75, 1.08), (50, 1.6))[divisor - 1 :]:
        found = simulate(workload, limits_of(workload, roomy.peak_tokens * percent // 100))
        assert found.num_steps <= most * roomy.num_steps, (percent, found)
        assert found.num_preemptions == 0 and found.num_recomputed == 0
    hosted = simulate(workload, limits_of(workload, roomy.peak_tokens // 2, roomy.peak_tokens))
    assert hosted.num_steps <= 1.35 * roomy.num_steps and hosted.seconds < found.seconds, hosted
    assert 0 < hosted.num_preemptions < 2 * len(workload.prompts)
    assert hosted.num_recomputed < 0.04 * workload.num_output_tokens
    assert hosted.num_loaded < workload.num_prompt_tokens
