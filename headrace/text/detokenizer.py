"""Text of a growing list of ids. Owns what is certain so far and what is held back; knows nothing of requests."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol, Self

from headrace.text.pieces import MAX_CHARACTER_BYTES, REPLACEMENT, ByteStream, PieceStream, begun_character, byte_token
from headrace.text.tokenizer import BytePieces, Tokenizer

_WHOLE_CONTEXT = 16
_WHOLE_WINDOW = 128
_COUNTED_WINDOW = 32


class IncrementalDetokenizer(Protocol):
    """Streaming decode: the pieces joined are exactly `tokenizer.decode` of all ids pushed.

    With `prompt_ids` they are what the ids add to the prompt's text: a decoder that drops the space at the start of a
    text keeps it there, and a character that the prompt begins is shown whole by the ids that complete it. `shown` are
    special tokens that show although others are skipped.

    Costs O(1) per token, amortised. Text is held back while it is not certain: an incomplete UTF-8 character, a run of
    byte-fallback tokens; with a decoder that can only decode whole lists, everything until `finish`.
    """

    @staticmethod
    def of(
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        shown: frozenset[str] = frozenset(),
        prompt_ids: Sequence[int] = (),
    ) -> IncrementalDetokenizer:
        """The one for this tokenizer's decoder."""
        plan, pieces = tokenizer.decoder_plan, tokenizer.pieces(skip_special_tokens, shown)
        if isinstance(pieces, BytePieces):
            return _Pieces(pieces, ByteStream(_begun_bytes(pieces, prompt_ids)))
        if plan.kind == "whole":
            return _Whole(tokenizer, pieces, prompt_ids)
        is_first = all(pieces[token_id] is None for token_id in prompt_ids)
        begun = _begun_run(pieces, prompt_ids) if plan.joins_byte_tokens else b""
        return _Pieces(pieces, PieceStream(plan, is_first=is_first, begun=begun))

    def push(self, ids: Iterable[int]) -> str:
        """Add ids; returns the text that has become certain."""

    def finish(self) -> str:
        """No more ids come; returns the rest of the text."""

    def num_before(self, token_id: int) -> int:
        """How many characters what is held back shows before the text of `token_id`, were that to come next.

        Costs no more the more is held back: where only whole lists can be decoded, it is counted by the last ids' text.
        """

    def fork(self) -> Self:
        """One that goes on from here by itself."""

    def complete_rest(self) -> str:
        """The text held back, as far as its characters are complete."""

    def recent_rest(self, num_before: int) -> str:
        """The end of `complete_rest`: what changed in it since the last call, and `num_before` characters before that.

        Costs no more per token the more there are, but in a run of byte tokens, and where only whole lists can be
        decoded and their decoder is not local: fewer ids are decoded only when their text was seen to end as that of
        more did.
        """


class _Pieces(IncrementalDetokenizer):
    """Every id adds its own piece, whatever comes beside it."""

    def __init__(self, pieces: Mapping[int, Any], text: ByteStream | PieceStream) -> None:
        self._pieces = pieces
        self._text = text

    def push(self, ids: Iterable[int]) -> str:
        pieces = self._pieces
        return self._text.push([pieces[token_id] for token_id in ids])

    def finish(self) -> str:
        return self._text.finish()

    def num_before(self, token_id: int) -> int:
        return self._text.num_before(self._pieces[token_id])

    def fork(self) -> Self:
        twin = copy.copy(self)
        twin._text = self._text.fork()
        return twin

    def complete_rest(self) -> str:
        return self._text.complete_rest()

    def recent_rest(self, num_before: int) -> str:
        return self._text.complete_rest()


