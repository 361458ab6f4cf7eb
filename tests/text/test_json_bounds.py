"""A body is refused by its structure before objects are made of it; text may hold what it likes."""

from __future__ import annotations

import json
import random
import sys

import pytest

from headrace.text import json_bounds
from headrace.text.json_bounds import MAX_CONTAINERS, MAX_KEYS, MAX_STRINGS, MAX_VALUES, check_json
from headrace.types.errors import RequestTooLargeError


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b'{"x": [' + b"[]," * (MAX_CONTAINERS + 1) + b"1]}", "lists and objects"),
        (b'{"x": [' + b"{}," * (MAX_CONTAINERS + 1) + b"1]}", "lists and objects"),
        (b'{"x": ' + b"[" * (MAX_CONTAINERS + 1), "lists and objects"),
        (b'{"x": [' + b"1," * (MAX_VALUES + 1) + b"1]}", "values"),
        (b"{" + b'"k":1,' * (MAX_KEYS + 1) + b'"z":1}', "keys"),
        (b'{"x": [' + b'"",' * (MAX_VALUES + 1) + b"1]}", "strings"),
        (b'{"x": [' + b'"\\\\",' * (MAX_VALUES + 1) + b"1]}", "strings"),
        (b'{"t": "[[[", "x": [' + b"[]," * (MAX_CONTAINERS + 1) + b"1]}", "lists and objects"),
    ],
    ids=range(8),
)
def test_more_parts_than_a_request_needs_are_refused(body: bytes, what: str) -> None:
    with pytest.raises(RequestTooLargeError, match=what) as caught:
        check_json(body)
    assert (caught.value.status, caught.value.field) == (413, "body")


@pytest.mark.parametrize(
    "text", ["[{,:" * 3_000_000, '\\"[{' * 1_000_000, "\\" * 999_999 + "[" * 1_000_000, '"' * MAX_STRINGS]
)
def test_text_may_hold_any_number_of_brackets(text: str) -> None:
    check_json(json.dumps({"text": [text, "", "x"]}).encode())


def test_marks_are_counted_outside_strings_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a plain walk through the bytes, with bounds so small that every body is over one of them at first."""
    source = random.Random(0)
    for _ in range(2_000):
        raw = "".join(source.choices('[]{}:,"\\a', k=source.randrange(40))).encode()
        counts, is_inside, position = {mark: 0 for mark in b"[{:,"}, False, 0
        is_broken = False
        while position < len(raw):
            byte = raw[position]
            if is_inside and byte == ord("\\"):
                position += 1
            elif byte == ord("\\"):
                is_broken = True
            elif byte == ord('"'):
                is_inside = not is_inside
            elif not is_inside and byte in counts:
                counts[byte] += 1
            position += 1
        limit = source.randrange(6)
        if is_broken:
            continue  # reading ends there, before what follows is made into anything
        marks = ((b"[{", "lists and objects"), (b":", "keys"), (b",", "values"))
        monkeypatch.setattr(json_bounds, "_LIMITS", tuple((mark, limit, what) for mark, what in marks))
        is_over = counts[ord("[")] + counts[ord("{")] > limit or counts[ord(":")] > limit or counts[ord(",")] > limit
        if is_over:
            with pytest.raises(RequestTooLargeError):
                check_json(raw)
        else:
            check_json(raw)


def test_escaped_quotes_take_no_step_each() -> None:
    raw = json.dumps({"a": "[" * (MAX_CONTAINERS + 1) + '"' * 100_000 + "\\" * 100_001}).encode()
    num_calls = 0

    def count(*event: object) -> None:
        nonlocal num_calls
        num_calls += 1

    sys.setprofile(count)
    try:
        check_json(raw)
    finally:
        sys.setprofile(None)
    assert num_calls < 1_000


def test_escaped_quotes_hide_nothing() -> None:
    for text in ('"', "\\", '\\"', '"\\'):
        quoted = json.dumps(text * 101)
        body = f'{{"t": {quoted}, "x": [{"[]," * (MAX_CONTAINERS + 1)}1]}}'.encode()
        with pytest.raises(RequestTooLargeError, match="lists and objects"):
            check_json(body)
    with pytest.raises(RequestTooLargeError, match="strings"):  # each ends in an escaped backslash
        check_json(b'{"x": [' + rb'"a\\",' * (MAX_VALUES + 1) + b"1]}")
