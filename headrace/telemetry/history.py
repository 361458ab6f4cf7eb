"""What an engine, or all behind a router, did lately, for whoever looks at it later. Owns what is kept, and how much.

Whatever is noted gets the next number, so that somebody who looks again asks for what is newer than he has seen. Lives
on one event loop; does no I/O and decodes nothing.
"""

from __future__ import annotations

import math
import uuid
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

MAX_POINTS = 1024
MAX_UPDATES = 256
MAX_SAMPLES = 64

Rewards = Mapping[str, float | Sequence[float | None]]
"""By request id: a number for the samples of that name, or one for each by its index, None for those without."""


class HistoryPoint(msgspec.Struct, frozen=True, gc=False):
    """One moment. What grows is counted from the start, so that points may be left out: rates are differences.

    time                  seconds since the epoch
    num_free_tokens       of the KV pool: in pages that nobody references
    num_evictable_tokens  in pages of the prefix cache alone; the rest is in use
    num_published_tokens  in pages that can be found as prefixes, in use or not, in `num_prefix_nodes` of the tree
    """

    time: float
    state: str = ""
    version: str = ""
    num_running: int = 0
    num_waiting: int = 0
    num_used_tokens: int = 0
    max_total_num_tokens: int = 0
    num_free_tokens: int = 0
    num_evictable_tokens: int = 0
    num_published_tokens: int = 0
    num_prefix_nodes: int = 0
    num_prompt_tokens: float = 0.0
    num_cached_tokens: float = 0.0
    num_generated_tokens: float = 0.0
    num_evicted_pages: float = 0.0
    num_shared_prefills: float = 0.0
    num_finished: float = 0.0
    num_aborted: float = 0.0
    num_failed: float = 0.0
    num_rewards: float = 0.0
    reward_total: float = 0.0


POINT_FIELDS = HistoryPoint.__struct_fields__
_COUNTERS = POINT_FIELDS[POINT_FIELDS.index("num_running") :]


class UpdateNote(msgspec.Struct, kw_only=True):
    """A weight update that became live at `time` (seconds since the epoch), `seconds` after it was begun; `pause_ms` is
    how long no step could run."""

    number: int = 0
    time: float
    seconds: float
    version: str
    epoch: int
    num_tensors: int
    num_bytes: int
    mode: str
    road: str
    pause_ms: float
    num_aborted: int = 0
    replica: str = ""


class Excerpt(msgspec.Struct, frozen=True, gc=False):
    """Ids (int32) that are shown of a sample: the last of its prompt, its first ones, and its last ones."""

    prompt: bytes
    head: bytes
    tail: bytes


class SampleNote(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A sample that has ended.

    time       when, in seconds since the epoch; it had taken `seconds`, and its first token `first_token_s`
    versions   (version, number of tokens) in a row
    excerpt    what is to be shown and is not text yet; else `prompt` and `output` are it
    """

    number: int = 0
    time: float
    request_id: str
    index: int
    finish: str
    seconds: float
    num_prompt_tokens: int
    num_tokens: int
    first_token_s: float = 0.0
    num_cached_tokens: int = 0
    mean_logprob: float | None = None
    versions: tuple[tuple[str, int], ...] = ()
    reward: float | None = None
    prompt: str = ""
    output: str = ""
    replica: str = ""
    excerpt: Excerpt | None = None


class HistoryPart(msgspec.Struct, frozen=True):
    """What was noted after some number. `source` names the history, `last` its newest number; `points` are columns by
    the fields of `HistoryPoint`, all of one length, the oldest first."""

    source: str
    last: int
    points: dict[str, list[Any]]
    updates: list[UpdateNote]
    samples: list[SampleNote]


class History:
    """Rings of points, updates and samples. When the points are full, every second one of them is left out: they reach
    back to the start, the coarser the older."""

    def __init__(self) -> None:
        self.source = uuid.uuid4().hex
        self._last = 0
        self._points: list[tuple[int, HistoryPoint]] = []
        self._updates: deque[UpdateNote] = deque(maxlen=MAX_UPDATES)
        self._samples: OrderedDict[tuple[str, str, int], SampleNote] = OrderedDict()
        self.num_rewards = 0
        self.reward_total = 0.0

    @property
    def last_point(self) -> HistoryPoint | None:
        return self._points[-1][1] if self._points else None

    def note_point(self, point: HistoryPoint) -> None:
        """This is how things are."""
        if len(self._points) >= MAX_POINTS:
            del self._points[1::2]
        self._points.append((self._next(), point))

    def note_update(self, note: UpdateNote) -> None:
        """New weights are live."""
        note.number = self._next()
        self._updates.append(note)

    def note_sample(self, note: SampleNote) -> None:
        """A sample has ended; or more is known of one that is still there."""
        note.number = self._next()
        self._samples[note.replica, note.request_id, note.index] = note
        if len(self._samples) > MAX_SAMPLES:
            self._samples.popitem(last=False)

    def note_rewards(self, rewards: Rewards) -> int:
        """Rewards of samples. All of them count in the sum; returns how many were of samples that are still here."""
        named: dict[str, dict[int, SampleNote]] = {}
        for note in self._samples.values():
            named.setdefault(note.request_id, {})[note.index] = note
        return sum(self._give(given, named.get(request_id, {})) for request_id, given in rewards.items())

    def since(self, number: int) -> HistoryPart:
        """What is newer than `number`; all there is for 0, and for a number of another history."""
        number = number if number <= self._last else 0
        points = [point for numbered, point in self._points if numbered > number]
        return HistoryPart(
            self.source,
            self._last,
            {name: [getattr(point, name) for point in points] for name in POINT_FIELDS},
            [note for note in self._updates if note.number > number],
            [note for note in self._samples.values() if note.number > number],
        )

    def _give(self, given: float | Sequence[float | None], samples: Mapping[int, SampleNote]) -> int:
        """Rewards of the samples of one name, by their index."""
        rewards = dict.fromkeys(samples or (0,), given) if isinstance(given, (int, float)) else dict(enumerate(given))
        for index, reward in rewards.items():
            if reward is None:
                continue
            self.num_rewards += 1
            self.reward_total += reward
            if index in samples:
                samples[index].reward, samples[index].number = float(reward), self._next()
        return sum(reward is not None and index in samples for index, reward in rewards.items())

    def _next(self) -> int:
        self._last += 1
        return self._last


def sum_of(points: Iterable[HistoryPoint], time: float) -> HistoryPoint:
    """Several engines as one: counts are summed, states and versions joined where they differ."""
    each = list(points)
    counts = {name: math.fsum(getattr(point, name) for point in each) for name in _COUNTERS}
    named = {name: ", ".join(sorted({getattr(point, name) for point in each})) for name in ("state", "version")}
    return msgspec.convert({"time": time, **named, **counts}, HistoryPoint, strict=False)
