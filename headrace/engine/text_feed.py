"""The text of one sequence while its tokens arrive. Owns the detokenizer and the stop strings of that sequence."""

from __future__ import annotations

import bisect
import functools
import sys
from collections.abc import Iterable, Sequence

from headrace.text import IncrementalDetokenizer, StopSet, StopStrings, Tokenizer
from headrace.types.request import Int32Array
from headrace.types.sampling_params import SamplingParams


class TextStart:
    """Where the texts of a prompt's samples begin, and what these have in common. Made once for all of them.

    `resumed_ids` are output that the prompt ends with. Their text is not shown again, but a stop string may begin in
    it, and a character may: it belongs to the token that completes it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        resumed_ids: Sequence[int] = (),
        prompt_ids: Int32Array | None = None,
        shown: frozenset[str] = frozenset(),
        like: TextStart | None = None,
    ) -> None:
        """`prompt_ids` stand before `resumed_ids`, `shown` are special tokens that show although others are skipped.
        What depends on `params` alone is shared with `like`, made of the same ones."""
        self.params = params
        self.shown = shown
        self._tokenizer = tokenizer
        self._prompt_ids = prompt_ids
        self._is_resumed = len(resumed_ids) > 0
        before = self._detokenizer.push(resumed_ids) if self._is_resumed else ""
        self._num_shown_before = len(self._detokenizer.complete_rest()) if self._is_resumed else 0
        self.stop_set: StopSet = like.stop_set if like is not None else StopSet(params.stop)
        self._stops = _stops_after(before, self.stop_set, params) if params.stop else None
        self.stop_tokens: dict[int, str] = like.stop_tokens if like is not None else _special_stops(tokenizer, params)

    @functools.cached_property
    def _detokenizer(self) -> IncrementalDetokenizer:
        """Made when a text is wanted: until then it were three objects more for each of very many prompts."""
        return IncrementalDetokenizer.of(
            self._tokenizer,
            skip_special_tokens=self.params.skip_special_tokens,
            shown=self.shown,
            prompt_ids=() if self._prompt_ids is None else self._prompt_ids.data,  # a view, of which little is read
        )

    def feed(self) -> TextFeed:
        stops = self._stops.fork() if self._stops is not None else None
        return TextFeed(self, self._detokenizer.fork(), stops, self._num_shown_before)

    def whole_text(self, token_ids: Sequence[int]) -> str:
        """The text to show of a sample with these ids, whose stop strings nobody looks for."""
        detokenizer = self._detokenizer.fork()
        return (detokenizer.push(token_ids) + detokenizer.finish())[self._num_shown_before :]

    def complete_text(self, token_ids: Sequence[int]) -> str:
        """The characters that these ids complete, and those that were complete but not certain where they begin."""
        detokenizer = self._detokenizer.fork()
        return detokenizer.push(token_ids) + detokenizer.complete_rest()


class TextFeed:
    """Ids in, text out; says when a stop string is complete.

    A sequence may not end within its first `min_new_tokens` tokens: stop strings that are complete there are passed
    over, as those within the resumed part of a prompt are. One that only begins there counts.
    """

    def __init__(
        self, start: TextStart, detokenizer: IncrementalDetokenizer, stops: StopStrings | None, num_shown_before: int
    ) -> None:
        self._start = start
        self._min_new_tokens = start.params.min_new_tokens
        self._detokenizer = detokenizer
        self._stops = stops
        self._num_to_hide = num_shown_before + (stops.num_held if stops is not None else 0)
        self._pieces: list[str] = []
        self._num_taken = 0
        self._num_certain = 0  # tokens whose text has been released
        self._first_new = 1  # the first token, from 1, whose text may have come with what was released last
        self._may_end = False

    @property
    def text(self) -> str:
        """All text shown so far."""
        return "".join(self._pieces)

    def push(self, token_id: int, num_tokens: int) -> str | None:
        """Add the sequence's token number `num_tokens` (from 1). Returns the stop string it completed, if any."""
        self._note_minimum(num_tokens)
        if token_id in self._start.stop_tokens and self._may_end:
            return self.finish(num_tokens) or self._start.stop_tokens[token_id]
        matched = self._add(self._detokenizer.push((token_id,)), num_tokens)
        if matched is None and self._stops is not None and self._may_end and self._is_complete_in_rest(self._stops):
            return self._add(self._detokenizer.complete_rest(), num_tokens)
        return matched

    def finish(self, num_tokens: int) -> str | None:
        """No more tokens come: show what was held back. Returns a stop string that is complete only now."""
        self._note_minimum(num_tokens)
        matched = self._add(self._detokenizer.finish(), num_tokens)
        if matched is None and self._stops is not None:
            self._show(self._stops.finish())
        return matched

    def take(self) -> str:
        """Text shown since the last call."""
        text = "".join(self._pieces[self._num_taken :])
        self._num_taken = len(self._pieces)
        return text

    def completing_length(self, token_ids: Sequence[int]) -> int:
        """The fewest of these ids with which the sequence has its stop string, of whose text the end came with what was
        released last: with the last id, or with one before it whose text was not certain until then."""
        lengths = range(max(self._min_new_tokens, self._first_new), len(token_ids))
        if self._stops is None or self._stops.matched is None or not lengths:
            return len(token_ids)
        end = self._stops.num_characters
        ending = self._stops.matched[-end:]  # less than all of it where it begins in the resumed part

        def is_enough(length: int) -> bool:
            text = self._start.complete_text(token_ids[:length])
            return len(text) >= end and text.startswith(ending, end - len(ending))

        return lengths.start + bisect.bisect_left(lengths, True, key=is_enough)

    def _note_minimum(self, num_tokens: int) -> None:
        """Once the sequence may end with token number `num_tokens`, stop strings complete before it are passed over."""
        if self._may_end or num_tokens < self._min_new_tokens:
            return
        self._may_end = True
        if self._stops is not None:
            self._stops.min_end = self._stops.num_characters + len(self._detokenizer.complete_rest())

    def _is_complete_in_rest(self, stops: StopStrings) -> bool:
        """Whether the text of the ids so far holds a stop string, though its end is held back because further ids might
        change it: none shall come."""
        recent = self._detokenizer.recent_rest(self._start.stop_set.max_length)
        if not recent:
            return False
        search = stops.fork()
        search.min_end = 0
        if search.push(recent)[1] is None:
            return False
        return stops.fork().push(self._detokenizer.complete_rest())[1] is not None

    def _add(self, text: str, num_tokens: int) -> str | None:
        if not text:
            return None
        self._first_new, self._num_certain = self._num_certain + 1, num_tokens
        if self._stops is None:
            self._show(text)
            return None
        shown, matched = self._stops.push(text)
        self._show(shown)
        return matched

    def _show(self, text: str) -> None:
        num_hidden = min(self._num_to_hide, len(text))
        self._num_to_hide -= num_hidden
        if len(text) > num_hidden:
            self._pieces.append(text[num_hidden:])


def _stops_after(text: str, stops: StopSet, params: SamplingParams) -> StopStrings:
    """The search for the stop strings after `text`, within which none counts."""
    search = StopStrings(stops, keep_match=params.no_stop_trim)
    search.min_end = sys.maxsize  # until the sequence may end
    search.push(text[-stops.max_length :])
    search.num_characters = 0
    return search


def _special_stops(tokenizer: Tokenizer, params: SamplingParams) -> dict[int, str]:
    """Stop strings that are special tokens, by id: they end a sequence although their text is not shown."""
    stops: Iterable[str] = params.stop if params.skip_special_tokens else ()
    found = {tokenizer.special_token_id(stop): stop for stop in stops}
    return {token_id: stop for token_id, stop in found.items() if token_id is not None}
