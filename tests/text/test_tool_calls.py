from __future__ import annotations

import random
import time
from typing import Any, Literal

import pytest

from headrace.text import CALL_FORMS, ToolCall, ToolCallParser, tool_call_style
from headrace.text.tool_parser import MAX_CALLS

NAMES = frozenset({"add", "weather"})
Style = Literal["hermes", "llama", "mistral"]
A, B = '{"name": "add", "arguments": {"a": 1}}', '{"name": "weather", "parameters": {}}'
ADD, WEATHER = ToolCall("add", '{"a": 1}'), ToolCall("weather", "{}")
H, M = f"<tool_call>{A}</tool_call>", f"[TOOL_CALLS][{A}]"

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
    ("llama", '[{"name": "add"}]', "", [ToolCall("add", "{}")]),
    ("llama", '[{"name": "add"}, 1]', '[{"name": "add"}, 1]', []),
    ("llama", "[a](b) {", "[a](b) {", []),
    ("llama", f"I add. <|python_tag|>{A}", "I add.", [ADD]),
    ("llama", f"<think>{A}</think>\n{B}", f"<think>{A}</think>", [WEATHER]),
    ("mistral", f'[TOOL_CALLS] [{A}, {{"name": "weather", "arguments": {{}}, "id": "abcdefghi"}}]', "", [ADD, WEATHER]),
    ("mistral", f"I add. [TOOL_CALLS]{A}", "I add.", [ADD]),
    ("mistral", '[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]weather[ARGS]{}', "", [ADD, WEATHER]),
    ("mistral", '[TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]{"a": 1}', "", [ADD]),
    ("mistral", '[TOOL_CALLS]add{"a": 1}', "", [ADD]),
    ("mistral", "[TOOL_CALLS]rm[ARGS]{}", "[TOOL_CALLS]rm[ARGS]{}", []),
    ("mistral", "[TOOL_CALLS]add[ARGS]{", "[TOOL_CALLS]add[ARGS]{", []),
    ("mistral", "[TOOL_CALLS]add", "[TOOL_CALLS]add", []),
    ("mistral", "[TOOL_CALLS]" + "add " * 100 + "{}", "[TOOL_CALLS]" + "add " * 100 + "{}", []),
    ("mistral", f"[THINK]{M}[/THINK]{M}", f"[THINK]{M}[/THINK]", [ADD]),
    ("mistral", f"see [1] and {A}", f"see [1] and {A}", []),
    # what stands in a string is part of it
    (
        "hermes",
        '<tool_call>{"name": "add", "arguments": {"a": "x</tool_call>y"}}</tool_call>',
        "",
        [ToolCall("add", '{"a": "x</tool_call>y"}')],
    ),
    (
        "hermes",
        '<tool_call>{"name": "add", "arguments": {"a": "<think>"}}</tool_call> b',
        " b",
        [ToolCall("add", '{"a": "<think>"}')],
    ),
    (
        "hermes",
        '<tool_call>{"name": "add", "arguments": {"a": "1\n\t2"}}</tool_call>',
        "",
        [ToolCall("add", '{"a": "1\\n\\t2"}')],
    ),
    (
        "hermes",
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": \\"\n\\"}"}</tool_call>',
        "",
        [ToolCall("add", '{"a": "\\n"}')],
    ),
    # arguments that are none
    *(
        ("hermes", f'<tool_call>{{"name": "add", "arguments": {none}}}</tool_call>', "", [ToolCall("add", "{}")])
        for none in ("null", '""', '" "', '"null"', '"{}"', "{}", 'null, "parameters": {}')
    ),
    *(
        ("hermes", text, text, [])
        for text in (
            f'<tool_call>{{"name": "add", "arguments": {wrong}}}</tool_call>'
            for wrong in ("1", '"1"', "[]", '"[]"', '"x"', "NaN", '{"a": NaN}', "true", "1e999", "'x'", '"\\ud800"')
        )
    ),
    # calls parted by anything or nothing
    ("hermes", f"<tool_call>{A}\n<tool_call>{B}</tool_call>", "", [ADD, WEATHER]),
    ("hermes", f"<tool_call>{A}</tool_call>, <tool_call>{B}</tool_call>.", ".", [ADD, WEATHER]),
    ("hermes", f"<tool_call>{A},\n{B}</tool_call>", "", [ADD, WEATHER]),
    ("hermes", f"<tool_call>{A}{B}", "", [ADD, WEATHER]),
    ("hermes", f"<tool_call>[{A}, {B}]</tool_call>", "", [ADD, WEATHER]),
    ("hermes", f"<tool_call>\n<tool_call>{A}</tool_call>", "", [ADD]),
    ("hermes", f"<tool_call>{A}</tool_call> {B}", f" {B}", [ADD]),
    ("hermes", f"<tool_call>{A}</tool_call>, <tool_call>", ", <tool_call>", [ADD]),
    ("hermes", f"<tool_call>{A}</tool_call></tool_call>", "</tool_call>", [ADD]),
    ("hermes", f"<tool_call>{A}</tool_call> ,;\n", "", [ADD]),
    ("hermes", "<tool_call></tool_call>", "<tool_call></tool_call>", []),
    ("hermes", "<tool_call>[]</tool_call>", "<tool_call>[]</tool_call>", []),
    ("hermes", f"<tool_call>[{A}, 1]</tool_call>", f"<tool_call>[{A}, 1]</tool_call>", []),
    ("hermes", f'<tool_call>{{"name": "a<tool_call>{B}</tool_call>', '<tool_call>{"name": "a', [WEATHER]),
    # thoughts
    ("hermes", f"<think>{H}</think>\n{H}", f"<think>{H}</think>", [ADD]),
    ("hermes", f"<think>{H}", f"<think>{H}", []),
    ("hermes", f"a <think>{H}</thin", f"a <think>{H}</thin", []),
    ("hermes", f"{H}<think>{H}</think> b {H}", f"<think>{H}</think> b", [ADD, ADD]),
    ("hermes", f"</think>{H}", "</think>", [ADD]),
]


