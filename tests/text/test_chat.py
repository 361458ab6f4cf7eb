from __future__ import annotations

from typing import Any

import pytest

from headrace.config.json_bounds import BODY
from headrace.text import check_template_arguments, normalize_messages, normalize_tools
from headrace.types.errors import RequestError, RequestTooLargeError


def test_parts_developer_and_tool_calls() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = normalize_messages(
        [
            {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2", "tool_call_id": "1", "name": None},
        ]
    )
    assert messages[0] == {"role": "system", "content": "be brief"}
    assert messages[1]["content"] == ""
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert messages[2] == {"role": "tool", "content": "2", "tool_call_id": "1"}


@pytest.mark.parametrize("calls", [[], None, ()])
def test_no_tool_calls_are_as_absent(calls: Any) -> None:
    for content, expected in (("4", "4"), (None, ""), ([], "")):
        message = {"role": "assistant", "content": content, "tool_calls": calls, "function_call": None}
        assert normalize_messages([message]) == [{"role": "assistant", "content": expected}]


@pytest.mark.parametrize("arguments", [None, "", "  ", "null", "{}", {}])
def test_no_arguments_are_an_empty_object(arguments: Any) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    (message,) = normalize_messages([{"role": "assistant", "tool_calls": [call, {"function": {"name": "g"}}]}])
    assert [each["function"]["arguments"] for each in message["tool_calls"]] == [{}, {}]


def test_a_refusal_is_what_the_assistant_said() -> None:
    parts = [{"type": "text", "text": "No. "}, {"type": "refusal", "refusal": "I will not."}]
    messages = normalize_messages(
        [
            {"role": "assistant", "content": parts, "refusal": None},
            {"role": "assistant", "content": None, "refusal": "I will not."},
            {"role": "assistant", "content": None},
        ]
    )
    assert [message["content"] for message in messages] == ["No. I will not.", "I will not.", ""]
    assert all(set(message) == {"role", "content"} for message in messages)


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ("hi", "messages"),
        ([], "messages"),
        (["hi"], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "alien", "content": "x"}], "messages[0].role"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}], "messages[0].content[0]"),
        ([{"role": "assistant", "content": [{"type": "refusal"}]}], "messages[0].content[0].refusal"),
        ([{"role": "assistant", "tool_calls": 1}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0].function.name"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}],
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_bad_messages_are_named(messages: Any, field: str) -> None:
    with pytest.raises(RequestError) as raised:
        normalize_messages(messages)
    assert raised.value.field == field


@pytest.mark.parametrize(
    ("tools", "field"),
    [
        ({}, "tools"),
        ([1], "tools[0].type"),
        ([{"type": "code"}], "tools[0].type"),
        ([{"type": "function"}], "tools[0].function.name"),
        ([{"type": "function", "function": {"name": ""}}], "tools[0].function.name"),
        ([{"type": "function", "function": {"name": "f", "parameters": []}}], "tools[0].function.parameters"),
    ],
)
def test_bad_tools_are_named(tools: Any, field: str) -> None:
    with pytest.raises(RequestError) as raised:
        normalize_tools(tools)
    assert raised.value.field == field


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "messages", "return_tensors", "a-b"])
def test_template_arguments_cannot_steer_rendering(name: str) -> None:
    with pytest.raises(RequestError) as raised:
        check_template_arguments({name: 1})
    assert raised.value.field == f"chat_template_kwargs.{name}"
    assert check_template_arguments({"enable_thinking": False}) == {"enable_thinking": False}


def test_arguments_in_strings_have_the_bounds_of_a_body_all_together() -> None:
    def messages(count: int, num_lists: int) -> list[dict[str, Any]]:
        arguments = '{"a": [' + "[]," * num_lists + "1]}"
        return [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}] * count

    for too_many in (messages(1, BODY.containers), messages(4, BODY.containers // 4)):
        with pytest.raises(RequestTooLargeError, match="lists and objects") as caught:
            normalize_messages(too_many)
        assert caught.value.field == "messages"
    text = '{"a": "' + "[" * (BODY.containers + 1) + '"}'
    normalize_messages([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": text}}]}])
