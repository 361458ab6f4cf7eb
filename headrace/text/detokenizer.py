"""Text of a growing list of ids. Owns what is certain so far and what is held back; knows nothing of requests."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Protocol, Self

from headrace.text.pieces import REPLACEMENT, ByteStream, PieceStream
from headrace.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Streaming decode: the pieces joined are exactly `tokenizer.decode` of all ids pushed.

    Costs O(1) per token, amortised. Text is held back while it is not certain: an incomplete UTF-8 character, a run of
    byte-fallback tokens; with a decoder that can only decode whole lists, everything until `finish`.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> None:
        self._stream: _Stream
        if tokenizer.decoder_plan.kind == "bytes":
            self._stream = _Bytes(tokenizer, skip_special_tokens)
        elif tokenizer.decoder_plan.kind == "text":
            self._stream = _Strings(tokenizer, skip_special_tokens)
        else:
            self._stream = _Whole(tokenizer, skip_special_tokens, spaces_between_special_tokens)

    def push(self, ids: Iterable[int]) -> str:
        """Add ids; returns the text that has become certain."""
        return self._stream.push(ids)

    def finish(self) -> str:
        """No more ids come; returns the rest of the text."""
        return self._stream.finish()

    def fork(self) -> IncrementalDetokenizer:
        """One that goes on from here by itself."""
        twin = copy.copy(self)
        twin._stream = self._stream.fork()
        return twin

    def complete_rest(self) -> str:
        """The text held back, as far as its characters are complete."""
        return self._stream.complete_rest()


class _Stream(Protocol):
    def push(self, ids: Iterable[int]) -> str: ...

    def finish(self) -> str: ...

    def fork(self) -> Self: ...

    def complete_rest(self) -> str: ...


class _Bytes:
    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._pieces = tokenizer.byte_pieces(skip_special_tokens)
        self._text = ByteStream()

    def push(self, ids: Iterable[int]) -> str:
        pieces = self._pieces
        return self._text.push(b"".join([pieces[token_id] for token_id in ids]))

    def finish(self) -> str:
        return self._text.finish()

    def fork(self) -> Self:
        twin = copy.copy(self)
        twin._text = self._text.fork()
        return twin

    def complete_rest(self) -> str:
        return self._text.complete_rest()


class _Strings:
    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._pieces = tokenizer.string_pieces(skip_special_tokens)
        self._text = PieceStream(tokenizer.decoder_plan)

    def push(self, ids: Iterable[int]) -> str:
        pieces = self._pieces
        return self._text.push([piece for token_id in ids if (piece := pieces[token_id]) is not None])

    def finish(self) -> str:
        return self._text.finish()

    def fork(self) -> Self:
        twin = copy.copy(self)
        twin._text = self._text.fork()
        return twin

    def complete_rest(self) -> str:
        return self._text.complete_rest()


class _Whole:
    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, spaces_between_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._spaces_between_special_tokens = spaces_between_special_tokens
        self._ids: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        self._ids.extend(ids)
        return ""

    def finish(self) -> str:
        ids, self._ids = self._ids, []
        return self._tokenizer.decode(ids, self._skip_special_tokens, self._spaces_between_special_tokens)

    def fork(self) -> Self:
        twin = copy.copy(self)
        twin._ids = self._ids[:]
        return twin

    def complete_rest(self) -> str:
        return self.fork().finish().rstrip(REPLACEMENT)
