"""Over HTTP: resumed generations, errors of single prompts, clipping, and bounds on products."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.builders import CONTEXT_LENGTH
from tests.server.conftest import Served
from tests.server.test_generate import events

IDS = [10, 20, 30]
PARAMS: dict[str, Any] = {
    "max_new_tokens": 12,
    "ignore_eos": True,
    "sampling_seed": 7,
    "presence_penalty": -3.0,
    "frequency_penalty": 0.6,
}


def test_a_partial_generation_is_resumed(served: Served) -> None:
    whole = served.generate(input_ids=IDS, sampling_params=PARAMS)
    first = served.generate(input_ids=IDS, sampling_params={**PARAMS, "max_new_tokens": 5})
    rest = {"sampling_params": {**PARAMS, "max_new_tokens": 7}, "num_output_ids_in_prompt": 5}
    resumed = served.generate(input_ids=IDS + first["output_ids"], **rest)
    assert first["output_ids"] + resumed["output_ids"] == whole["output_ids"]
    assert resumed["meta_info"]["prompt_tokens"] == len(IDS) + 5
    batch = served.generate(input_ids=[IDS + first["output_ids"], IDS], **{**rest, "num_output_ids_in_prompt": [5, 0]})
    assert batch[0]["output_ids"] == resumed["output_ids"]
    body = {"model": "default", "prompt": IDS + first["output_ids"], "max_tokens": 7, "seed": 7}
    body |= {key: PARAMS[key] for key in ("ignore_eos", "presence_penalty", "frequency_penalty")}
    choice = served.http.post(
        "/v1/completions", json={**body, "num_output_ids_in_prompt": 5, "return_token_ids": True}
    ).json()["choices"][0]
    assert choice["token_ids"] == resumed["output_ids"]
    pieces = events(served, {"input_ids": IDS + first["output_ids"], **rest})
    assert pieces[-1]["output_ids"] == resumed["output_ids"]
    assert pieces[-1]["text"] == resumed["text"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"input_ids": IDS, "num_output_ids_in_prompt": 3}),
        ("/generate", {"input_ids": IDS, "num_output_ids_in_prompt": "1"}),
        ("/generate", {"input_ids": IDS, "num_output_ids_in_prompt": [1, 1]}),
        ("/generate", {"text": "abc", "num_output_ids_in_prompt": 1}),
        ("/v1/completions", {"prompt": "abc", "num_output_ids_in_prompt": 1}),
        ("/v1/completions", {"prompt": IDS, "num_output_ids_in_prompt": -1}),
        ("/v1/completions", {"prompt": [IDS, IDS], "num_output_ids_in_prompt": [1]}),
    ],
)
def test_what_cannot_be_resumed_is_refused(served: Served, path: str, body: dict[str, Any]) -> None:
    reply = served.http.post(path, json=body)
    assert (reply.status_code, reply.json()["param"]) == (400, "num_output_ids_in_prompt")


@pytest.mark.parametrize("is_text", [False, True])
def test_a_bad_prompt_of_a_batch_has_an_error_of_its_own(served: Served, is_text: bool) -> None:
    prompts: dict[str, Any] = {"input_ids": [IDS, [1] * (CONTEXT_LENGTH + 1), IDS, IDS]}
    if is_text:
        prompts = {"text": ["abc", "é🙂" * 4 * CONTEXT_LENGTH, "abc", "abc"]}
    params = [{"max_new_tokens": 2}] * 4
    params[2] = {"max_new_tokens": 2, "top_p": 5}
    params[3] = {"max_new_tokens": CONTEXT_LENGTH}
    body = {**prompts, "sampling_params": params}
    assert served.http.post("/generate", json=body).status_code == 400
    found = served.generate(**body, return_errors=True, rid=["a", "b", "c", "d"])
    reasons = [each["meta_info"]["finish_reason"] for each in found]
    assert [each["meta_info"]["id"] for each in found] == ["a", "b", "c", "d"]
    assert [reason["type"] for reason in reasons] == ["length", "abort", "abort", "abort"]
    key = next(iter(prompts))
    fields = [f"{key}[1]", "sampling_params[2].top_p", "sampling_params.max_new_tokens"]
    assert [reason["param"] for reason in reasons[1:]] == fields
    assert all((reason["status_code"], reason["err_type"]) == (400, "RequestError") for reason in reasons[1:])
    assert [each["output_ids"] for each in found[1:]] == [[], [], []]
    assert [each["meta_info"]["seed"] is None for each in found] == [False, True, True, True], "nothing was drawn"
    scored = {"return_logprob": True, "logprob_start_len": [0, 9], "return_errors": True}
    [_, bad] = served.generate(input_ids=[IDS, IDS], sampling_params=params[0], **scored)
    assert bad["meta_info"]["finish_reason"]["param"] == "logprob_start_len"
    ends = {
        each["index"]: each["meta_info"]["finish_reason"] for each in events(served, {**body, "return_errors": True})
    }
    assert {index: end["type"] for index, end in ends.items()} == {0: "length", 1: "abort", 2: "abort", 3: "abort"}


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"sampling_params": [{"stop_token_ids": [9999]}, {"max_new_tokens": 1}]}, "sampling_params.stop_token_ids"),
        ({"sampling_params": [{"logit_bias": {"9999": 1}}, {"max_new_tokens": 1}]}, "sampling_params.logit_bias"),
        ({"rid": ["x" * 2000, "short"]}, "rid"),
        ({"priority": [1 << 40, 0]}, "priority"),
        ({"extra_key": ["x" * 2000, ""]}, "extra_key"),
        ({"return_logprob": True, "top_logprobs_num": [-1, 0]}, "top_logprobs_num"),
        ({"return_logprob": True, "logprob_start_len": [-5, 0]}, "logprob_start_len"),
    ],
)
def test_a_bad_field_of_one_prompt_refuses_that_prompt(served: Served, options: dict[str, Any], field: str) -> None:
    body = {"input_ids": [IDS, IDS], "sampling_params": {"max_new_tokens": 1}, **options}
    reply = served.http.post("/generate", json=body)
    assert (reply.status_code, reply.json()["param"]) == (400, field)
    bad, good = (each["meta_info"]["finish_reason"] for each in served.generate(**body, return_errors=True))
    assert (bad["type"], bad["param"], good["type"]) == ("abort", field, "length")
    streamed = {each["index"]: each for each in events(served, {**body, "return_errors": True})}
    ends = [streamed[index]["meta_info"]["finish_reason"] for index in (0, 1)]
    assert (ends[0]["param"], ends[1]["type"]) == (field, "length")


def test_max_new_tokens_is_clipped_when_asked(served: Served) -> None:
    ids = [1 + i % 200 for i in range(CONTEXT_LENGTH - 3)]
    params = {"max_new_tokens": 9, "ignore_eos": True}
    assert served.http.post("/generate", json={"input_ids": ids, "sampling_params": params}).status_code == 400
    clipped = served.generate(input_ids=ids, sampling_params=params, clip_to_context=True)
    assert clipped["meta_info"]["finish_reason"] == {"type": "length", "length": 3}
    body = {"model": "default", "prompt": ids, "max_tokens": 9, "ignore_eos": True}
    assert served.http.post("/v1/completions", json=body).status_code == 400
    reply = served.http.post("/v1/completions", json={**body, "clip_to_context": True}).json()
    assert (reply["usage"]["completion_tokens"], reply["choices"][0]["finish_reason"]) == (3, "length")


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (
            "/generate",
            {"input_ids": [1] * 1000, "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 400}
            | {"sampling_params": {"n": 64, "max_new_tokens": 0}},
            "top_logprobs_num",
        ),
        (
            "/generate",
            {"input_ids": [[1] * 1000] * 64, "return_logprob": True, "logprob_start_len": 0}
            | {"top_logprobs_num": 400, "sampling_params": {"max_new_tokens": 0}},
            "top_logprobs_num",
        ),
        (
            "/generate",
            {"input_ids": [1], "return_logprob": True, "token_ids_logprob": list(range(400))}
            | {"sampling_params": {"n": 64, "max_new_tokens": 1000}},
            "token_ids_logprob",
        ),
        ("/v1/completions", {"prompt": IDS, "max_tokens": 1000, "logprobs": 400, "n": 64}, "logprobs"),
        (
            "/generate",
            {"input_ids": [[1] * 1000] * 3, "return_logprob": True, "logprob_start_len": 0}
            | {"sampling_params": {"n": 4096, "max_new_tokens": 0}},
            "logprob_start_len",
        ),
        (
            "/generate",
            {"input_ids": [[1] * 1000] * 3, "return_prompt_token_ids": True}
            | {"sampling_params": {"n": 4096, "max_new_tokens": 0}},
            "return_prompt_token_ids",
        ),
        (
            "/v1/completions",
            {"prompt": [[1] * 1000] * 3, "return_token_ids": True, "max_tokens": 0, "n": 4096},
            "return_token_ids",
        ),
        (
            "/generate",
            {"input_ids": [IDS] * 20, "sampling_params": [{"stop": ["x" * 1024] * 64}] * 20},
            "sampling_params.stop",
        ),
        (
            "/generate",
            {"input_ids": [IDS] * 700}
            | {"sampling_params": [{"logit_bias": {str(token): 1 for token in range(400)}}] * 700},
            "sampling_params.logit_bias",
        ),
    ],
    ids=range(9),
)
def test_products_are_bounded_before_anything_is_made(
    served: Served, path: str, body: dict[str, Any], field: str
) -> None:
    reply = served.http.post(path, json=body)
    assert (reply.status_code, reply.json()["param"]) == (400, field)


def test_many_samples_with_many_long_stop_strings_are_answered(served: Served) -> None:
    """In what one of them costs: what they share is made once."""
    stops = [f"{i:04}" + "stop" * 250 for i in range(64)]
    bias = {str(token): 0.5 for token in range(400)}
    params = {"n": 300, "max_new_tokens": 1, "stop": stops, "logit_bias": bias}
    assert len(served.generate(input_ids=IDS, sampling_params=params)) == 300
