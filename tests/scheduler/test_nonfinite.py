"""Steps in which some rows are no numbers: those requests end with a typed error, the others never notice."""

from __future__ import annotations

import random

import msgspec
import numpy as np
import pytest

from headrace.types.plan import PromptLogprobs, StepResult
from headrace.types.request import unpack_floats
from headrace.types.sampling_params import LogprobOptions
from tests.rounds import rounds
from tests.scheduler.builders import answer, finish_all, make, planned, request, step, tokens
from tests.scheduler.harness import Harness, random_limits
from tests.scheduler.test_properties import play_event, random_request

CODE = "NonFiniteError"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_sampled_token_without_a_number_ends_its_request_alone(value: float) -> None:
    scheduler = make()
    for handle in (1, 2, 3):
        scheduler.add(request(handle, 5, 3, deliver_every=1), 0.0)
    step(scheduler)
    plan = planned(scheduler)
    result = answer(plan)
    result.logprobs[1, 0] = value
    deltas = {delta.handle: delta for delta in scheduler.apply(result)}
    finish = deltas[2].finish
    assert finish is not None and finish.error is not None and (finish.type, finish.error.code) == ("error", CODE)
    assert tokens(deltas[2]) == [] and [tokens(deltas[handle]) for handle in (1, 3)] == [[7], [7]]
    assert [delta.finish and delta.finish.type for delta in finish_all(scheduler) if delta.finish] == ["length"] * 2
    metrics = scheduler.metrics()
    assert (metrics["num_nonfinite"], metrics["num_failed"], metrics["num_finished"]) == (1, 1, 2)


def test_its_pages_serve_nobody() -> None:
    """Neither those published before nor those of a step that is still in flight."""
    scheduler = make(overlap_depth=1)
    scheduler.add(request(1, range(12), 9), 0.0)
    first, second = planned(scheduler), planned(scheduler)
    spoiled = answer(first)
    spoiled.logprobs[:] = np.nan
    (delta,) = scheduler.apply(spoiled)
    assert delta.finish is not None and delta.finish.type == "error"
    assert scheduler.apply(answer(second)) == []
    scheduler.add(request(2, range(12), 1), 0.0)
    plan, (delta,) = step(scheduler)
    assert plan.row_lengths.tolist() == [12] and delta.num_cached_tokens == 0
    assert scheduler.metrics()["num_used_tokens"] == 0


def test_a_prompt_score_may_be_minus_infinity_but_not_nan() -> None:
    """What top-k drops has no probability: that is an answer."""
    for value, code in ((-np.inf, None), (np.nan, CODE)):
        scheduler = make()
        scheduler.add(request(1, 4, 1, logprobs=LogprobOptions(prompt_start=0)), 0.0)
        plan = planned(scheduler)
        scores = PromptLogprobs(1, np.array([-1.0, value, -2.0], np.float32))
        (delta,) = scheduler.apply(msgspec.structs.replace(answer(plan), prompt_logprobs={0: scores}))
        assert delta.finish is not None and (delta.finish.error and delta.finish.error.code) == code
        if code is None:
            assert unpack_floats(delta.prompt_logprobs).tolist()[1:] == [-1.0, -np.inf, -2.0]


def test_what_lies_beyond_the_valid_tokens_of_a_row_is_not_looked_at() -> None:
    scheduler = make()
    scheduler.add(request(1, 5, 4), 0.0)
    plan = planned(scheduler)
    values = np.array([[-0.5, np.nan]], np.float32)
    result = StepResult(plan.step_id, np.array([[7, 0]], np.int32), values, np.array([1], np.int32))
    assert scheduler.apply(result) == [] and scheduler.metrics()["num_nonfinite"] == 0


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_random_sequences_keep_their_books(depth: int) -> None:
    """Some rows of some steps are no numbers, whatever else happens at the same time."""
    num_ended = 0
    for seed in range(rounds(20)):
        random_ = random.Random(1000 * depth + seed)
        harness = Harness(random_limits(random_, depth))
        collect = harness.device.collect

        def spoil(collect: object = collect, random_: random.Random = random_) -> StepResult:
            result: StepResult = collect()  # type: ignore[operator]
            is_bad = np.array([random_.random() < 0.05 for _ in result.logprobs], bool)
            return msgspec.structs.replace(result, logprobs=np.where(is_bad[:, None], np.nan, result.logprobs))

        harness.device.collect = spoil  # type: ignore[method-assign]
        for now in range(80):
            play_event(
                random_.choice(("issue", "issue", "land", "add", "books", "update", "abort")), random_, harness, 3, now
            )
        harness.add(random_request(random_, len(harness.received), harness, 3), 99.0)
        harness.end()
        finals = [received.final.finish for received in harness.received.values() if received.final is not None]
        num_bad = sum(
            finish is not None and finish.error is not None and finish.error.code == CODE for finish in finals
        )
        assert harness.scheduler.metrics()["num_nonfinite"] == num_bad
        num_ended += num_bad
    assert num_ended > 15