@pytest.mark.parametrize(("style", "text", "shown", "calls"), CASES)
def test_every_cut_gives_the_same_calls(style: Style, text: str, shown: str, calls: list[ToolCall]) -> None:
    source = random.Random(text)
    assert parse(style, [text]) == (shown, calls)
    assert parse(style, list(text)) == (shown, calls)
    for _ in range(12):
        assert parse(style, cut(text, source)) == (shown, calls)


def parse(style: Style, pieces: list[str], **settings: Any) -> tuple[str, list[ToolCall]]:
    parser = ToolCallParser(style, NAMES, **settings)
    results = [*map(parser.push, pieces), parser.finish()]
    return "".join(shown for shown, _ in results), [call for _, calls in results for call in calls]


def cut(text: str, source: random.Random) -> list[str]:
    pieces: list[str] = []
    while text:
        size = source.randrange(1, 9)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


def test_a_prompt_that_ends_in_a_thought_leaves_it_open() -> None:
    form = CALL_FORMS["hermes"]
    assert form.thought_at_end("<think> is a tag. assistant\n<think>\n") == "<think>"
    assert form.thought_at_end("<think>\n\n</think>\n\n") == form.thought_at_end("") == ""
    assert parse("hermes", [f"hm {H}</think>", f"so {H}"], thought="<think>") == (f"hm {H}</think>so", [ADD])
    assert parse("hermes", list(H), thought="<think>") == (H, [])
    assert parse("llama", list(f"{A}</think> {B}"), thought="<think>") == (f"{A}</think>", [WEATHER])


