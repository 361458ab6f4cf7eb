"""How much structure a JSON body may have. Owns these bounds, and counts what is there before anything is made of it.

A byte of a body can become fifty bytes of objects, and each object of a container costs the garbage collector again and
again: 64 MB of empty lists take 30 s and 2 GB to read. Text costs no more than its bytes, and is bounded by them.
"""

from __future__ import annotations

from headrace.types.errors import RequestTooLargeError

MAX_CONTAINERS = 1 << 18
"""Lists and objects: four for each prompt of the largest batch."""

MAX_KEYS = 1 << 19
"""Keys of all objects, each of which is hashed and held."""

MAX_VALUES = 1 << 23
"""Values of lists and objects: token ids, mostly. 8 million take 0.7 s to read and 0.3 GB."""

MAX_STRINGS = 1 << 20

_LIMITS = ((b"[{", MAX_CONTAINERS, "lists and objects"), (b":", MAX_KEYS, "keys"), (b",", MAX_VALUES, "values"))


def check_json(raw: bytes) -> None:
    """Raise `RequestTooLargeError` if `raw` has more parts than a request can need. Does not check that it is JSON."""
    if _excess(_count(raw, 0, len(raw))) is None:
        return  # nearly always; what stands in strings was counted too
    num_strings = (raw.count(b'"') - raw.count(b'\\"')) // 2  # or more
    excess = f"{num_strings} strings" if num_strings > MAX_STRINGS else _excess_outside_strings(raw)
    if excess is not None:
        raise RequestTooLargeError(f"body has {excess} or more; no request needs so many", field="body")


def _count(raw: bytes, start: int, stop: int) -> list[int]:
    """How many marks of each kind: a mark begins a list or object, follows a key, or stands between values."""
    return [sum(raw.count(mark, start, stop) for mark in marks) for marks, _, _ in _LIMITS]


def _excess(counts: list[int]) -> str | None:
    for count, (_, limit, what) in zip(counts, _LIMITS, strict=True):
        if count > limit:
            return f"{count} {what}"
    return None


def _excess_outside_strings(raw: bytes) -> str | None:
    """What there is too much of, between strings."""
    counts = [0] * len(_LIMITS)
    position = 0
    while True:
        opening = raw.find(b'"', position)
        found = _count(raw, position, len(raw) if opening < 0 else opening)
        counts = [total + new for total, new in zip(counts, found, strict=True)]
        excess = _excess(counts)
        position = 0 if opening < 0 else _end_of_string(raw, opening)
        if excess is not None or not position:
            return excess


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
