"""A body is refused by its structure before objects are made of it; text may hold what it likes."""

from __future__ import annotations

import json
import random
import sys

import pytest

from headrace.config.json_bounds import BODY, MODEL_FILE, VOCABULARY, JsonBounds, excess
from headrace.server.wire import decode_object
from headrace.types.errors import RequestTooLargeError


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b'{"x": [' + b"[]," * (BODY.containers + 1) + b"1]}", "lists and objects"),
        (b'{"x": [' + b"{}," * (BODY.containers + 1) + b"1]}", "lists and objects"),
        (b'{"x": ' + b"[" * (BODY.containers + 1), "lists and objects"),
        (b'{"x": [' + b"1," * (BODY.values + 1) + b"1]}", "values"),
        (b"{" + b'"k":1,' * (BODY.keys + 1) + b'"z":1}', "keys"),
        (b'{"x": [' + b'"",' * (BODY.values + 1) + b"1]}", "strings"),
        (b'{"x": [' + b'"\\\\",' * (BODY.values + 1) + b"1]}", "strings"),
        (b'{"t": "[[[", "x": [' + b"[]," * (BODY.containers + 1) + b"1]}", "lists and objects"),
    ],
    ids=range(8),
)
def test_more_parts_than_a_request_needs_are_refused(body: bytes, what: str) -> None:
    with pytest.raises(RequestTooLargeError, match=what) as caught:
        decode_object(body)
    assert (caught.value.status, caught.value.field) == (413, "body")


@pytest.mark.parametrize(
    "text", ["[{,:" * 3_000_000, '\\"[{' * 1_000_000, "\\" * 999_999 + "[" * 1_000_000, '"' * BODY.strings]
)
def test_text_may_hold_any_number_of_brackets(text: str) -> None:
    assert excess(json.dumps({"text": [text, "", "x"]}).encode(), BODY) is None


@pytest.mark.parametrize("bounds", [BODY, MODEL_FILE, VOCABULARY], ids=["body", "model file", "vocabulary"])
def test_too_many_strings_are_too_many_where_nothing_else_is(bounds: JsonBounds) -> None:
    assert bounds.strings < bounds.values
    assert excess(b"[" + b'"ab",' * (bounds.strings - 1) + b'"a"]', bounds) is None
    assert excess(b"[" + b'"ab",' * bounds.strings + b'"a"]', bounds) == f"{bounds.strings + 1} strings"


def test_marks_are_counted_outside_strings_only() -> None:
    """Against a plain walk through the bytes, with bounds so small that every body is over one of them at first."""
    source = random.Random(0)
    for _ in range(2_000):
        raw = "".join(source.choices('[]{}:,"\\a', k=source.randrange(40))).encode()
        counts, is_inside, position = {mark: 0 for mark in b"[{:,"}, False, 0
        is_broken, num_quotes = False, 0
        while position < len(raw):
            byte = raw[position]
            if is_inside and byte == ord("\\"):
                position += 1
            elif byte == ord("\\"):
                is_broken = True
            elif byte == ord('"'):
                is_inside, num_quotes = not is_inside, num_quotes + 1
            elif not is_inside and byte in counts:
                counts[byte] += 1
            position += 1
        limit = source.randrange(6)
        if is_broken:
            continue  # reading ends there, before what follows is made into anything
        is_over = counts[ord("[")] + counts[ord("{")] > limit or counts[ord(":")] > limit or counts[ord(",")] > limit
        assert (excess(raw, JsonBounds(limit, limit, limit, strings=100)) is not None) == is_over
        is_over |= num_quotes // 2 > limit
        assert (excess(raw, JsonBounds(limit, limit, limit, strings=limit)) is not None) == is_over


def test_escaped_quotes_take_no_step_each() -> None:
    raw = json.dumps({"a": "[" * (BODY.containers + 1) + '"' * 100_000 + "\\" * 100_001}).encode()
    num_calls = 0

    def count(*event: object) -> None:
        nonlocal num_calls
        num_calls += 1

    sys.setprofile(count)
    try:
        assert excess(raw, BODY) is None
    finally:
        sys.setprofile(None)
    assert num_calls < 1_000


def test_escaped_quotes_hide_nothing() -> None:
    for text in ('"', "\\", '\\"', '"\\'):
        quoted = json.dumps(text * 101)
        body = f'{{"t": {quoted}, "x": [{"[]," * (BODY.containers + 1)}1]}}'.encode()
        assert str(excess(body, BODY)).endswith("lists and objects")
    strings = b'{"x": [' + rb'"a\\",' * (BODY.values + 1) + b"1]}"  # each ends in an escaped backslash
    assert str(excess(strings, BODY)).endswith("strings")