@pytest.mark.parametrize(
    ("style", "text", "count"),
    [
        ("hermes", H, 0),
        ("hermes", "text", 0),
        ("hermes", f"<think><tool_call>{{</think>{H}", 0),
        ("hermes", f"a<tool_call>{{x</tool_call>{H}<tool_call>", 2),
        ("hermes", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>', 1),
        ("hermes", "<tool_call>[1]</tool_call> b", 1),
        ("mistral", "[TOOL_CALLS]rm[ARGS]{}", 1),
        ("mistral", M, 0),
        ("llama", '{"name": "rm"}', 0),
        ("llama", '<|python_tag|>{"name": "rm"}', 1),
    ],
)
def test_calls_that_cannot_be_read_are_counted(style: Style, text: str, count: int) -> None:
    for size in (1, 3, len(text)):
        parser = ToolCallParser(style, NAMES)
        for start in range(0, len(text), size):
            parser.push(text[start : start + size])
        parser.finish()
        assert parser.num_unread == count


def test_hidden_tags_are_read_and_not_shown() -> None:
    hidden = frozenset(CALL_FORMS["hermes"].tags)
    for text, shown, calls in (
        (f"<think>a {H}</think> b {H}", f"a {A} b", [ADD]),
        ("<tool_call>{broken</tool_call> b", "{broken b", []),
        ("<tool_call>", "", []),
        (f"{H}, <tool_call>", ", ", [ADD]),
    ):
        assert parse("hermes", [text], hidden=hidden) == parse("hermes", list(text), hidden=hidden) == (shown, calls)


VOCABULARY = [
    *("<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>"),
    *(A, B, H, '{"name": "add", "arguments": ', '"', "\\", "{", "}", "[", "]", ",", ";", " ", "\n", "add", "null", "1"),
    *("<tool", "_call>", "[TOOL_", "CALLS]", "</", "think>", "\x00", "\ud800", "é", "name", "'", "<|python"),
]


@pytest.mark.parametrize("style", ["hermes", "llama", "mistral"])
def test_random_texts_are_read_alike_however_they_are_cut(style: Style) -> None:
    source = random.Random(style)
    num_calls = 0
    for _ in range(1_200):
        text = "".join(source.choices(VOCABULARY, k=source.randrange(1, 14)))
        whole = parse(style, [text])
        assert parse(style, list(text)) == parse(style, cut(text, source)) == whole, text
        if not whole[1]:
            assert whole[0] == text, "nothing is lost"
        num_calls += len(whole[1])
    assert num_calls > 5


def test_mutated_calls_are_read_alike_however_they_are_cut() -> None:
    source = random.Random(0)
    for style, text in [(style, text) for style, text, _, calls in CASES if calls]:
        for _ in range(12):
            characters = list(text)
            for _ in range(source.randrange(1, 4)):
                position = source.randrange(len(characters))
                characters[position : position + source.randrange(3)] = source.choice(["", '"', "}", "<", "\\", "a"])
            mutated = "".join(characters)
            assert parse(style, list(mutated)) == parse(style, cut(mutated, source)) == parse(style, [mutated])


@pytest.mark.parametrize(
    ("style", "unit", "num_units"),
    [
        ("hermes", " ", 40_000),
        ("hermes", "<tool_call>", 10_000),
        ("hermes", '<tool_call>{"', 10_000),
        ("hermes", '<tool_call>{"a": "\\', 6_000),
        ("hermes", H, 3_000),
        ("hermes", f"{A},", 3_000),
        ("hermes", "<tool_call>{", 10_000),
        ("hermes", "<think></think>", 8_000),
        ("llama", f"{A};", 3_000),
        ("llama", "{[", 20_000),
        ("mistral", "[TOOL_CALLS][", 10_000),
        ("mistral", "[TOOL_CALLS]add", 8_000),
        ("mistral", '[TOOL_CALLS]add[ARGS]{"', 5_000),
        ("mistral", "[", 40_000),
    ],
)
def test_the_work_grows_with_the_length_only(style: Style, unit: str, num_units: int) -> None:
    """Long texts, whole and by small pieces, of every kind that makes the reader look back."""
    text = ("<tool_call>" if unit.startswith("{") and style == "hermes" else "") + unit * num_units
    started = time.thread_time()
    whole = parse(style, [text])
    assert parse(style, [text[start : start + 7] for start in range(0, len(text), 7)]) == whole
    assert len(whole[1]) <= MAX_CALLS
    assert time.thread_time() - started < 15


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
    assert tool_call_style("[AVAILABLE_TOOLS] ... [TOOL_CALLS]") == "mistral"
    assert tool_call_style("plain") is None
    assert tool_call_style(None) is None
