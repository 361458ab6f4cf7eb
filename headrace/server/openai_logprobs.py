"""Log-probabilities in OpenAI's two spellings. Owns which tokens a part of the text has, and where in it they begin."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
from msgspec.structs import replace

from headrace.engine import Stream
from headrace.engine.sample import extend_spans, slice_spans, span_fields, spans_of
from headrace.server.wire import encode_json
from headrace.text import IncrementalDetokenizer, Tokenizer
from headrace.types.generation import Generation


class TokenWriter:
    """How tokens are written: as text and, for chat, as bytes; by their ids without a tokenizer, or if asked."""

    def __init__(self, tokenizer: Tokenizer | None, by_id: bool) -> None:
        self._tokenizer = tokenizer
        self._by_id = by_id or tokenizer is None

    def text(self, token_id: int) -> str:
        """The token as it reads inside a sentence; parts of a character are U+FFFD."""
        if self._tokenizer is None or self._by_id:
            return f"token_id:{token_id}"
        return self._tokenizer.token_text(token_id)

    def entry(self, token_id: int, value: float) -> dict[str, Any]:
        data = b"" if self._tokenizer is None else self._tokenizer.token_bytes(token_id)
        return {"token": self.text(token_id), "logprob": value, "bytes": list(data), "token_id": token_id}


class TextTokens:
    """The tokens of one choice, given out with the text that they begin: in a stream that may be later than they came.

    What the client is told of tokens beside the text (ids, log-probabilities, spans) stays together.
    """

    def __init__(self, tokenizer: Tokenizer | None, stream: Stream) -> None:
        self._detokenizer: IncrementalDetokenizer | None = None
        if tokenizer is not None:
            item = stream.item
            skips, prompt_ids = item.params.skip_special_tokens, stream.prompt_token_ids
            self._detokenizer = IncrementalDetokenizer.of(
                tokenizer, skip_special_tokens=skips, shown=item.shown_tokens, prompt_ids=prompt_ids
            )
        self._num_certain = 0
        self._num_shown = 0
        self._least_offset = 0
        self._offsets: list[int] = []
        self._held: list[Generation] = []

    def push(self, piece: Generation) -> tuple[Generation, list[int]]:
        """`piece` with the tokens that are given out now, and where in the text of all pieces each of them begins."""
        self._num_shown += len(piece.text)
        self._offsets += [self._offset(token_id) for token_id in piece.token_ids]
        count = len(self._offsets)
        if piece.finish_reason is None and self._detokenizer is not None:
            count = next((i for i, offset in enumerate(self._offsets) if offset >= self._num_shown), count)
        if count == 0 and piece.finish_reason is None:
            if piece.token_ids:
                self._held.append(piece)
            return _part(piece, 0, 0), []
        whole = _joined([*self._held, piece]) if self._held else piece
        offsets, self._offsets = self._offsets[:count], self._offsets[count:]
        self._held = [_part(whole, count, len(whole.token_ids))] if self._offsets else []
        if piece.finish_reason is not None:  # what a stop string takes away is not there to begin in
            offsets = [min(offset, self._num_shown) for offset in offsets]
        return _part(whole, 0, count), offsets

    def _offset(self, token_id: int) -> int:
        if self._detokenizer is None:
            return 0
        offset = self._num_certain + self._detokenizer.num_before(token_id)
        self._num_certain += len(self._detokenizer.push((token_id,)))
        self._least_offset = max(self._least_offset, offset)  # further ids may change what the last ones showed
        return self._least_offset


def completion_logprobs(writer: TokenWriter, piece: Generation, offsets: list[int]) -> dict[str, Any]:
    """`logprobs` of a completion choice, one entry per token."""
    tops = piece.top_logprobs or [{}] * len(piece.token_ids)
    sampled = zip(piece.token_ids, piece.logprobs, tops, strict=True)
    return {
        "tokens": [writer.text(token_id) for token_id in piece.token_ids],
        "token_logprobs": piece.logprobs,
        "top_logprobs": [_by_text(writer, {**top, token_id: value}) for token_id, value, top in sampled],
        "text_offset": offsets,
    }


def chat_logprobs(writer: TokenWriter, piece: Generation) -> dict[str, Any]:
    """`logprobs` of a chat choice."""
    tops = piece.top_logprobs or [{}] * len(piece.token_ids)
    content = [
        {**writer.entry(token_id, value), "top_logprobs": [writer.entry(*pair) for pair in top.items()]}
        for token_id, value, top in zip(piece.token_ids, piece.logprobs, tops, strict=True)
    ]
    return {"content": content, "refusal": None}


def with_top(piece: Generation, count: int) -> Generation:
    """With no more of the most probable tokens than were asked for of the output: the prompt may have more."""
    if all(len(top) <= count for top in piece.top_logprobs):
        return piece
    tops = [dict(itertools.islice(top.items(), count)) for top in piece.top_logprobs]
    return replace(piece, top_logprobs=tops)


def prompt_logprobs(writer: TokenWriter, stream: Stream, piece: Generation, count: int) -> list[Any] | None:
    """Of each prompt token, in vLLM's spelling: itself and the `count` most probable ones of its position, by id; null
    for the first. None if the prompt was not scored."""
    if not piece.prompt_logprobs:
        return None
    tops = piece.prompt_top_logprobs or [None] * len(piece.prompt_logprobs)
    positions = zip(stream.prompt_token_ids, piece.prompt_logprobs, tops, strict=True)
    return [_ranked(writer, token_id, value, top or {}, count) for token_id, value, top in positions]


def _ranked(
    writer: TokenWriter, token_id: int, value: float | None, top: dict[int, float], count: int
) -> msgspec.Raw | None:
    """One position, as JSON already: an eighth of what it takes as objects. A token that is not among those whose
    rank is known has the first one behind them."""
    if value is None:
        return None
    ranks = {each: rank for rank, each in enumerate(top, 1)}
    best = dict(itertools.islice(top.items(), count))
    entries = {
        str(each): {
            "logprob": logprob,
            "rank": ranks.get(each, len(top) + 1),
            "decoded_token": writer.text(each),
        }
        for each, logprob in {**best, token_id: value}.items()
    }
    return msgspec.Raw(encode_json(entries))


def _by_text(writer: TokenWriter, values: dict[int, float]) -> dict[str, float]:
    """By text, as the spelling has it; of ids with one text the most probable counts."""
    best: dict[str, float] = {}
    for token_id, value in values.items():
        text = writer.text(token_id)
        best[text] = max(value, best.get(text, value))
    return best


def _joined(pieces: list[Generation]) -> Generation:
    spans, epochs = list[tuple[str, int]](), list[int]()
    for piece in pieces:
        extend_spans(spans, epochs, piece)
    return replace(
        pieces[-1],
        version_spans=spans,
        version_epochs=epochs,
        token_ids=[each for piece in pieces for each in piece.token_ids],
        logprobs=[each for piece in pieces for each in piece.logprobs],
        top_logprobs=[each for piece in pieces for each in piece.top_logprobs],
    )


def _part(whole: Generation, start: int, stop: int) -> Generation:
    return replace(
        whole,
        **span_fields(slice_spans(spans_of(whole), start, stop)),
        token_ids=whole.token_ids[start:stop],
        logprobs=whole.logprobs[start:stop],
        top_logprobs=whole.top_logprobs[start:stop],
    )
