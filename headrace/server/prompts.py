"""Text to ids at the door of the server: bounded before it is paid for, and off the event loop when it is long."""

from __future__ import annotations

import asyncio
import functools

from headrace.engine import AsyncEngine
from headrace.text import Tokenizer
from headrace.types.errors import RequestError

INLINE_CHARACTERS = 1 << 15
_MAX_CHARACTERS_PER_TOKEN = 256
_PROBE_CHARACTERS_PER_TOKEN = 16


def tokenizer_of(engine: AsyncEngine, field: str) -> Tokenizer:
    """The engine's tokenizer; `RequestError` when it was started without one."""
    if engine.tokenizer is None:
        raise RequestError(f"{field} needs a tokenizer, and this engine has none; send token ids", field=field)
    return engine.tokenizer


async def encode_text(engine: AsyncEngine, text: str, field: str, *, add_special_tokens: bool = True) -> list[int]:
    """Ids of a prompt. Raises `RequestError` naming `field` for text that is empty or over the context."""
    tokenizer = tokenizer_of(engine, field)
    encode = functools.partial(_encode, tokenizer, text, engine.resolved.context_length, field, add_special_tokens)
    ids = encode() if len(text) <= INLINE_CHARACTERS else await asyncio.get_running_loop().run_in_executor(None, encode)
    if not ids:
        raise RequestError(f"{field} is empty", field=field)
    return ids


def _encode(tokenizer: Tokenizer, text: str, limit: int, field: str, add_special_tokens: bool) -> list[int]:
    """A hopelessly long text is refused by its length, or by the ids of its beginning."""
    if len(text) > _MAX_CHARACTERS_PER_TOKEN * limit:
        raise RequestError(f"{field} has {len(text)} characters, over the context of {limit} tokens", field=field)
    if len(text) > 2 * _PROBE_CHARACTERS_PER_TOKEN * limit:
        probe = tokenizer.encode(text[: _PROBE_CHARACTERS_PER_TOKEN * limit], add_special_tokens)
        if len(probe) > limit + _PROBE_CHARACTERS_PER_TOKEN:
            raise RequestError(f"{field} has over {len(probe)} tokens, the context holds {limit}", field=field)
    try:
        return tokenizer.encode(text, add_special_tokens)
    except RequestError as error:
        raise RequestError(f"{field}: {error.message}", field=field) from None
