from __future__ import annotations

import random
from typing import Literal

import pytest

from headrace.text import ToolCall, ToolCallParser, tool_call_style

NAMES = frozenset({"add", "weather"})
Style = Literal["hermes", "llama"]

CASES: list[tuple[Style, str, str, list[ToolCall]]] = [
    ("hermes", "just text", "just text", []),
    ("hermes", "", "", []),
    ("hermes", "   ", "   ", []),
    (
        "hermes",
        'Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2, "}"]}}\n</tool_call>',
        "Let me see.",
        [ToolCall("add", '{"a": 1, "b": [2, "}"]}')],
    ),
    (
        "hermes",
        '<tool_call>{"name": "add", "arguments": {}}</tool_call>\n'
        '<tool_call>{"name": "weather", "arguments": {"c": "é"}}</tool_call>\n',
        "",
        [ToolCall("add", "{}"), ToolCall("weather", '{"c": "é"}')],
    ),
    ("hermes", '<tool_call>{"name": "add"}</tool_call>', "", [ToolCall("add", "{}")]),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1}}', "", [ToolCall("add", '{"a": 1}')]),
    (
        "hermes",
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>',
        "",
        [ToolCall("add", '{"a": 1}')],
    ),
    (
        "hermes",
        'x <tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        'x <tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        [],
    ),
    ("hermes", "a <tool_call>{broken</tool_call> b", "a <tool_call>{broken</tool_call> b", []),
    ("hermes", "a <tool_call>{unfinished", "a <tool_call>{unfinished", []),
    ("hermes", "1 <tool and <tool_cal", "1 <tool and <tool_cal", []),
    (
        "hermes",
        '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
        [],
    ),
    (
        "hermes",
        '<tool_call>{"name": "add", "arguments": {}}</tool_call> done',
        " done",
        [ToolCall("add", "{}")],
    ),
    ("llama", "just text", "just text", []),
    ("llama", " {not json}", " {not json}", []),
    ("llama", '{"name": "add", "parameters": {"a": {"b": "\\"}"}}}', "", [ToolCall("add", '{"a": {"b": "\\"}"}}')]),
    ("llama", '<|python_tag|>{"name": "add", "parameters": {}}', "", [ToolCall("add", "{}")]),
    (
        "llama",
        '{"name": "add", "parameters": {"a": 1}}; {"name": "weather", "arguments": {}} ',
        "",
        [ToolCall("add", '{"a": 1}'), ToolCall("weather", "{}")],
    ),
    ("llama", '{"name": "rm", "parameters": {}}', '{"name": "rm", "parameters": {}}', []),
    ("llama", '{"answer": {"x": 1}} and more', '{"answer": {"x": 1}} and more', []),
    ("llama", '{"name": "add", "param', '{"name": "add", "param', []),
    ("llama", "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    ("llama", "<|pyth", "<|pyth", []),
    ("llama", '{"name": "add", "parameters": {}} and then', " and then", [ToolCall("add", "{}")]),
    ("llama", '[{"name": "add"}]', '[{"name": "add"}]', []),
]


@pytest.mark.parametrize(("style", "text", "shown", "calls"), CASES)
def test_every_cut_gives_the_same_calls(style: Style, text: str, shown: str, calls: list[ToolCall]) -> None:
    source = random.Random(text)
    for trial in range(60):
        parser = ToolCallParser(style, NAMES)
        pieces: list[str] = []
        found: list[ToolCall] = []
        position = 0
        while position < len(text):
            size = len(text) if trial == 0 else 1 if trial == 1 else source.randrange(1, 9)
            piece, new = parser.push(text[position : position + size])
            pieces.append(piece)
            found += new
            position += size
        piece, new = parser.finish()
        assert "".join([*pieces, piece]) == shown
        assert found + new == calls


def test_hostile_json_is_text() -> None:
    deep = '{"name": "add", "arguments": ' + '{"a": ' * 100_000 + "1" + "}" * 100_001
    for style, text in (("hermes", f"<tool_call>{deep}</tool_call>"), ("llama", deep)):
        parser = ToolCallParser(style, NAMES)  # type: ignore[arg-type]
        shown, calls = parser.push(text)
        rest, more = parser.finish()
        assert (shown + rest, calls + more) == (text, [])


def test_text_before_a_call_is_streamed() -> None:
    parser = ToolCallParser("hermes", NAMES)
    assert parser.push("I will <") == ("I will", [])
    assert parser.push("b> add") == (" <b> add", [])


def test_the_style_is_told_from_the_template() -> None:
    assert tool_call_style("... <tool_call> ...") == "hermes"
    assert tool_call_style('{"name": f, "parameters": p} <|python_tag|>') == "llama"
    assert tool_call_style("plain") is None
    assert tool_call_style(None) is None
