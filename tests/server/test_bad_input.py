"""Malformed requests: each is refused at once, naming the field, and harms nobody."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from headrace.server.app import all_endpoints
from headrace.server.options import ServerOptions
from headrace.server.state import ServerState
from tests.server.conftest import Served


def nested(depth: int) -> list[Any]:
    """Lists in lists with nothing in the innermost."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


SAMPLING: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": 1e9}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"top_k": 10**20}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"max_new_tokens": -1}, "max_new_tokens"),
    ({"max_new_tokens": "all"}, "max_new_tokens"),
    ({"max_new_tokens": 10**9}, "max_new_tokens"),
    ({"max_new_tokens": 2000}, "max_new_tokens"),
    ({"max_new_tokens": 1.0}, "max_new_tokens"),
    ({"min_new_tokens": 200}, "min_new_tokens"),
    ({"n": 0}, "n"),
    ({"n": 10**9}, "n"),
    ({"n": "2"}, "n"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 1e6}, "presence_penalty"),
    ({"frequency_penalty": []}, "frequency_penalty"),
    ({"stop": 5}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["x"] * 1000}, "stop"),
    ({"stop": ["x" * 100_000]}, "stop"),
    ({"stop": [["x"]]}, "stop"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [416]}, "stop_token_ids"),
    ({"stop_token_ids": list(range(2000))}, "stop_token_ids"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"5": "x"}}, "logit_bias"),
    ({"logit_bias": {"9999": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 1e300}}, "logit_bias"),
    ({"sampling_seed": -1}, "seed"),
    ({"sampling_seed": 1 << 70}, "seed"),
    ({"sampling_seed": 1, "seed": 2}, "seed"),
    ({"ignore_eos": "yes"}, "ignore_eos"),
    ({"skip_special_tokens": 1}, "skip_special_tokens"),
    ({"beam_width": 4}, "beam_width"),
    ({"json_schema": "{}"}, "json_schema"),
    ({"regex": "a+"}, "regex"),
    ({"custom_params": [True]}, "custom_params"),
    ({"custom_params": {"return_top_p_token_ids": 1}}, "custom_params.return_top_p_token_ids"),
    ({"custom_params": {"return_top_p_token_ids": True, "seen": 1}, "top_p": 0.9}, "custom_params.seen"),
    ({"custom_params": {"return_top_p_token_ids": True}}, "custom_params.return_top_p_token_ids"),
]
BODIES: list[tuple[dict[str, Any], str]] = [
    ({}, "input_ids"),
    ({"input_ids": []}, "input_ids"),
    ({"input_ids": [[]]}, "input_ids"),
    ({"input_ids": [1, [2]]}, "input_ids"),
    ({"input_ids": [[1], 2]}, "input_ids"),
    ({"input_ids": ["a"]}, "input_ids"),
    ({"input_ids": [1.5]}, "input_ids"),
    ({"input_ids": [True]}, "input_ids"),
    ({"input_ids": [None]}, "input_ids"),
    ({"input_ids": [[[1]]]}, "input_ids"),
    ({"input_ids": "1 2 3"}, "input_ids"),
    ({"input_ids": [416]}, "input_ids"),
    ({"input_ids": [-1]}, "input_ids"),
    ({"input_ids": [10**18]}, "input_ids"),
    ({"input_ids": [10**40]}, "input_ids"),
    ({"input_ids": [1] * 1025}, "input_ids"),
    ({"input_ids": [1] * 1024}, "max_new_tokens"),
    ({"input_ids": [[1], [416]]}, "input_ids[1]"),
    ({"input_ids": [1], "text": "a"}, "input_ids"),
    ({"text": ""}, "text"),
    ({"text": []}, "text"),
    ({"text": 5}, "text"),
    ({"text": ["a", 5]}, "text"),
    ({"text": "word " * 20_000}, "text"),
    ({"text": "a" * 2_000_000}, "text"),
    ({"input_ids": [1], "sampling_params": 3}, "sampling_params"),
    ({"input_ids": [1], "sampling_params": [{}, {}]}, "sampling_params"),
    ({"input_ids": [1], "sampling_params": [3]}, "sampling_params[0]"),
    ({"input_ids": [1], "stream": "yes"}, "stream"),
    ({"input_ids": [1], "rid": 5}, "rid"),
    ({"input_ids": [1], "rid": "x" * 5000}, "rid"),
    ({"input_ids": [[1], [2]], "rid": ["a"]}, "rid"),
    ({"input_ids": [[1], [2]], "rid": ["a", "a"]}, "rid"),
    ({"input_ids": [[1], [2]], "rid": ["a", "a_1"], "sampling_params": [{"n": 2}, {}]}, "rid"),
    ({"input_ids": [1], "return_logprob": "yes"}, "return_logprob"),
    ({"input_ids": [1], "return_logprob": True, "logprob_start_len": -2}, "logprob_start_len"),
    ({"input_ids": [1], "return_logprob": True, "logprob_start_len": 10**9}, "logprob_start_len"),
    ({"input_ids": [1], "return_logprob": True, "top_logprobs_num": -1}, "top_logprobs_num"),
    ({"input_ids": [1], "return_logprob": True, "top_logprobs_num": 10**6}, "top_logprobs_num"),
    ({"input_ids": [1], "return_logprob": True, "token_ids_logprob": [416]}, "token_ids_logprob"),
    ({"input_ids": [1], "return_logprob": True, "token_ids_logprob": ["a"]}, "token_ids_logprob"),
    ({"input_ids": [1], "return_logprob": True, "token_ids_logprob": [1] * 9999}, "token_ids_logprob"),
    ({"input_ids": [1], "logprob_mode": "cooked"}, "logprob_mode"),
    ({"input_ids": [1], "priority": 1 << 40}, "priority"),
    ({"input_ids": [1], "priority": "high"}, "priority"),
    ({"input_ids": [1], "extra_key": 5}, "extra_key"),
    ({"input_ids": [1], "extra_key": "k" * 5000}, "extra_key"),
    ({"input_ids": [1], "lora_path": "adapter"}, "lora_path"),
    ({"input_ids": [1], "image_data": ["http://x/y.png"]}, "image_data"),
    ({"input_ids": [1], "image_data": nested(400)}, "image_data"),
    ({"input_ids": [1], "input_embeds": [[0.5]]}, "input_embeds"),
    ({"input_ids": [1], "session_params": {"id": "s"}}, "session_params"),
    ({"input_ids": [1], "return_hidden_states": True}, "return_hidden_states"),
    ({"input_ids": [1], "return_routed_experts": True}, "return_routed_experts"),
]
RAW: list[tuple[bytes, str]] = [
    (b"", "body"),
    (b"{", "body"),
    (b"[]", "body"),
    (b'"text"', "body"),
    (b"null", "body"),
    (b"\xff\xfe", "body"),
    (b'{"input_ids": [1], "sampling_params": {"temperature": NaN}}', "body"),
    (b'{"input_ids": [1], "sampling_params": {"temperature": Infinity}}', "body"),
    (b'{"input_ids": [1], "sampling_params": {"temperature": 1e999}}', ""),
    (b'{"input_ids": [1' + b"0" * 5000 + b"]}", ""),
    (b'{"text": "\\ud800"}', ""),
    (b'{"text": "a\xc3"}', "body"),
    (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "body"),
    (b"[" * 100_000, "body"),
]
USER = {"role": "user", "content": "hi"}
CHATS: list[tuple[dict[str, Any], str]] = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "alien", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [USER, {"role": "function", "content": "hi"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": "word " * 9000}]}, "messages"),
    ({"messages": [USER], "tools": [{"type": "function"}]}, "tools[0].function.name"),
    ({"messages": [USER], "tool_choice": {"type": "function"}}, "tool_choice"),
    ({"messages": [USER], "response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": [USER], "top_logprobs": 3}, "top_logprobs"),
    ({"messages": [USER], "logprobs": True, "top_logprobs": 5000}, "top_logprobs"),
    ({"messages": [USER], "max_completion_tokens": -5}, "max_completion_tokens"),
    ({"messages": [USER], "max_tokens": 10**8}, "max_tokens"),
    ({"messages": [USER], "temperature": "x"}, "temperature"),
    ({"messages": [USER], "stop": 1}, "stop"),
    ({"messages": [USER], "n": 10**9}, "n"),
    ({"messages": [USER], "stream_options": 1}, "stream_options"),
    ({"messages": [USER], "chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs.tokenize"),
    ({"messages": [USER], "chat_template": "{{ 1 }}"}, "chat_template"),
    ({"messages": [USER], "functions": [{"name": "f"}]}, "functions"),
    ({"messages": [USER], "model": "gpt-4"}, "model"),
    ({"messages": [USER], "cache_salt": "k" * 5000}, "cache_salt"),
    ({"messages": [USER], "cache_salt": "a", "extra_key": "b"}, "cache_salt"),
]
COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [[1], [9999]]}, "prompt[1]"),
    ({"prompt": "a", "echo": True}, "echo"),
    ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "prompt_logprobs": -1}, "prompt_logprobs"),
    ({"prompt": "a", "best_of": 5}, "best_of"),
    ({"prompt": "a", "logprobs": -1}, "logprobs"),
    ({"prompt": "a", "logprobs": 10**6}, "logprobs"),
    ({"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
    ({"prompt": "a", "min_tokens": 99}, "min_tokens"),
    ({"prompt": "a", "seed": "x"}, "seed"),
    ({"prompt": "a", "cache_salt": 5}, "cache_salt"),
    ({"prompt": "a", "cache_salt": ["a"], "extra_key": {}}, "cache_salt"),
    ({"prompt": "a", "extra_key": "k" * 5000}, "extra_key"),
]
ALL = [
    *(("/generate", json.dumps({"input_ids": [1], "sampling_params": p}).encode(), field) for p, field in SAMPLING),
    *(("/generate", json.dumps(body).encode(), field) for body, field in BODIES),
    *(("/generate", raw, field) for raw, field in RAW),
    *(("/v1/chat/completions", json.dumps(body).encode(), field) for body, field in CHATS),
    *(("/v1/completions", json.dumps(body).encode(), field) for body, field in COMPLETIONS),
]


def check(reply: httpx.Response, field: str) -> None:
    assert 400 <= reply.status_code < 500, reply.text
    body = reply.json()
    assert body["object"] == "error"
    assert body["code"] == reply.status_code
    assert body["message"] == body["error"]["message"]
    assert field in (body["param"] or ""), body
    assert field in body["message"], body
    assert len(body["message"]) < 2000


@pytest.mark.parametrize("number", range(len(ALL)))
def test_each_is_refused_by_name(served: Served, number: int) -> None:
    path, content, field = ALL[number]
    check(served.http.post(path, content=content), field)


def test_streams_are_refused_with_a_status_too(served: Served) -> None:
    for body, field in BODIES[:10]:
        check(served.http.post("/generate", json={**body, "stream": True}), field)


def test_a_good_request_beside_them_is_untouched(served: Served) -> None:
    body = {"input_ids": [11, 12], "sampling_params": {"max_new_tokens": 120, "ignore_eos": True, "temperature": 0}}
    expected = served.generate(**body, return_logprob=True)
    used = served.engine.metrics()["num_used_tokens"]

    async def beside() -> tuple[httpx.Response, list[httpx.Response]]:
        async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
            good = asyncio.create_task(client.post("/generate", json={**body, "return_logprob": True}))
            await asyncio.sleep(0.02)
            bad = [await client.post(path, content=content) for path, content, _ in ALL]
            return await good, bad

    good, bad = asyncio.run(beside())
    assert good.json()["output_ids"] == expected["output_ids"]
    values = [[triple[0] for triple in each["meta_info"]["output_token_logprobs"]] for each in (good.json(), expected)]
    assert values[0] == pytest.approx(values[1], abs=1e-5)
    assert all(400 <= reply.status_code < 500 for reply in bad)
    assert served.engine.metrics()["num_used_tokens"] == used


def test_a_name_in_use_is_refused(served: Served) -> None:
    async def twice() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
            body = {"input_ids": [1], "sampling_params": {"max_new_tokens": 100, "ignore_eos": True}, "rid": "same"}
            return await asyncio.gather(*(client.post("/generate", json=body) for _ in range(2)))

    replies = asyncio.run(twice())
    assert sorted(reply.status_code for reply in replies) == [200, 400]
    check(next(reply for reply in replies if reply.status_code == 400), "rid")


def test_a_batch_with_a_bad_prompt_starts_nothing(served: Served) -> None:
    before = served.engine.metrics()["num_generated_tokens"]
    check(served.http.post("/generate", json={"input_ids": [[1], [2], [9999]]}), "input_ids[2]")
    served.generate(input_ids=[1], sampling_params={"max_new_tokens": 1})
    assert served.engine.metrics()["num_generated_tokens"] == before + 1


def test_what_a_path_does_not_take_is_told_with_what_it_does(served: Served) -> None:
    for endpoint in all_endpoints(ServerState(served.engine.asynchronous, ServerOptions())):
        reply = served.http.request("PATCH", endpoint.path)
        allowed = {*endpoint.methods} | ({"HEAD"} if "GET" in endpoint.methods else set())
        assert (reply.status_code, set(reply.headers["allow"].split(", "))) == (405, allowed), endpoint.path


def test_unknown_paths_and_methods(served: Served) -> None:
    for method, path, status in (("GET", "/nothing", 404), ("GET", "/generate", 405), ("DELETE", "/health", 405)):
        reply = served.http.request(method, path)
        assert reply.status_code == status
        assert reply.json()["code"] == status
        assert reply.json()["type"] == str(status)