class _Whole(IncrementalDetokenizer):
    """What the ids add to the text of the prompt's last ones, if the decoder leaves that text as it is before them."""

    def __init__(self, tokenizer: Tokenizer, pieces: Mapping[int, str | None], prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._pieces = pieces
        self._context = list(islice(self._visible(reversed(prompt_ids)), _WHOLE_CONTEXT))[::-1]
        self._ids: list[int] = []  # like the context without those that do not show
        self._num_passed = 0  # ids whose text `recent_rest` decodes no more
        self._max_window = _WHOLE_WINDOW
        self._recent = ""
        self._num_counted = 0  # ids that `num_before` decodes no more, and how many characters they come to
        self._num_characters = 0

    def push(self, ids: Iterable[int]) -> str:
        self._ids.extend(self._visible(ids))
        return ""

    def finish(self) -> str:
        ids, self._ids = self._ids, []
        return self._added(ids)

    def num_before(self, token_id: int) -> int:
        ids = self._ids[self._num_counted :]
        decode = self._decode if self._num_counted else self._added
        text, longer = decode(ids), decode([*ids, *self._visible((token_id,))]).rstrip(REPLACEMENT)
        complete = text.rstrip(REPLACEMENT)  # a character that is begun may spoil the run of bytes that it stands in
        num_same = len(complete) if complete.startswith(longer) else _num_equal(text, longer)
        result = self._num_characters + num_same
        if len(ids) >= (_COUNTED_WINDOW if text == complete else 2 * _COUNTED_WINDOW):
            self._count(ids, text)
        return result

    def fork(self) -> Self:
        twin = copy.copy(self)
        twin._ids = self._ids[:]
        return twin

    def complete_rest(self) -> str:
        return self.fork().finish().rstrip(REPLACEMENT)

    def recent_rest(self, num_before: int) -> str:
        window = self._ids[self._num_passed :] if self._num_passed else [*self._context, *self._ids]
        text = self._decode(window).rstrip(REPLACEMENT)
        first_new = max(0, _num_equal(self._recent, text) - num_before)
        self._recent = text
        if len(window) >= self._max_window:
            self._shorten(window, num_before)
        return text[first_new:]

    def _shorten(self, window: list[int], num_before: int) -> None:
        """Decode only the later half from now on, if it alone gives the same text, but for its beginning."""
        half = window[len(window) // 2 :]
        text = self._decode(half).rstrip(REPLACEMENT)
        ending = text[len(text) // 2 :]
        if len(ending) > num_before and self._recent.endswith(ending):
            self._num_passed, self._recent = len(self._ids) - len(half), text
            window = half
        self._max_window = max(_WHOLE_WINDOW, 2 * len(window))

    def _count(self, ids: list[int], text: str) -> None:
        """Decode only the later half from now on; from where its text ends as that of all does, between characters."""
        halves = [ids[len(ids) // 2 + skipped :] for skipped in range(MAX_CHARACTER_BYTES)]
        texts = [self._decode(half) for half in halves]
        ends = [text.endswith(each[len(each) // 2 :]) for each in texts]
        best = ends.index(True) if True in ends else 0
        self._num_counted += len(ids) - len(halves[best])
        self._num_characters += len(text) - len(texts[best])

    def _added(self, ids: list[int]) -> str:
        before, text = self._decode(self._context), self._decode([*self._context, *ids])
        return text[len(before) :] if text.startswith(before) else self._decode(ids)

    def _visible(self, ids: Iterable[int]) -> Iterator[int]:
        return (each for each in ids if self._pieces[each] is not None)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, False)


def _num_equal(left: str, right: str) -> int:
    """How many characters two texts begin with in common."""
    if right.startswith(left):
        return len(left)
    return next((at for at, (one, other) in enumerate(zip(left, right, strict=False)) if one != other), len(right))


def _begun_bytes(pieces: Mapping[int, bytes], prompt_ids: Sequence[int]) -> bytes:
    """The bytes of a character that the prompt begins and does not complete."""
    tail = b""
    for token_id in reversed(prompt_ids):
        tail = pieces[token_id] + tail
        if len(tail) >= MAX_CHARACTER_BYTES:
            break
    return begun_character(tail)


def _begun_run(pieces: Mapping[int, str | None], prompt_ids: Sequence[int]) -> bytes:
    """As `_begun_bytes`, of byte tokens; tokens that do not show part no run."""
    tail = b""
    for token_id in reversed(prompt_ids):
        token = pieces[token_id]
        byte = None if token is None else byte_token(token)
        if (token is not None and byte is None) or len(tail) >= MAX_CHARACTER_BYTES:
            break
        tail = tail if byte is None else bytes([byte]) + tail
    return begun_character(tail)
