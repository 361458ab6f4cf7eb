"""What the front notes of an engine while it works, for `/metrics` and for a page that shows it: histograms over its
life, and what it did lately. Owns what is taken from statuses, updates and samples; the core does nothing for it.

Lives on the engine's loop.
"""

from __future__ import annotations

import time
from array import array

import msgspec

from headrace.engine.latencies import Latencies
from headrace.engine.stream import Stream
from headrace.telemetry import Excerpt, History, HistoryPoint, Rewards, SampleNote, UpdateNote
from headrace.types.messages import CoreStatus
from headrace.types.weights import UpdateReport

POINT_SECONDS = 0.9
"""The front looks at the core each second anyway (`engine/client.py`), and more often while it is changed."""
NUM_PROMPT_IDS, NUM_HEAD_IDS, NUM_TAIL_IDS = 64, 96, 96
MAX_IDS = NUM_PROMPT_IDS + NUM_HEAD_IDS + NUM_TAIL_IDS
"""That are kept of one sample."""
_COUNTED = tuple(
    name
    for name in HistoryPoint.__struct_fields__[HistoryPoint.__struct_fields__.index("num_prompt_tokens") :]
    if name not in ("num_rewards", "reward_total")
)


class Lookback:
    """Of one engine, whichever core it has."""

    def __init__(self, page_size: int = 1) -> None:
        self.latencies = Latencies()
        self.history = History()
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
        self.history.note_point(self._point(status, *seen))

    def note_update(self, report: UpdateReport, road: str, seconds: float) -> None:
        """New weights are live, `seconds` after the update was begun; they came by `road`."""
        self.latencies.note_pause(report.pause_ms / 1e3)
        facts = msgspec.structs.asdict(report)
        self.history.note_update(UpdateNote(time=time.time(), seconds=seconds, road=road, **facts))

    def note_end(self, stream: Stream) -> None:
        """A sequence has ended."""
        sample = stream.sample
        queued, ended, num_tokens = stream.queued_at, stream.ended_at, len(sample.token_ids)
        self.latencies.note_end(queued, sample.times, ended, num_tokens)
        first_token = sample.times[1] if sample.times else 0.0
        self.history.note_sample(
            SampleNote(
                time=time.time(),
                request_id=stream.request.request_id,
                index=stream.item.index,
                finish=stream.finish_type,
                seconds=ended - queued,
                first_token_s=first_token - queued if first_token else 0.0,
                num_prompt_tokens=sample.num_prompt_tokens,
                num_cached_tokens=sample.num_cached_tokens,
                num_tokens=num_tokens,
                mean_logprob=sum(sample.logprobs) / num_tokens if num_tokens else None,
                versions=tuple((version, count) for version, count, _ in sample.spans),
                excerpt=_excerpt(stream.request.prompt, sample.token_ids),
            )
        )

    def note_rewards(self, rewards: Rewards) -> int:
        """Rewards of samples, checked. Returns how many of them are still remembered."""
        return self.history.note_rewards(rewards)

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
            num_rewards=self.history.num_rewards,
            reward_total=self.history.reward_total,
            **{name: counts.get(name, 0.0) for name in _COUNTED},
        )


def _excerpt(prompt: bytes, ids: array[int]) -> Excerpt:
    """What there is to be shown of a sample, copied, so that nothing keeps the rest."""
    num_head = min(len(ids), NUM_HEAD_IDS)
    tail = ids[max(num_head, len(ids) - NUM_TAIL_IDS) :]
    return Excerpt(prompt[-4 * NUM_PROMPT_IDS :], ids[:num_head].tobytes(), tail.tobytes())
