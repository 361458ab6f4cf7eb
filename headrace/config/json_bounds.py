"""How much structure JSON from outside may have. Owns these bounds, and counts before
anything is made of it.

A byte of JSON can become fifty bytes of objects, and each object of a container costs the garbage collector again and
again: 64 MB of empty lists take 30 s and 2 GB to read. Text costs no more than its bytes, and is bounded by them.
"""

from __future__ import annotations

import msgspec


class JsonBounds(msgspec.Struct, frozen=True):
    """The most of each part: `containers` are lists and objects, `keys` those of all objects, each of which is hashed
    and held, `values` those of lists and objects, `strings` what stands in quotes."""

    containers: int
    keys: int
    values: int
    strings: int


BODY = JsonBounds(containers=1 << 18, keys=1 << 19, values=1 << 23, strings=1 << 20)
"""Of a request: four lists for each prompt of the largest batch, and token ids, mostly: 8 million take 0.7 s to read,
and 0.3 GB."""

MODEL_FILE = JsonBounds(containers=1 << 19, keys=1 << 20, values=1 << 21, strings=1 << 20)
"""Of a configuration, an index or the header of a weight file: a header has three lists and objects for each tensor."""

VOCABULARY = JsonBounds(containers=1 << 21, keys=1 << 21, values=1 << 22, strings=1 << 21)
"""Of a tokenizer's file: a list for each merge, and the largest vocabularies have half a million of them."""


def excess(raw: bytes, bounds: JsonBounds) -> str | None:
    """What `raw` has too much of, as in "300000 lists and objects"; None if nothing. Does not check that it is JSON."""
    if _excess(_count(raw, 0, len(raw)), bounds) is None:
        return None  # nearly always; what stands in strings was counted too
    num_strings = (raw.count(b'"') - raw.count(b'\\"')) // 2  # or more
    return f"{num_strings} strings" if num_strings > bounds.strings else _excess_outside_strings(raw, bounds)


def _count(raw: bytes, start: int, stop: int) -> list[int]:
    """How many marks of each kind: a mark begins a list or object, follows a key, or stands between values."""
    return [sum(raw.count(mark, start, stop) for mark in marks) for marks in (b"[{", b":", b",")]


def _excess(counts: list[int], bounds: JsonBounds) -> str | None:
    limits = (bounds.containers, bounds.keys, bounds.values)
    for count, limit, what in zip(counts, limits, ("lists and objects", "keys", "values"), strict=True):
        if count > limit:
            return f"{count} {what}"
    return None


def _excess_outside_strings(raw: bytes, bounds: JsonBounds) -> str | None:
    """What there is too much of, between strings."""
    counts = [0, 0, 0]
    position = 0
    while True:
        opening = raw.find(b'"', position)
        found = _count(raw, position, len(raw) if opening < 0 else opening)
        counts = [total + new for total, new in zip(counts, found, strict=True)]
        too_much = _excess(counts, bounds)
        position = 0 if opening < 0 else _end_of_string(raw, opening)
        if too_much is not None or not position:
            return too_much


def _end_of_string(raw: bytes, opening: int) -> int:
    """The position behind the string's closing quote; 0 if there is none."""
    closing = raw.find(b'"', opening + 1)
    while closing > 0:
        first = closing
        while raw[first - 1] == ord("\\"):
            first -= 1
        if (closing - first) % 2 == 0:
            break
        closing = raw.find(b'"', closing + 1)
    return closing + 1
