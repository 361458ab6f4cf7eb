"""One request's life in the scheduler. Owns what outlives a slot: state, saved tokens, versions, what was delivered.

While a sequence holds a slot its tokens, log-probabilities and counters live in the running table, which saves them
here when it leaves.
"""

from __future__ import annotations

from enum import Enum

import msgspec
import numpy as np

from headrace.scheduler.limits import SchedulerLimits, max_output
from headrace.scheduler.position_extras import PositionExtras
from headrace.scheduler.prompt_scores import PromptScores
from headrace.scheduler.routed_positions import RoutedPositions
from headrace.types.request import Float32Array, Int32Array, Request

LEAST_AT_ONCE = 8
"""Sequences that may take so large a part of the pool are let in as if nobody knew when they end: room that is kept for
so few to their ends costs more than to preempt one, and who asks for that much seldom waits for it."""

_NO_LOGPROBS: Float32Array = np.empty(0, dtype=np.float32)


class State(Enum):
    """WAITING never held a slot. PREEMPTED will enter one again (once it has left the old one). ENDED was answered."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    ENDED = "ended"


class Sequence(msgspec.Struct, eq=False, kw_only=True):
    """A request and what has become of it."""

    request: Request
    handle: int
    arrived: float
    started: float = 0.0  # when it first entered a slot, and when its first token came: in the scheduler's clock
    first_token: float = 0.0
    num_prompt: int
    max_length: int  # tokens it may have in all, prompt included
    compute_length: int  # positions it may compute: the last token's KV is of no use; a score-only prompt needs one
    stop_token_ids: tuple[int, ...]  # those that can be sampled at all
    has_known_end: bool  # nothing that it samples ends it before its last token, and it is no large part of the pool
    token_ids: Int32Array  # all known tokens, and the output's log-probabilities, while it holds no slot
    logprobs: Float32Array = _NO_LOGPROBS
    units: bytes  # what the prefix cache knows `token_ids` by: for text, the very same
    extras: PositionExtras | None  # what else it asked of its output tokens, if it did
    prompt_scores: PromptScores | None
    routed: RoutedPositions | None = None  # the experts of its tokens, if it asked for them
    state: State = State.WAITING
    rank: int = 0  # since it was first admitted; smaller is served first (priority, then admission)
    slot: int = -1  # -1: none; an ended sequence holds one until its last step in flight retires
    num_delivered: int = 0  # output tokens that have gone out in deltas
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_loaded_pages: int = 0  # of its prefix, those the host's memory made known while it waited
    kept_by_host: list[bytes] = []  # while it is preempted: digests of its pages
    is_prompt_delivered: bool = False
    version_index: int = -1  # of its last token, -1 before the first
    version_starts: list[tuple[int, str, int]] = []  # (first output token of a version, the version, its epoch)
    prompt_spans: list[tuple[str, int]] = []  # (version, count) of the prompt positions scored so far

    @classmethod
    def of(cls, request: Request, prompt: Int32Array, limits: SchedulerLimits, arrived: float) -> Sequence:
        """One that has just come; `prompt` is the request's, as ids."""
        num_prompt, options, start = len(prompt), request.logprobs, request.logprobs.prompt_start
        max_length = num_prompt + max_output(request, num_prompt, limits)
        stop_token_ids = tuple(filter(range(limits.vocab_size).__contains__, request.stop_token_ids))
        return cls(
            request=request,
            handle=request.handle,
            arrived=arrived,
            num_prompt=num_prompt,
            max_length=max_length,
            compute_length=max(1, max_length - 1),
            stop_token_ids=stop_token_ids,
            has_known_end=not stop_token_ids and LEAST_AT_ONCE * max_length <= limits.max_total_num_tokens,
            token_ids=prompt,
            units=request.prompt,
            extras=PositionExtras(options, keeps=options.max_kept > 0) if options.wants_output_extras else None,
            routed=None if options.routed_start is None else RoutedPositions(options.routed_start),
            prompt_scores=None if start is None or start >= num_prompt else PromptScores(start, num_prompt, options),
        )

    @property
    def max_hit(self) -> int:
        """Most tokens a prefix hit may cover on entering a slot: the last known token is always computed, and so is
        the one before the first prompt position still to be scored."""
        limit = min(len(self.token_ids), self.compute_length) - 1
        if self.prompt_scores is not None and not self.prompt_scores.is_complete:
            limit = min(limit, self.prompt_scores.next_position - 1)
        return limit

    def spans(self, first: int, last: int) -> tuple[tuple[tuple[str, int], ...], tuple[int, ...]]:
        """(version, count) of output tokens first..last-1, in order, and the epoch of each of these spans."""
        starts = self.version_starts
        if len(starts) == 1 and last > first:  # nearly always, and asked for each token of a stream
            return ((starts[0][1], last - first),), (starts[0][2],)
        found, epochs = [], []
        for index, (start, version, epoch) in enumerate(starts):
            end = starts[index + 1][0] if index + 1 < len(starts) else last
            count = min(end, last) - max(start, first)
            if count > 0:
                found.append((version, count))
                epochs.append(epoch)
        return tuple(found), tuple(epochs)

    def mark_prompt(self, end: int, version: str) -> None:
        """Prompt positions before `end` that had no version yet were scored by weights of this one."""
        count = end - sum(count for _, count in self.prompt_spans)
        if count <= 0:
            return
        if self.prompt_spans and self.prompt_spans[-1][0] == version:
            count += self.prompt_spans.pop()[1]
        self.prompt_spans.append((version, count))

    def start_again(self) -> None:
        """Forget what was learnt of the prompt: a sequence without output meets other weights as if it came now."""
        self.num_cached_tokens = 0
        self.prompt_spans.clear()
        if self.prompt_scores is not None:
            self.prompt_scores.reset()
