"""Scores of a prompt as vLLM's clients ask for them, and read them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.conftest import Served

IDS = [3, 141, 59, 26, 5]


def scored(served: Served, count: int) -> tuple[list[float | None], list[dict[int, float]]]:
    """What the engine itself says of `IDS`: own values, and the most probable of each position."""
    (found,) = served.engine.score(input_ids=[IDS], top_logprobs=count)
    return found.prompt_logprobs, [top or {} for top in found.prompt_top_logprobs or [{}] * len(IDS)]


def check_positions(positions: list[Any], served: Served, count: int) -> None:
    own, tops = scored(served, count)
    assert positions[0] is None and len(positions) == len(IDS)
    for token, value, top, found in list(zip(IDS, own, tops, positions, strict=True))[1:]:
        assert found[str(token)]["logprob"] == pytest.approx(value, abs=1e-5)
        ranked = sorted(found.items(), key=lambda item: item[1]["rank"])
        assert [int(name) for name, _ in ranked[:count]] == list(top), "as TRL sorts them"
        assert [each["rank"] for _, each in ranked] == list(range(1, len(ranked) + 1))
        assert {int(name) for name in found} == {*top, token}


@pytest.mark.parametrize("count", [0, 1, 7])
def test_completions_score_each_prompt(served: Served, count: int) -> None:
    """TRL's teachers: `max_tokens` 1, of which nothing is read."""
    body = {"prompt": [IDS, IDS[:1]], "max_tokens": 1, "temperature": 0.7, "prompt_logprobs": count}
    reply = served.http.post("/v1/completions", json=body)
    assert reply.status_code == 200 and not reply.headers.get("x-headrace-warnings"), reply.text
    first, second = reply.json()["choices"]
    check_positions(first["prompt_logprobs"], served, count)
    assert first["logprobs"] is None and second["prompt_logprobs"] in (None, [None])


def test_output_has_as_many_as_were_asked_for_it(served: Served) -> None:
    """The engine has one number for both."""
    body = {"prompt": IDS, "max_tokens": 2, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    body["return_tokens_as_token_ids"] = True
    alone = served.http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    (both,) = served.http.post("/v1/completions", json={**body, "prompt_logprobs": 4}).json()["choices"]
    assert both["logprobs"]["tokens"] == alone["tokens"]
    assert [list(each) for each in both["logprobs"]["top_logprobs"]] == [list(each) for each in alone["top_logprobs"]]
    (more,) = served.http.post("/v1/completions", json={**body, "logprobs": 5, "prompt_logprobs": 0}).json()["choices"]
    assert [len(each) for each in more["prompt_logprobs"][1:]] == [1] * 4


def test_token_routes_have_them_beside_the_choices(served: Served) -> None:
    params = {"max_tokens": 1, "prompt_logprobs": 3, "n": 2}
    reply = served.http.post("/inference/v1/generate", json={"token_ids": IDS, "sampling_params": params})
    assert reply.status_code == 200, reply.text
    check_positions(reply.json()["prompt_logprobs"], served, 3)
    messages = [{"role": "user", "content": "hi"}]
    body = {"messages": messages, "max_tokens": 1, "prompt_logprobs": 1, "return_token_ids": True}
    chat = served.http.post("/v1/chat/completions", json=body).json()
    pairs = list(zip(chat["prompt_token_ids"], chat["prompt_logprobs"], strict=True))
    assert pairs[0][1] is None and all(str(token) in found for token, found in pairs[1:])


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_streams_have_none(served: Served, path: str) -> None:
    body = {"prompt": IDS, "messages": [{"role": "user", "content": "hi"}], "prompt_logprobs": 1, "stream": True}
    body.pop("prompt" if "chat" in path else "messages")
    reply = served.http.post(path, json=body)
    assert (reply.status_code, reply.json()["param"]) == (400, "prompt_logprobs")


def test_too_many_are_refused(served: Served) -> None:
    body = {"prompt": [list(range(300, 400)) * 9] * 100, "max_tokens": 1, "prompt_logprobs": 400}
    reply = served.http.post("/v1/completions", json=body)
    assert (reply.status_code, reply.json()["param"]) == (400, "prompt_logprobs")
