"""Token ids in and out, as SkyRL and prime-rl ask for them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.conftest import Served

ROUTE = "/inference/v1/generate"
IDS = [1, 2, 3, 4, 5]
DRAWN: dict[str, Any] = {"max_tokens": 6, "temperature": 0.8, "seed": 3, "ignore_eos": True}


def post(served: Served, **body: Any) -> Any:
    return served.http.post(ROUTE, json=body)


def test_a_reply_is_that_of_a_completion_without_text(served: Served) -> None:
    """The body of SkyRL's client, and what it reads of the reply."""
    params = {**DRAWN, "logprobs": 0, "top_k": -1, "min_p": 0.0, "output_kind": 2, "stop": None, "n": 2}
    model = served.http.get("/v1/models").json()["data"][0]["id"]
    body = {"sampling_params": params, "model": model, "token_ids": IDS, "cache_salt": "7", "request_id": "r"}
    reply = post(served, **body)
    assert reply.status_code == 200, reply.text
    completion = {**DRAWN, "prompt": IDS, "logprobs": 1, "n": 2, "return_token_ids": True}
    expected = served.http.post("/v1/completions", json=completion).json()
    found = reply.json()
    assert found["request_id"] == "r" and found["prompt_logprobs"] is None and len(found["choices"]) == 2
    assert found["usage"]["completion_tokens"] == 12
    for ours, theirs in zip(found["choices"], expected["choices"], strict=True):
        assert ours["token_ids"] == theirs["token_ids"] and ours["finish_reason"] == "length"
        content = ours["logprobs"]["content"]
        values = [each["logprob"] for each in content]
        assert values == pytest.approx(theirs["logprobs"]["token_logprobs"], abs=1e-5)
        assert [each["token"] for each in content] == [f"token_id:{token}" for token in ours["token_ids"]]
        assert ours["version_spans"] == [["default", 6]]


def test_what_is_not_asked_for_is_null(served: Served) -> None:
    reply = post(served, token_ids=IDS, sampling_params={"max_tokens": 2, "ignore_eos": True, "logprobs": None})
    choice = reply.json()["choices"][0]
    assert choice["logprobs"] is None and len(choice["token_ids"]) == 2
    default = post(served, token_ids=IDS, sampling_params={"ignore_eos": True}).json()
    assert len(default["choices"][0]["token_ids"]) == 16


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "body"),
        ({"token_ids": []}, "token_ids"),
        ({"token_ids": "abc"}, "token_ids"),
        ({"token_ids": [1, "x"]}, "token_ids"),
        ({"token_ids": [10**6]}, "token_ids"),
        ({"token_ids": IDS, "stream": True}, "stream"),
        ({"token_ids": IDS, "features": {"a": 1}}, "features"),
        ({"token_ids": IDS, "kv_transfer_params": {"a": 1}}, "kv_transfer_params"),
        ({"token_ids": IDS, "sampling_params": {"top_p": 5}}, "top_p"),
        ({"token_ids": IDS, "sampling_params": {"max_tokens": -1}}, "max_tokens"),
        ({"token_ids": IDS, "sampling_params": {"prompt_logprobs": 2000}}, "prompt_logprobs"),
        ({"token_ids": IDS, "sampling_params": {"prompt_logprobs": -1}}, "prompt_logprobs"),
        ({"token_ids": IDS, "sampling_params": {"logprobs": -2}}, "logprobs"),
        ({"token_ids": IDS, "sampling_params": {"prompt": "x"}}, "sampling_params.prompt"),
        ({"token_ids": IDS, "sampling_params": {"model": "x"}}, "sampling_params.model"),
        ({"token_ids": IDS, "sampling_params": []}, "sampling_params"),
        ({"token_ids": IDS, "request_id": "x" * 2000}, "request_id"),
    ],
)
def test_what_is_wrong_is_named(served: Served, body: dict[str, Any], field: str) -> None:
    reply = post(served, **body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, field), reply.text


def test_another_model_is_not_served(served: Served) -> None:
    assert post(served, token_ids=IDS, model="another").status_code == 404


def test_a_reply_that_would_be_too_large_is_refused(served: Served) -> None:
    params = {"max_tokens": 900, "n": 64, "logprobs": 400}
    reply = post(served, token_ids=IDS, sampling_params=params)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "logprobs")
