"""The OpenAI routes through OpenAI's own client, on a real socket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from headrace.types.errors import RequestError
from tests.server.builders import CONTEXT_LENGTH, SCRIPT
from tests.server.conftest import START, Served

GREEDY = {"max_new_tokens": 12, "temperature": 0}
MESSAGES: list[Any] = [{"role": "system", "content": "brief"}, {"role": "user", "content": "hi"}]
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
]


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def script(scripted: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_models(served: Served, client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == [served.engine.config.model]
    assert client.models.retrieve("default").id == served.engine.config.model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_completion(served: Served, client: openai.OpenAI) -> None:
    expected = served.engine.generate("The wheel", sampling_params=GREEDY)[0]
    reply = client.completions.create(model="default", prompt="The wheel", max_tokens=12, temperature=0, logprobs=2)
    choice = reply.choices[0]
    assert choice.text == expected.text
    assert choice.finish_reason == expected.finish_reason
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == pytest.approx(expected.logprobs, abs=1e-5)
    assert choice.logprobs.top_logprobs is not None
    assert all(1 <= len(top) <= 2 for top in choice.logprobs.top_logprobs)
    assert reply.usage is not None
    assert reply.usage.completion_tokens == len(expected.token_ids)
    assert reply.usage.prompt_tokens == expected.num_prompt_tokens
    assert reply.usage.total_tokens == expected.num_prompt_tokens + len(expected.token_ids)


def test_completion_defaults_to_sixteen_tokens(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="default", prompt="a", extra_body={"ignore_eos": True})
    assert reply.usage is not None and reply.usage.completion_tokens == 16
    near_the_end = client.completions.create(
        model="default", prompt=[5] * (CONTEXT_LENGTH - 3), extra_body={"ignore_eos": True}
    )
    assert near_the_end.usage is not None and near_the_end.usage.completion_tokens == 3


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_two_salts_never_share_a_prefix(served: Served, route: str) -> None:
    text = f"{route} salt " * 20
    prompt = {"prompt": text} if route == "completions" else {"messages": [{"role": "user", "content": text}]}

    def num_cached(**fields: str) -> int:
        reply = served.http.post(f"/v1/{route}", json={**prompt, "max_tokens": 1, **fields}).json()
        return int(reply["usage"]["prompt_tokens_details"]["cached_tokens"])

    served.engine.flush_cache()  # other tests have no salt
    assert num_cached(cache_salt="a") == num_cached(cache_salt="b") == num_cached() == 0
    for fields in ({"cache_salt": "a"}, {"cache_salt": "b"}, {}, {"extra_key": "a"}):
        assert num_cached(**fields) > 20, "the same key finds its own"
    assert num_cached(cache_salt="aa") == 0


def test_completion_prompts_of_every_kind_and_samples(served: Served, client: openai.OpenAI) -> None:
    prompts: list[Any] = ["a", ["a", "b"], [1, 2, 3], [[1, 2], [3]]]
    for prompt, count in zip(prompts, (1, 2, 1, 2), strict=True):
        reply = client.completions.create(model="default", prompt=prompt, n=2, max_tokens=2, seed=3)
        assert [choice.index for choice in reply.choices] == list(range(2 * count))
    ids = client.completions.create(model="default", prompt=[1, 2], max_tokens=2, extra_body={"return_token_ids": True})
    choice: Any = ids.choices[0]
    assert choice.prompt_token_ids == [1, 2]
    expected = served.engine.generate(input_ids=[1, 2], sampling_params={"max_new_tokens": 2, "seed": 9})[0]
    seeded = client.completions.create(
        model="default", prompt=[1, 2], max_tokens=2, seed=9, extra_body={"return_token_ids": True}
    )
    assert seeded.choices[0].token_ids == expected.token_ids  # type: ignore[attr-defined]


def test_streamed_completion(client: openai.OpenAI) -> None:
    whole = client.completions.create(
        model="default", prompt="The wheel", max_tokens=20, temperature=0, n=2, logprobs=1
    )
    chunks = list(
        client.completions.create(
            model="default",
            prompt="The wheel",
            max_tokens=20,
            temperature=0,
            n=2,
            logprobs=1,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage or chunks[-1].usage is not None
    for index in range(2):
        pieces = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(piece.text for piece in pieces) == whole.choices[index].text
        assert [piece.finish_reason for piece in pieces if piece.finish_reason] == [whole.choices[index].finish_reason]
        offsets = [offset for piece in pieces if piece.logprobs for offset in piece.logprobs.text_offset or []]
        values = [value for piece in pieces if piece.logprobs for value in piece.logprobs.token_logprobs or []]
        expected = whole.choices[index].logprobs
        assert expected is not None and values == pytest.approx(expected.token_logprobs, abs=1e-5)
        assert offsets == expected.text_offset and offsets == sorted(offsets)


@pytest.mark.parametrize("is_chat", [False, True])
def test_running_counts_come_with_every_chunk(client: openai.OpenAI, is_chat: bool) -> None:
    settings: dict[str, Any] = {
        **{"model": "default", "n": 2, "max_tokens": 6, "stream": True, "extra_body": {"ignore_eos": True}},
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    if is_chat:
        chunks = list(client.chat.completions.create(messages=MESSAGES, **settings))
    else:
        chunks = list(client.completions.create(prompt="The wheel", **settings))
    total = chunks[-1].usage
    for index in range(2):
        usages = [chunk.usage for chunk in chunks[:-1] if chunk.choices[0].index == index]
        assert {usage.prompt_tokens for usage in usages} == {total.prompt_tokens}
        counts = [usage.completion_tokens for usage in usages]
        assert counts == sorted(counts) and counts[0] > 0 and counts[-1] == 6
        assert all(usage.total_tokens == usage.prompt_tokens + usage.completion_tokens for usage in usages)
    assert (total.completion_tokens, chunks[-1].choices) == (12, [])


def test_stop_strings(client: openai.OpenAI) -> None:
    text = client.completions.create(model="default", prompt="x", max_tokens=24, temperature=0).choices[0].text
    stop = text[5:7]
    reply = client.completions.create(model="default", prompt="x", max_tokens=24, temperature=0, stop=[stop, "never"])
    assert reply.choices[0].text == text[: text.index(stop)]
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].matched_stop == stop  # type: ignore[attr-defined]


def test_chat(served: Served, client: openai.OpenAI) -> None:
    tokenizer = served.engine.asynchronous.tokenizer
    assert tokenizer is not None
    ids = tokenizer.apply_chat_template(MESSAGES)
    expected = served.engine.generate(input_ids=ids, sampling_params=GREEDY)[0]
    reply = client.chat.completions.create(
        model="default",
        messages=MESSAGES,
        max_completion_tokens=12,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        extra_body={"return_token_ids": True, "return_meta_info": True},
    )
    choice = reply.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == expected.text
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert [entry.logprob for entry in choice.logprobs.content] == pytest.approx(expected.logprobs, abs=1e-5)
    data = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content)
    assert data.decode("utf-8", "replace") == tokenizer.decode(expected.token_ids, skip_special_tokens=False)
    assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
    body: Any = reply
    assert body.prompt_token_ids == ids
    assert body.choices[0].token_ids == expected.token_ids
    assert body.choices[0].meta_info["version_spans"] == [["default", len(expected.token_ids)]]
    assert body.metadata == {"weight_version": "default"}


def test_streamed_meta_info_covers_every_token(served: Served) -> None:
    """Also of tokens that show no text: half a character, a special token."""
    for seed in range(8):
        body = {
            "messages": MESSAGES,
            "max_tokens": 30,
            "ignore_eos": True,
            "seed": seed,
            "temperature": 2.0,
            "stream": True,
        }
        reply = served.http.post("/v1/chat/completions", json={**body, "return_meta_info": True})
        events = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: {")]
        spans = [
            count
            for event in events
            for choice in json.loads(event)["choices"]
            for _, count in (choice.get("meta_info") or {}).get("version_spans", [])
        ]
        assert sum(spans) == 30, seed


def test_chat_fills_the_context_unless_told_otherwise(start: START) -> None:
    served = start(settings={"context_length": 96})
    reply = served.http.post("/v1/chat/completions", json={"messages": MESSAGES, "ignore_eos": True}).json()
    assert reply["usage"]["total_tokens"] == 96
    assert reply["choices"][0]["finish_reason"] == "length"


def test_what_no_length_was_asked_of_fits_the_pool(start: START) -> None:
    served = start(settings={"kv_pool_tokens": 96})
    pool = served.engine.resolved.max_total_num_tokens
    chat = served.http.post("/v1/chat/completions", json={"messages": MESSAGES, "ignore_eos": True}).json()
    assert chat["usage"]["total_tokens"] == pool + 1 < CONTEXT_LENGTH
    completion = served.http.post("/v1/completions", json={"prompt": [5] * (pool - 2), "ignore_eos": True}).json()
    assert completion["usage"]["completion_tokens"] == 3
    long: Any = [{"role": "user", "content": "word " * 150}]
    refused = served.http.post("/v1/chat/completions", json={"messages": long})
    assert (refused.status_code, refused.json()["param"]) == (400, "messages")


def test_streamed_chat(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": "default", "messages": MESSAGES, "max_tokens": 20, "temperature": 0}
    whole = client.chat.completions.create(**settings, logprobs=True)
    chunks = list(
        client.chat.completions.create(**settings, logprobs=True, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    entries = [
        entry.logprob
        for chunk in chunks
        if chunk.choices and chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content or []
    ]
    assert whole.choices[0].logprobs is not None and whole.choices[0].logprobs.content is not None
    assert entries == pytest.approx([entry.logprob for entry in whole.choices[0].logprobs.content], abs=1e-5)
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert [reason for reason in reasons if reason] == [whole.choices[0].finish_reason]
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_tool_calls(script: openai.OpenAI) -> None:
    reply = script.chat.completions.create(model="default", messages=MESSAGES, tools=TOOLS, temperature=0)
    choice = reply.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I will add."
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 1, "b": 2})


def test_streamed_tool_calls(script: openai.OpenAI) -> None:
    chunks = list(
        script.chat.completions.create(model="default", messages=MESSAGES, tools=TOOLS, temperature=0, stream=True)
    )
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "I will add."
    (call,) = [call for delta in deltas for call in delta.tool_calls or []]
    assert call.function is not None and call.id
    assert (call.index, call.function.name) == (0, "add")
    assert json.loads(call.function.arguments or "") == {"a": 1, "b": 2}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_without_tools_nothing_is_read_as_a_call(script: openai.OpenAI) -> None:
    for more in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        reply = script.chat.completions.create(model="default", messages=MESSAGES, temperature=0, **more)  # type: ignore[call-overload]
        assert reply.choices[0].message.content == "".join(SCRIPT)
        assert reply.choices[0].message.tool_calls is None
        assert reply.choices[0].finish_reason == "stop"


def test_a_tool_round_trip_reaches_the_template(served: Served, client: openai.OpenAI) -> None:
    messages: list[Any] = [
        *MESSAGES,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "3"},
    ]
    reply: Any = client.chat.completions.create(
        model="default", messages=messages, tools=TOOLS, max_tokens=1, extra_body={"return_token_ids": True}
    )
    tokenizer = served.engine.asynchronous.tokenizer
    assert tokenizer is not None
    text = tokenizer.decode(reply.prompt_token_ids, skip_special_tokens=False)
    assert '"name": "add"' in text
    assert '<tool_call>{"a": 1}</tool_call>' in text
    assert "<|im_start|>tool\n3<|im_end|>" in text


def test_errors_have_their_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="default", prompt="a", max_tokens=CONTEXT_LENGTH + 1)
    assert bad.value.param == "max_tokens"
    with pytest.raises(openai.BadRequestError) as forced:
        client.chat.completions.create(model="default", messages=MESSAGES, tools=TOOLS, tool_choice="required")
    assert forced.value.param == "tool_choice"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt", prompt="a")


def test_warnings_come_in_a_header(client: openai.OpenAI) -> None:
    reply = client.completions.with_raw_response.create(
        model="default", prompt="a", max_tokens=1, user="me", extra_body={"frobnicate": 1, "\r\nx": 1}
    )
    warnings = reply.headers["x-headrace-warnings"]
    assert "'frobnicate' is not known" in warnings
    assert "user" not in warnings


def test_template_arguments(served: Served, client: openai.OpenAI) -> None:
    reply: Any = client.chat.completions.create(
        model="default",
        messages=MESSAGES,
        max_tokens=1,
        extra_body={"return_token_ids": True, "chat_template_kwargs": {"enable_thinking": True}},
    )
    tokenizer = served.engine.asynchronous.tokenizer
    assert tokenizer is not None
    assert tokenizer.decode(reply.prompt_token_ids).endswith("<think>")


def test_tokenize_and_detokenize(served: Served) -> None:
    tokenizer = served.engine.asynchronous.tokenizer
    assert tokenizer is not None
    text = "héllo 🙂 <|im_end|>"
    reply = served.http.post("/tokenize", json={"prompt": text}).json()
    assert reply == {"tokens": tokenizer.encode(text), "count": len(tokenizer.encode(text)), "max_model_len": 1024}
    back = served.http.post("/detokenize", json={"tokens": reply["tokens"], "skip_special_tokens": False}).json()
    assert back["text"] == back["prompt"] == text
    many = served.http.post("/tokenize", json={"prompt": ["a", "", "bc"]}).json()
    assert many["count"] == [1, 0, 2]
    assert served.http.post("/detokenize", json={"tokens": many["tokens"]}).json()["text"] == ["a", "", "bc"]
    chat = served.http.post("/tokenize", json={"messages": MESSAGES}).json()
    assert chat["tokens"] == tokenizer.apply_chat_template(MESSAGES)
    for tokens in ([10**30], [-1], ["a"], [416], [1.5], [True]):
        refused = served.http.post("/detokenize", json={"tokens": tokens})
        assert refused.status_code == 400
        assert refused.json()["param"] == "tokens"
    with pytest.raises(RequestError):
        tokenizer.render_chat([{"role": "alien", "content": ""}])
