"""`chat` of an engine and of a client, held against the OpenAI route, which is the same code: one model, one server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from headrace import AsyncEngine, ChatReply, Client, Engine, HeadraceError, RequestError, SamplingParams
from headrace.engine.chat import CALLS_NOT_READ
from tests.server.builders import SETTINGS
from tests.server.conftest import Served

MESSAGES = [{"role": "user", "content": "What is 1 + 2?"}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 32}
ENDS = '\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


@pytest.fixture(scope="module", params=["engine", "client"])
def door(scripted: Served, request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "engine":
        yield scripted.engine
        return
    with Client(scripted.url) as client:
        yield client


def told(reply: ChatReply) -> dict[str, Any]:
    """The message without the names of its calls, which are drawn."""
    calls = [each["function"] for each in reply.message.get("tool_calls", ())]
    return {**reply.message, "tool_calls": calls} if calls else reply.message


def test_a_call_of_a_tool_is_read(door: Any, scripted: Served) -> None:
    (reply,) = door.chat(MESSAGES, GREEDY, tools=TOOLS)
    client = openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="none", max_retries=0)
    with client:
        asked: Any = {"model": "default", "messages": MESSAGES, "tools": TOOLS, "temperature": 0, "max_tokens": 32}
        answer = client.chat.completions.create(**asked, extra_body={"return_token_ids": True})
    theirs = answer.choices[0].message.to_dict()
    assert reply.message["tool_calls"][0]["id"].startswith("call_")
    assert told(reply)["tool_calls"] == [each["function"] for each in theirs.pop("tool_calls")]
    assert {**theirs, "tool_calls": None} == {**reply.message, "tool_calls": None}
    assert reply.finish_reason == answer.choices[0].finish_reason == "tool_calls"
    assert reply.prompt_token_ids == answer.to_dict()["prompt_token_ids"]
    assert reply.sample.finish_reason == "stop" and len(reply.sample.logprobs) == len(reply.sample.token_ids)
    (plain,) = door.chat(MESSAGES, GREEDY)
    assert "tool_calls" not in plain.message and "<tool_call>" in plain.message["content"]
    assert plain.finish_reason == "stop"


def test_a_conversation_goes_on_with_the_reply(door: Any) -> None:
    (reply,) = door.chat(MESSAGES, GREEDY, tools=TOOLS)
    call_id = reply.message["tool_calls"][0]["id"]
    more = [*MESSAGES, reply.message, {"role": "tool", "tool_call_id": call_id, "content": "3"}]
    (after,) = door.chat(more, GREEDY, tools=TOOLS)
    assert len(after.prompt_token_ids) > len(reply.prompt_token_ids)


def test_tools_whose_calls_cannot_be_read_are_told(
    scripted: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("headrace.engine.chat.tool_call_style", lambda template: None)
    (reply,) = scripted.engine.chat(MESSAGES, GREEDY, tools=TOOLS)
    assert "tool_calls" not in reply.message and CALLS_NOT_READ in caplog.messages


def test_a_final_message_is_continued(door: Any, scripted: Served) -> None:
    """The reply begins where the message ends, on every door; white space at its end stays."""
    tokenizer = scripted.engine.tokenizer
    assert tokenizer is not None
    begun = [*MESSAGES, {"role": "assistant", "content": "I will add. <tool_call>  "}]
    (reply,) = door.chat(begun, {"max_new_tokens": 1}, continue_final_message=True)
    assert tokenizer.decode(reply.prompt_token_ids).endswith("I will add. <tool_call>  ")
    begun[-1]["content"] = "I will add. <tool_call>"
    (reply,) = door.chat(begun, GREEDY, continue_final_message=True)
    assert reply.message["content"] == ENDS
    body = {"model": "default", "messages": begun, "temperature": 0, "max_tokens": 32, "continue_final_message": True}
    answer = scripted.http.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == ENDS
    ids = scripted.http.post("/tokenize", json={"messages": begun, "continue_final_message": True}).json()["tokens"]
    assert ids == reply.prompt_token_ids


def test_many_conversations_and_samples(door: Any) -> None:
    longer = [{"role": "system", "content": "Add."}, *MESSAGES]
    params = [SamplingParams(n=2, **GREEDY), {**GREEDY, "n": 1}]
    replies = door.chat([MESSAGES, longer], params, request_id="many", tools=TOOLS)
    assert [(each.sample.prompt_index, each.sample.index) for each in replies] == [(0, 0), (0, 1), (1, 0)]
    assert all(told(each) == told(replies[0]) for each in replies)
    assert len(replies[2].prompt_token_ids) > len(replies[0].prompt_token_ids) == len(replies[1].prompt_token_ids)


def test_a_bad_conversation_fails_alone_when_asked(door: Any) -> None:
    given = [MESSAGES, [{"role": "nobody", "content": "x"}], [{"role": "user", "content": "x" * 10**6}]]
    good, *bad = door.chat(given, GREEDY, return_errors=True)
    assert good.finish_reason == "stop" and good.sample.error is None
    fields = [each.sample.error.field for each in bad]
    assert fields == ["messages[1][0].role", "messages[2]"]
    assert good.sample.seed is not None and {each.sample.seed for each in bad} == {None}
    assert all(each.finish_reason == "error" and each.message["content"] == "" for each in bad)


WRONG: dict[str, dict[str, Any]] = {
    "messages": {"messages": []},
    "messages[0].role": {"messages": [{"role": "nobody"}]},
    "messages[1][0].content": {"messages": [MESSAGES, [{"role": "user", "content": 5}]]},
    "tools[0].function.name": {"tools": [{"type": "function"}]},
    "chat_template_kwargs.messages": {"chat_template_kwargs": {"messages": []}},
    "continue_final_message": {"continue_final_message": True, "add_generation_prompt": True},
    "add_generation_prompt": {"add_generation_prompt": "yes"},
    "sampling_params.max_tokens": {"sampling_params": {"max_tokens": 4}},
    "max_tokens": {"max_tokens": 4},
}


@pytest.mark.parametrize("field", WRONG)
def test_what_is_wrong_is_named(field: str, door: Any) -> None:
    arguments = {"messages": MESSAGES, **WRONG[field]}
    with pytest.raises(RequestError) as caught:
        door.chat(**arguments)
    assert caught.value.field == field
    assert "max_tokens" not in field or "max_new_tokens" in caught.value.message


def test_a_last_message_that_cannot_be_continued(door: Any) -> None:
    call = {"id": "x", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    begun = [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(RequestError, match="without tool calls"):
        door.chat(begun, GREEDY, continue_final_message=True)


def test_an_engine_without_a_tokenizer_says_so(model_folder: Any) -> None:
    async def talk() -> HeadraceError:
        async with AsyncEngine(model_folder, inprocess=True, skip_tokenizer_init=True, **SETTINGS) as engine:
            with pytest.raises(RequestError, match="send token ids") as caught:
                await engine.chat(MESSAGES)
            return caught.value

    assert asyncio.run(talk()).field == "messages"


def test_the_blocking_engine_has_the_docstring_of_the_other() -> None:
    assert Engine.chat.__doc__ == AsyncEngine.chat.__doc__
