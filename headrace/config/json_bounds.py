"""How much structure JSON from outside may have. Owns these bounds, and counts before anything is made of it.

A byte of JSON can become fifty bytes of objects, and each object of a container costs the garbage collector again and
again: 64 MB of empty lists take 30 s and 2 GB to read. Text costs no more than its bytes, and is bounded by them. What
is JSON once more inside a string counts as the rest does.
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
    """What `raw` has too much of, as in "300000 lists and objects"; None if nothing. Nearly always its length says so,
    or it is enough to count what stands in strings too, which is quicker."""
    if len(raw) <= min(bounds.containers, bounds.keys, bounds.values, bounds.strings):
        return None
    if raw.count(b'"') // 2 <= bounds.strings and _over(_count(raw), bounds) is None:
        return None
    return JsonCount(bounds).add(raw)


class JsonCount:
    """The parts of several texts together."""

    def __init__(self, bounds: JsonBounds) -> None:
        self._bounds = bounds
        self._num_strings = 0
        self._counts = [0, 0, 0]

    def add(self, raw: bytes) -> str | None:
        """What there is too much of, with `raw` counted in; None if nothing.

        Does not check that it is JSON: behind a backslash outside strings, where any reading ends, it may miscount.
        """
        plain = raw.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in raw else raw
        self._num_strings += plain.count(b'"') // 2
        if self._num_strings > self._bounds.strings:
            return f"{self._num_strings} strings"
        found = _count(b"".join(plain.split(b'"')[::2]))
        self._counts = [total + new for total, new in zip(self._counts, found, strict=True)]
        return _over(self._counts, self._bounds)


def _count(raw: bytes) -> list[int]:
    """How many marks of each kind: a mark begins a list or object, follows a key, or stands between values."""
    return [raw.count(b"[") + raw.count(b"{"), raw.count(b":"), raw.count(b",")]


def _over(counts: list[int], bounds: JsonBounds) -> str | None:
    limits = (bounds.containers, bounds.keys, bounds.values)
    for count, limit, what in zip(counts, limits, ("lists and objects", "keys", "values"), strict=True):
        if count > limit:
            return f"{count} {what}"
    return None
