"""What the front notes of an engine while it works, for `/metrics` and for a page that shows it: histograms over its
life, and what it did lately. Owns what is taken from statuses, updates and samples; the core does nothing for it.

Lives on the engine's loop.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from typing import NamedTuple

import msgspec

from headrace.engine.latencies import Latencies
from headrace.engine.sample import Sample
from headrace.engine.stream import Stream
from headrace.telemetry import (
    MAX_SAMPLES,
    Excerpt,
    History,
    HistoryPart,
    HistoryPoint,
    Rewards,
    SampleNote,
    UpdateNote,
)
from headrace.types.messages import CoreStatus
from headrace.types.request import Request
from headrace.types.weights import UpdateReport

POINT_SECONDS = 0.9
"""The front looks at the core each second anyway (`engine/client.py`), and more often while it is changed."""
NUM_PROMPT_IDS, NUM_HEAD_IDS, NUM_TAIL_IDS = 64, 96, 96
MAX_IDS = NUM_PROMPT_IDS + NUM_HEAD_IDS + NUM_TAIL_IDS
"""That are kept of one sample."""
MAX_HELD_VALUES = 1 << 13
"""Ids and log-probabilities of a sample that is held whole."""
_COUNTED = tuple(
    name
    for name in HistoryPoint.__struct_fields__[HistoryPoint.__struct_fields__.index("num_prompt_tokens") :]
    if name not in ("num_rewards", "reward_total")
)


class _Ended(NamedTuple):
    """A sequence that has ended, as far as it is needed: nothing that reads its stream is held. `number` is its place
    among the samples of its prompt; `at` is in seconds since the epoch, the other times are the stream's."""

    request: Request
    sample: Sample
    number: int
    finish: str
    queued_at: float
    ended_at: float
    at: float


class Lookback:
    """Of one engine, whichever core it has."""

    def __init__(self, page_size: int = 1) -> None:
        self.latencies = Latencies()
        self._history = History()
        self._ended: deque[_Ended] = deque(maxlen=MAX_SAMPLES)
        self._page_size = page_size
        self._due = 0.0
        self._seen: tuple[str, str] | None = None

    def note_status(self, status: CoreStatus) -> None:
        """The core's account of itself, as the front has it. Of many in one second those that say something else of
        state or version are kept, and one."""
        now = time.monotonic()
        seen = "paused" if status.paused and status.state == "ready" else status.state, status.version
        if now < self._due and seen == self._seen:
            return
        self._due, self._seen = now + POINT_SECONDS, seen
        self._history.note_point(self._point(status, *seen))

    def note_update(self, report: UpdateReport, road: str, seconds: float) -> None:
        """New weights are live, `seconds` after the update was begun; they came by `road`."""
        self.latencies.note_pause(report.pause_ms / 1e3)
        facts = msgspec.structs.asdict(report)
        self._history.note_update(UpdateNote(time=time.time(), seconds=seconds, road=road, **facts))

    def note_end(self, stream: Stream) -> None:
        """A sequence has ended. A small one is kept as it is until somebody looks: most are gone before."""
        sample, queued_at, ended_at = stream.sample, stream.queued_at, stream.ended_at
        self.latencies.note_end(queued_at, sample.times, ended_at, len(sample.token_ids))
        index, finish = stream.item.index, stream.finish_type
        self._ended.append(_Ended(stream.request, sample, index, finish, queued_at, ended_at, time.time()))
        num_values = 2 * len(sample.token_ids) + sample.num_extra_values + sample.num_prompt_tokens
        if num_values > MAX_HELD_VALUES:
            self._settle()

    def note_rewards(self, rewards: Rewards) -> int:
        """Rewards of samples, checked. Returns how many of them are still remembered."""
        self._settle()
        return self._history.note_rewards(rewards)

    def since(self, number: int) -> HistoryPart:
        """What was noted after `number`."""
        self._settle()
        return self._history.since(number)

    def _settle(self) -> None:
        while self._ended:
            self._history.note_sample(_noted(self._ended.popleft()))

    def _point(self, status: CoreStatus, state: str, version: str) -> HistoryPoint:
        counts, page_size = status.metrics, self._page_size
        return HistoryPoint(
            time=time.time(),
            state=state,
            version=version,
            num_running=status.num_running,
            num_waiting=status.num_waiting,
            num_used_tokens=status.num_used_tokens,
            max_total_num_tokens=status.max_total_num_tokens,
            num_free_tokens=page_size * int(counts.get("num_free_pages", 0.0)),
            num_evictable_tokens=page_size * int(counts.get("num_cached_pages", 0.0)),
            num_published_tokens=page_size * int(counts.get("num_published_pages", 0.0)),
            num_prefix_nodes=int(counts.get("num_prefix_nodes", 0.0)),
            num_rewards=self._history.num_rewards,
            reward_total=self._history.reward_total,
            **{name: counts.get(name, 0.0) for name in _COUNTED},
        )


def _noted(ended: _Ended) -> SampleNote:
    """What is told of a sequence."""
    sample = ended.sample
    num_tokens, first_token = len(sample.token_ids), sample.times[1] if sample.times else 0.0
    return SampleNote(
        time=ended.at,
        request_id=ended.request.request_id,
        index=ended.number,
        finish=ended.finish,
        seconds=ended.ended_at - ended.queued_at,
        first_token_s=first_token - ended.queued_at if first_token else 0.0,
        num_prompt_tokens=sample.num_prompt_tokens,
        num_cached_tokens=sample.num_cached_tokens,
        num_tokens=num_tokens,
        mean_logprob=sum(sample.logprobs) / num_tokens if num_tokens else None,
        versions=tuple((version, count) for version, count, _ in sample.spans),
        excerpt=_excerpt(ended.request.prompt, sample.token_ids),
    )


def _excerpt(prompt: bytes, ids: array[int]) -> Excerpt:
    """What there is to be shown of a sample, copied, so that nothing keeps the rest."""
    num_head = min(len(ids), NUM_HEAD_IDS)
    tail = ids[max(num_head, len(ids) - NUM_TAIL_IDS) :]
    return Excerpt(prompt[-4 * NUM_PROMPT_IDS :], ids[:num_head].tobytes(), tail.tobytes())
