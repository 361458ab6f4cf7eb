"""What is known about one sequence so far. Owns its ids, log-probabilities, spans and extras; knows nothing of text,
links or event loops.
"""

from __future__ import annotations

import itertools
import math
import operator
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from headrace.types.generation import Generation, RoutedExperts
from headrace.types.request import Delta, Int32Array, Request, RoutedPart, TokenExtras, unpack_floats, unpack_ids

Span = tuple[str, int, int]
"""(version, number of tokens, weight epoch): one label given to two updates makes two spans."""
_LABEL, _EPOCH = operator.itemgetter(0, 1), operator.itemgetter(2)
_NO_EXTRAS = TokenExtras()
_TOP_VALUES, _ASKED_VALUES, _KEPT_COUNTS, _KEPT_IDS = map(
    TokenExtras.__struct_fields__.index, ("top_logprobs", "asked_logprobs", "kept_counts", "kept_ids")
)


class Sample:
    """The tokens of one sequence, appended delta by delta and aligned at all times.

    len(token_ids) == len(logprobs) == the sum of `spans`; what else was asked of each token is as long. In here are no
    lists: the garbage collector would have to walk through those of 65,536 sequences.
    """

    def __init__(self, request: Request) -> None:
        self.token_ids = array("i")
        self.logprobs = array("f")
        self._closed_spans: tuple[Span, ...] = ()
        self._version, self._num_of_version, self._epoch = "", 0, 0  # the span that the next token goes on with
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.num_prompt_tokens = len(request.prompt) // 4
        self.times: tuple[float, ...] = ()
        """As in `Delta`."""
        self._options = request.logprobs
        self._has_extras = request.logprobs.wants_output_extras
        self._extras = tuple(map(bytearray, msgspec.structs.astuple(_NO_EXTRAS)))  # made into dictionaries if asked for
        self._prompt_logprobs = b""
        self._prompt_extras = _NO_EXTRAS
        self._prompt_spans: tuple[tuple[str, int], ...] = ()
        self._routed: tuple[RoutedPart, ...] = ()

    def append(self, delta: Delta) -> int:
        """Add what `delta` brings; returns the number of new tokens."""
        self.token_ids.frombytes(delta.token_ids)
        self.logprobs.frombytes(delta.logprobs)
        for position, (version, count) in enumerate(delta.spans):  # a `zip` that is strict costs more than the rest
            epoch = delta.span_epochs[position]
            if epoch == self._epoch and version == self._version:
                self._num_of_version += count
            elif count:
                self._closed_spans = self.spans
                self._version, self._num_of_version, self._epoch = version, count, epoch
        if self._has_extras:
            for values, name in zip(self._extras, TokenExtras.__struct_fields__, strict=True):
                values += getattr(delta.extras, name)
        if delta.prompt_logprobs:
            self._prompt_logprobs, self._prompt_extras = delta.prompt_logprobs, delta.prompt_extras
        if delta.prompt_spans:
            self._prompt_spans = delta.prompt_spans
        if delta.routed.experts or (delta.routed.num_layers and not self._routed):
            self._routed += (delta.routed,)
        if delta.times:
            self.times = delta.times
        if delta.num_cached_tokens > self.num_cached_tokens:
            self.num_cached_tokens = delta.num_cached_tokens
        if delta.num_preemptions > self.num_preemptions:
            self.num_preemptions = delta.num_preemptions
        return len(delta.token_ids) // 4

    @property
    def spans(self) -> tuple[Span, ...]:
        """Those of all tokens."""
        last = ((self._version, self._num_of_version, self._epoch),) if self._num_of_version else ()
        return self._closed_spans + last

    def spans_from(self, start: int) -> tuple[list[tuple[str, int]], list[int]]:
        """`version_spans` and `version_epochs` of the tokens from `start` on, as in `Generation`."""
        num_tokens = len(self.token_ids)
        if 0 < num_tokens - start <= self._num_of_version:  # nearly always, of a piece
            return [(self._version, num_tokens - start)], [self._epoch]
        spans = slice_spans(self.spans, start, num_tokens)
        return list(map(_LABEL, spans)), list(map(_EPOCH, spans))

    @property
    def num_extra_values(self) -> int:
        """Log-probabilities beside those of the generated tokens, kept ids, and experts."""
        extras = self._prompt_extras
        of_prompt = len(self._prompt_logprobs) + len(extras.top_logprobs) + len(extras.asked_logprobs)
        of_output = sum(len(self._extras[column]) for column in (_TOP_VALUES, _ASKED_VALUES, _KEPT_IDS))
        return (of_prompt + of_output) // 4 + sum(len(part.experts) for part in self._routed) // 2

    def truncate(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` generated tokens only."""
        self._extras = tuple(map(bytearray, msgspec.structs.astuple(self._extras_between(0, num_tokens))))
        del self.token_ids[num_tokens:], self.logprobs[num_tokens:]
        *closed, last = slice_spans(self.spans, 0, num_tokens) or (("", 0, 0),)
        self._closed_spans, (self._version, self._num_of_version, self._epoch) = tuple(closed), last

    def more_from(self, start: int) -> dict[str, Any]:
        """The `Generation` fields of what else was asked of the tokens from `start` on; those of the prompt come with
        the first tokens."""
        fields: dict[str, Any] = {}
        if self._options.num_top:
            extras = self._extras_between(start, len(self.token_ids))
            fields["top_logprobs"] = _tops(extras, len(self.token_ids) - start)
        if self._options.token_ids:
            extras = self._extras_between(start, len(self.token_ids))
            fields["token_ids_logprobs"] = _asked(extras, self._options.token_ids)
        if self._options.max_kept:
            extras = self._extras_between(start, len(self.token_ids))
            fields["kept_token_ids"] = _rows_of(unpack_ids(extras.kept_ids), unpack_ids(extras.kept_counts))
        if start == 0 and (self._prompt_spans or self._prompt_logprobs):
            fields |= self.prompt_fields()
        return fields

    def routed_experts(self) -> RoutedExperts | None:
        """Those of all tokens but the last, once the sequence has ended; None if they were not asked for or not all are
        known."""
        start = self._options.routed_start
        if start is None or not self._routed:
            return None
        num_layers, num_per_token = self._routed[0].num_layers, self._routed[0].num_per_token
        num_positions = max(0, self.num_prompt_tokens + len(self.token_ids) - 1 - start)
        size, experts = 2 * num_layers * num_per_token * num_positions, b"".join(part.experts for part in self._routed)
        return RoutedExperts(start, num_layers, num_per_token, experts[:size]) if size <= len(experts) else None

    def prompt_fields(self) -> dict[str, Any]:
        """The `Generation` fields of the prompt's scores: one entry per prompt token, None where there is none."""
        fields: dict[str, Any] = {"prompt_version_spans": list(self._prompt_spans)} if self._prompt_spans else {}
        if not self._prompt_logprobs:
            return fields
        values: list[float] = unpack_floats(self._prompt_logprobs).tolist()
        scores = [None if math.isnan(value) else value for value in values]
        padding: list[None] = [None] * (self._options.prompt_start or 0)
        fields["prompt_logprobs"] = padding + scores
        if self._options.num_top:
            top = _tops(self._prompt_extras, len(scores))
            fields["prompt_top_logprobs"] = padding + _where_scored(top, scores)
        if self._options.token_ids:
            asked = _asked(self._prompt_extras, self._options.token_ids)
            fields["prompt_token_ids_logprobs"] = padding + _where_scored(asked, scores)
        return fields

    def _extras_between(self, start: int, stop: int) -> TokenExtras:
        """Those of tokens start..stop-1: rows of as many bytes each, but for the kept ids."""
        num_tokens = len(self.token_ids) or 1
        *even, kept_ids = self._extras
        widths = [len(values) // num_tokens for values in even]
        cut = [values[start * width : stop * width] for values, width in zip(even, widths, strict=True)]
        if kept_ids:
            counts = np.frombuffer(bytes(even[_KEPT_COUNTS]), "<i4")
            first = 4 * int(counts[:start].sum())
            kept_ids = kept_ids[first : first + 4 * int(counts[start:stop].sum())]
        return TokenExtras(*map(bytes, (*cut, kept_ids)))


def slice_spans(spans: Sequence[Span], start: int, stop: int) -> tuple[Span, ...]:
    """The spans of tokens start..stop-1."""
    kept: list[Span] = []
    position = 0
    for version, count, epoch in spans:
        num_inside = min(position + count, stop) - max(position, start)
        if num_inside > 0:
            kept.append((version, num_inside, epoch))
        position += count
    return tuple(kept)


def spans_of(piece: Generation) -> list[Span]:
    """The spans of what a caller was given."""
    pairs = zip(piece.version_spans, piece.version_epochs, strict=True)
    return [(version, count, epoch) for (version, count), epoch in pairs]


def extend_spans(spans: list[tuple[str, int]], epochs: list[int], piece: Generation) -> None:
    """Add those of the next piece of the same sample, in place: a stream does it for every token."""
    if not spans:
        spans += piece.version_spans
        epochs += piece.version_epochs
        return
    for position, span in enumerate(piece.version_spans):
        epoch = piece.version_epochs[position]
        if epochs[-1] == epoch and spans[-1][0] == span[0]:
            spans[-1] = span[0], spans[-1][1] + span[1]
        else:
            spans.append(span)
            epochs.append(epoch)


def span_fields(spans: Iterable[Span]) -> dict[str, list[Any]]:
    """The `Generation` fields that say these."""
    spans = tuple(spans)
    return {"version_spans": list(map(_LABEL, spans)), "version_epochs": list(map(_EPOCH, spans))}


def _where_scored(values: list[dict[int, float]], scores: list[float | None]) -> list[dict[int, float] | None]:
    return [None if score is None else value for value, score in zip(values, scores, strict=True)]


def _tops(extras: TokenExtras, num_positions: int) -> list[dict[int, float]]:
    """{id: logprob} of the most probable ids of each position; [] if none were asked."""
    ids: list[int] = unpack_ids(extras.top_ids).tolist()
    return _by_position(ids, extras.top_logprobs, len(ids) // max(1, num_positions))


def _rows_of(ids: Int32Array, counts: Int32Array) -> list[list[int]]:
    """Ids, position after position, as a list for each."""
    rest: Iterator[int] = iter(ids.tolist())
    return [list(itertools.islice(rest, count)) for count in counts.tolist()]


def _asked(extras: TokenExtras, asked: tuple[int, ...]) -> list[dict[int, float]]:
    """{id: logprob} of the ids asked for at each position; [] if none were."""
    return _by_position(itertools.cycle(asked), extras.asked_logprobs, len(asked))


def _by_position(ids: Iterable[int], logprobs: bytes, width: int) -> list[dict[int, float]]:
    """One dictionary for each `width` pairs."""
    if not width:
        return []
    values: list[float] = unpack_floats(logprobs).tolist()
    pairs = zip(ids, values, strict=False)  # `ids` may have no end
    return [dict(itertools.islice(pairs, width)) for _ in range(0, len(values), width)]
