"""Text to ids at the door of the server: bounded before it is paid for, and off the event loop when it is long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TypeVar

from headrace.engine import AsyncEngine
from headrace.text import Tokenizer
from headrace.types.errors import RequestError

INLINE_CHARACTERS = 1 << 15
_MAX_CHARACTERS_PER_TOKEN = 256
_PROBE_CHARACTERS_PER_TOKEN = 16

Result = TypeVar("Result")


def tokenizer_of(engine: AsyncEngine, field: str) -> Tokenizer:
    """The engine's tokenizer; `RequestError` when it was started without one."""
    if engine.tokenizer is None:
        raise RequestError(f"{field} needs a tokenizer, and this engine has none; send token ids", field=field)
    return engine.tokenizer


def check_count(engine: AsyncEngine, num_sequences: int, field: str) -> None:
    """Raise `RequestError` naming `field` for more sequences in one call than the engine queues."""
    limit = engine.resolved.engine.max_sequences
    if num_sequences > limit:
        raise RequestError(f"{field}: {num_sequences} sequences in one call, over {limit}", field=field)


async def run_sized(size: int, work: Callable[[], Result]) -> Result:
    """The result of `work` on `size` characters or ids; much of it is done in another thread, so that streams go on."""
    if size <= INLINE_CHARACTERS:
        return work()
    return await asyncio.get_running_loop().run_in_executor(None, work)


async def encode_text(engine: AsyncEngine, text: str, field: str, *, add_special_tokens: bool = True) -> list[int]:
    """As `encode_texts`, of one."""
    return (await encode_texts(engine, {field: text}, add_special_tokens=add_special_tokens))[field]


async def encode_texts(
    engine: AsyncEngine, texts: Mapping[str, str], *, add_special_tokens: bool = True, allow_empty: bool = False
) -> dict[str, list[int]]:
    """Ids of texts by the fields they came from, in the same order.

    Raises `RequestError` naming the field of a text that is over the context or, without `allow_empty`, has no ids.
    """
    if not texts:
        return {}
    tokenizer = tokenizer_of(engine, next(iter(texts)))
    limit = engine.resolved.context_length

    def encode() -> dict[str, list[int]]:
        encoded = {field: _encode(tokenizer, text, limit, field, add_special_tokens) for field, text in texts.items()}
        for field, ids in encoded.items():
            if not ids and not allow_empty:
                raise RequestError(f"{field} is empty", field=field)
        return encoded

    return await run_sized(len(texts) + sum(map(len, texts.values())), encode)


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
