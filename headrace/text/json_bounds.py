"""How much structure a JSON body may have. Owns these bounds, and counts what is there before anything is made of it.

A byte of a body can become fifty bytes of objects, and each object of a container costs the garbage collector again and
again: 64 MB of empty lists take 30 s and 2 GB to read. Text costs no more than its bytes, and is bounded by them. What
is JSON once more inside a string counts as the rest does.
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


class JsonBounds:
    """The bounds, for several texts together. `field` is what errors name."""

    def __init__(self, field: str = "body") -> None:
        self._field = field
        self._num_strings = 0
        self._counts = [0] * len(_LIMITS)

    def check(self, raw: bytes) -> None:
        """Raise `RequestTooLargeError` if `raw`, with all before it, has more parts than a request can need.

        Does not check that it is JSON: behind a backslash outside strings, where any reading ends, it may miscount.
        """
        plain = raw.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in raw else raw
        self._num_strings += plain.count(b'"') // 2
        if self._num_strings > MAX_STRINGS:
            raise self._error(f"{self._num_strings} strings")
        found = _count(b"".join(plain.split(b'"')[::2]))
        self._counts = [total + new for total, new in zip(self._counts, found, strict=True)]
        excess = _excess(self._counts)
        if excess is not None:
            raise self._error(excess)

    def _error(self, excess: str) -> RequestTooLargeError:
        return RequestTooLargeError(f"{self._field} has {excess} or more; no request needs so many", field=self._field)


def check_json(raw: bytes) -> None:
    """`JsonBounds` of one body. Nearly always it is enough to count what stands in strings too, which is quicker."""
    if _excess(_count(raw)) is not None:
        JsonBounds().check(raw)


def _count(raw: bytes) -> list[int]:
    """How many marks of each kind: a mark begins a list or object, follows a key, or stands between values."""
    return [sum(raw.count(mark) for mark in marks) for marks, _, _ in _LIMITS]


def _excess(counts: list[int]) -> str | None:
    for count, (_, limit, what) in zip(counts, _LIMITS, strict=True):
        if count > limit:
            return f"{count} {what}"
    return None
