"""What can never run is refused at once, by the name of the field; what can is taken."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.types.errors import RequestError, UnavailableError
from headrace.types.request import Request, TokenSampling
from headrace.types.sampling_params import LogprobOptions
from tests.scheduler.builders import finish_all, make, request


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": 101}),
        ("prompt", {"prompt": [1000]}),
        ("prompt", {"prompt": [-1, 3]}),
        ("max_new_tokens", {"max_new": -1}),
        ("min_new_tokens", {"min_new_tokens": -1}),
        ("deliver_every", {"deliver_every": -1}),
        ("priority", {"priority": 1 << 40}),
        ("logprobs.prompt_start", {"logprobs": LogprobOptions(prompt_start=6)}),
        ("logprobs.prompt_start", {"logprobs": LogprobOptions(prompt_start=-1)}),
        ("logprobs.num_top", {"logprobs": LogprobOptions(num_top=1001)}),
        ("logprobs.token_ids", {"logprobs": LogprobOptions(token_ids=(3, 1000))}),
        ("sampling.logit_bias", {"sampling": TokenSampling(logit_bias=((1000, 1.0),))}),
    ],
)
def test_a_request_that_can_never_run_is_refused_by_field(field: str, changes: dict[str, Any]) -> None:
    scheduler = make()
    with pytest.raises(RequestError) as refusal:
        scheduler.add(request(1, **changes), 0.0)
    assert refusal.value.field == field and field in refusal.value.message
    assert scheduler.num_waiting == 0


def test_a_prompt_that_is_not_whole_ids_is_refused() -> None:
    with pytest.raises(RequestError, match="int32") as refusal:
        make().add(Request(1, "1", b"abc", 3, seed=1), 0.0)
    assert refusal.value.field == "prompt"


def test_what_cannot_fit_the_pool_alone_is_refused() -> None:
    scheduler = make(num_pages=6)
    with pytest.raises(RequestError, match="20") as refusal:
        scheduler.add(request(1, 22, 0), 0.0)
    assert refusal.value.field == "prompt"
    with pytest.raises(RequestError, match="need 21 tokens") as refusal:
        scheduler.add(request(2, 12, 10), 0.0)
    assert refusal.value.field == "max_new_tokens"
    scheduler.add(request(3, 12, 9), 0.0)
    (delta,) = finish_all(scheduler)
    assert len(delta.token_ids) == 4 * 9


def test_the_output_is_cut_at_the_context() -> None:
    scheduler = make(context_length=12)
    scheduler.add(request(1, 10, 50), 0.0)
    scheduler.add(request(2, 12, 50), 0.0)
    lengths = {delta.handle: (len(delta.token_ids) // 4, delta.finish) for delta in finish_all(scheduler)}
    assert {handle: count for handle, (count, _) in lengths.items()} == {1: 2, 2: 0}
    assert all(finish is not None and finish.type == "length" for _, finish in lengths.values())


def test_a_full_queue_is_unavailable_and_a_live_handle_is_taken() -> None:
    scheduler = make(max_waiting_requests=2)
    scheduler.add(request(1), 0.0)
    with pytest.raises(RequestError) as refusal:
        scheduler.add(request(1), 0.0)
    assert refusal.value.field == "handle"
    scheduler.add(request(2), 0.0)
    with pytest.raises(UnavailableError):
        scheduler.add(request(3), 0.0)
    finish_all(scheduler)
    scheduler.add(request(1), 0.0)


def test_stop_ids_outside_the_vocabulary_can_do_no_harm() -> None:
    scheduler = make()
    scheduler.add(request(1, stop_token_ids=(5000, 1 << 40, 8)), 0.0)
    plan = scheduler.plan()
    assert plan is not None and plan.new_slots[0].stop_token_ids == (8,)
