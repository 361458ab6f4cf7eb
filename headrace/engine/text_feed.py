"""The text of one sequence while its tokens arrive. Owns the detokenizer and the stop strings of that sequence."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from headrace.text import IncrementalDetokenizer, StopStrings, Tokenizer
from headrace.types.sampling_params import SamplingParams


class TextFeed:
    """Ids in, text out; says when a stop string is complete.

    Text of the first `min_new_tokens` tokens is not searched: a sequence may not end there.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        prompt_ids: Sequence[int] = (),
        shown: frozenset[str] = frozenset(),
    ) -> None:
        """`prompt_ids` stand before the sequence, `shown` are special tokens that show although others are skipped."""
        self._tokenizer = tokenizer
        self._params = params
        self._prompt_ids = prompt_ids
        self._shown = shown
        self._detokenizer = self._new_detokenizer()
        self._stops = StopStrings(params.stop, keep_match=params.no_stop_trim) if params.stop else None
        self._stop_tokens = _special_stops(tokenizer, params)
        self._pieces: list[str] = []
        self._num_taken = 0
        self._num_certain = 0  # tokens whose text has been released
        self._first_new = 1  # the first token, from 1, whose text may have come with what was released last

    @property
    def text(self) -> str:
        """All text shown so far."""
        return "".join(self._pieces)

    def push(self, token_id: int, num_tokens: int) -> str | None:
        """Add the sequence's token number `num_tokens` (from 1). Returns the stop string it completed, if any."""
        if token_id in self._stop_tokens and num_tokens >= self._params.min_new_tokens:
            return self.finish(num_tokens) or self._stop_tokens[token_id]
        text = self._detokenizer.push((token_id,))
        self._note_released(text, num_tokens)
        if self._stops is None or not text:
            self._show(text)
            return None
        if num_tokens < self._params.min_new_tokens:
            self._show(text)
            return None
        shown, matched = self._stops.push(text)
        self._show(shown)
        return matched

    def finish(self, num_tokens: int) -> str | None:
        """No more tokens come: show what was held back. Returns a stop string that is complete only now."""
        text = self._detokenizer.finish()
        self._note_released(text, num_tokens)
        if self._stops is None or num_tokens < self._params.min_new_tokens:
            self._show(text)
            return None
        shown, matched = self._stops.push(text)
        self._show(shown)
        if matched is None:
            self._show(self._stops.finish())
        return matched

    def take(self) -> str:
        """Text shown since the last call."""
        text = "".join(self._pieces[self._num_taken :])
        self._num_taken = len(self._pieces)
        return text

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of the sequence's first ids, without regard to stop strings."""
        detokenizer = self._new_detokenizer()
        return detokenizer.push(token_ids) + detokenizer.finish()

    def completing_length(self, token_ids: Sequence[int], matched: str) -> int:
        """The fewest of these ids whose text holds `matched`, which came with what was released last: with the last id,
        or with one before it whose text was not certain until then."""
        lengths = range(max(self._params.min_new_tokens, self._first_new), len(token_ids))
        if not lengths:
            return len(token_ids)
        searched = max(0, len(self.decode(token_ids[: self._first_new - 1])) - len(matched) + 1)

        def is_enough(length: int) -> bool:
            return matched in self.decode(token_ids[:length])[searched:]

        return lengths.start + bisect.bisect_left(lengths, True, key=is_enough)

    def _note_released(self, text: str, num_tokens: int) -> None:
        if text:
            self._first_new, self._num_certain = self._num_certain + 1, num_tokens

    def _new_detokenizer(self) -> IncrementalDetokenizer:
        return IncrementalDetokenizer(
            self._tokenizer,
            skip_special_tokens=self._params.skip_special_tokens,
            spaces_between_special_tokens=self._params.spaces_between_special_tokens,
            shown=self._shown,
            prompt_ids=self._prompt_ids,
        )

    def _show(self, text: str) -> None:
        if text:
            self._pieces.append(text)


def _special_stops(tokenizer: Tokenizer, params: SamplingParams) -> dict[int, str]:
    """Stop strings that are special tokens, by id: they end a sequence although their text is not shown."""
    found: dict[int, str] = {}
    for stop in params.stop if params.skip_special_tokens else ():
        ids = tokenizer.encode(stop, add_special_tokens=False)
        if len(ids) == 1 and not tokenizer.decode(ids, skip_special_tokens=True):
            found[ids[0]] = stop
    return found
