"""Log-probabilities in OpenAI's two spellings. Owns nothing; tokens are written as text and, for chat, as bytes."""

from __future__ import annotations

from typing import Any

from headrace.text import Tokenizer
from headrace.types.generation import Generation


def completion_logprobs(tokenizer: Tokenizer | None, piece: Generation, text_offset: int) -> dict[str, Any]:
    """`logprobs` of a completion choice. `text_offset` is the length of all tokens before this piece."""
    tokens = [_text(tokenizer, token_id) for token_id in piece.token_ids]
    offsets = []
    for token in tokens:
        offsets.append(text_offset)
        text_offset += len(token)
    top = [{_text(tokenizer, token_id): value for token_id, value in each.items()} for each in piece.top_logprobs]
    return {"tokens": tokens, "token_logprobs": piece.logprobs, "top_logprobs": top or None, "text_offset": offsets}


def end_offset(logprobs: dict[str, Any] | None, text_offset: int) -> int:
    """The `text_offset` of the piece after one with these `logprobs`.

    Counted in tokens' own texts, as within a piece: text may come later than its tokens (a character in parts), and
    offsets must not depend on where a stream is cut.
    """
    if logprobs is None or not logprobs["tokens"]:
        return text_offset
    return int(logprobs["text_offset"][-1]) + len(logprobs["tokens"][-1])


def chat_logprobs(tokenizer: Tokenizer | None, piece: Generation) -> dict[str, Any]:
    """`logprobs` of a chat choice."""
    tops = piece.top_logprobs or [{}] * len(piece.token_ids)
    content = [
        {**_entry(tokenizer, token_id, value), "top_logprobs": [_entry(tokenizer, *pair) for pair in top.items()]}
        for token_id, value, top in zip(piece.token_ids, piece.logprobs, tops, strict=True)
    ]
    return {"content": content, "refusal": None}


def _entry(tokenizer: Tokenizer | None, token_id: int, value: float) -> dict[str, Any]:
    data = b"" if tokenizer is None else tokenizer.token_bytes(token_id)
    return {"token": _text(tokenizer, token_id), "logprob": value, "bytes": list(data), "token_id": token_id}


def _text(tokenizer: Tokenizer | None, token_id: int) -> str:
    return f"token_id:{token_id}" if tokenizer is None else tokenizer.token_text(token_id)
