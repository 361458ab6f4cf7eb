"""What is known about one sequence so far. Owns its ids, log-probabilities, spans and extras; knows nothing of text,
links or event loops.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from headrace.types.request import Delta, Request, TokenExtras, unpack_floats, unpack_ids

Span = tuple[str, int, int]
"""(version, number of tokens, weight epoch): one label given to two updates makes two spans."""


class Sample:
    """The tokens of one sequence, appended delta by delta and aligned at all times.

    len(token_ids) == len(logprobs) == the sum of `spans`; what else was asked of each token is as long.
    """

    def __init__(self, request: Request) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.spans: list[Span] = []
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.num_prompt_tokens = len(request.prompt) // 4
        self._options = request.logprobs
        self._extras = [bytearray() for _ in TokenExtras.__struct_fields__]  # made into dictionaries when asked for
        self._prompt_logprobs: list[float | None] = []
        self._prompt_extras = TokenExtras()
        self._prompt_spans: list[tuple[str, int]] = []

    def append(self, delta: Delta) -> int:
        """Add what `delta` brings; returns the number of new tokens."""
        new_ids: list[int] = unpack_ids(delta.token_ids).tolist()
        self.token_ids += new_ids
        self.logprobs += unpack_floats(delta.logprobs).tolist()
        for (version, count), epoch in zip(delta.spans, delta.span_epochs, strict=True):
            extend_spans(self.spans, version, count, epoch)
        for values, name in zip(self._extras, TokenExtras.__struct_fields__, strict=True):
            values += getattr(delta.extras, name)
        if delta.prompt_logprobs:
            self._add_prompt(delta)
        if delta.prompt_spans:
            self._prompt_spans = list(delta.prompt_spans)
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        self.num_preemptions = max(self.num_preemptions, delta.num_preemptions)
        return len(new_ids)

    @property
    def num_extra_values(self) -> int:
        """Log-probabilities beside those of the generated tokens."""
        of_prompt = len(self._prompt_extras.top_logprobs) + len(self._prompt_extras.asked_logprobs)
        return len(self._prompt_logprobs) + (of_prompt + len(self._extras[1]) + len(self._extras[2])) // 4

    def truncate(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` generated tokens only."""
        self._extras = [bytearray(values) for values in msgspec.structs.astuple(self._extras_between(0, num_tokens))]
        del self.token_ids[num_tokens:], self.logprobs[num_tokens:]
        self.spans = slice_spans(self.spans, 0, num_tokens)

    def fields_from(self, start: int) -> dict[str, Any]:
        """The `Generation` fields of the tokens from `start` on; those of the prompt come with the first tokens."""
        spans = slice_spans(self.spans, start, len(self.token_ids)) if start else self.spans
        fields: dict[str, Any] = {
            "token_ids": self.token_ids[start:] if start else self.token_ids[:],
            "logprobs": self.logprobs[start:] if start else self.logprobs[:],
            "version_spans": [(version, count) for version, count, _ in spans],
            "version_epochs": [epoch for _, _, epoch in spans],
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_cached_tokens": self.num_cached_tokens,
            "num_preemptions": self.num_preemptions,
        }
        if self._options.num_top:
            extras = self._extras_between(start, len(self.token_ids))
            fields["top_logprobs"] = _tops(extras, len(self.token_ids) - start)
        if self._options.token_ids:
            extras = self._extras_between(start, len(self.token_ids))
            fields["token_ids_logprobs"] = _asked(extras, self._options.token_ids)
        return fields

    def prompt_fields(self) -> dict[str, Any]:
        """The `Generation` fields of the prompt's scores: one entry per prompt token, None where there is none."""
        fields: dict[str, Any] = {"prompt_version_spans": self._prompt_spans[:]} if self._prompt_spans else {}
        if not self._prompt_logprobs:
            return fields
        padding: list[None] = [None] * (self._options.prompt_start or 0)
        fields["prompt_logprobs"] = padding + self._prompt_logprobs
        if self._options.num_top:
            top = _tops(self._prompt_extras, len(self._prompt_logprobs))
            fields["prompt_top_logprobs"] = padding + self._where_scored(top)
        if self._options.token_ids:
            asked = _asked(self._prompt_extras, self._options.token_ids)
            fields["prompt_token_ids_logprobs"] = padding + self._where_scored(asked)
        return fields

    def _extras_between(self, start: int, stop: int) -> TokenExtras:
        """Those of tokens start..stop-1: rows of 4 bytes each."""
        num_tokens = len(self.token_ids) or 1
        widths = [len(values) // num_tokens for values in self._extras]
        cut = [values[start * width : stop * width] for values, width in zip(self._extras, widths, strict=True)]
        return TokenExtras(*map(bytes, cut))

    def _where_scored(self, values: list[dict[int, float]]) -> list[dict[int, float] | None]:
        pairs = zip(values, self._prompt_logprobs, strict=True)
        return [None if logprob is None else value for value, logprob in pairs]

    def _add_prompt(self, delta: Delta) -> None:
        values: list[float] = unpack_floats(delta.prompt_logprobs).tolist()
        self._prompt_logprobs += [None if math.isnan(value) else value for value in values]
        self._prompt_extras = delta.prompt_extras


def slice_spans(spans: list[Span], start: int, stop: int) -> list[Span]:
    """The spans of tokens start..stop-1."""
    kept: list[Span] = []
    position = 0
    for version, count, epoch in spans:
        overlap = min(position + count, stop) - max(position, start)
        if overlap > 0:
            kept.append((version, overlap, epoch))
        position += count
    return kept


def extend_spans(spans: list[Span], version: str, count: int, epoch: int) -> None:
    """Add tokens to the last span, or a span, where label or weights are others."""
    if spans and (spans[-1][0], spans[-1][2]) == (version, epoch):
        spans[-1] = (version, spans[-1][1] + count, epoch)
    elif count:
        spans.append((version, count, epoch))


def _tops(extras: TokenExtras, num_positions: int) -> list[dict[int, float]]:
    """{id: logprob} of the most probable ids of each position; [] if none were asked."""
    if not extras.top_ids:
        return []
    shape = (num_positions, -1)
    ids, values = unpack_ids(extras.top_ids).reshape(shape), unpack_floats(extras.top_logprobs).reshape(shape)
    return [dict(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]


def _asked(extras: TokenExtras, asked: tuple[int, ...]) -> list[dict[int, float]]:
    """{id: logprob} of the ids asked for at each position; [] if none were."""
    if not asked:
        return []
    values = unpack_floats(extras.asked_logprobs).reshape(-1, len(asked)).tolist()
    return [dict(zip(asked, each, strict=True)) for each in values]
