"""Text to ids at the door of the server: bounded before it is paid for, and off the event loop when it is long."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from headrace.engine import AsyncEngine
from headrace.text import Tokenizer, encode_bounded, run_sized
from headrace.types.errors import RequestError


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


async def render_chat(
    engine: AsyncEngine,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    arguments: Mapping[str, Any],
) -> str:
    """The chat template's text. The loop goes on meanwhile, however long the template takes."""
    tokenizer = tokenizer_of(engine, "messages")
    return await asyncio.wrap_future(tokenizer.submit_chat(messages, tools, add_generation_prompt, **arguments))


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
        encoded = {
            field: encode_bounded(tokenizer, text, limit, field, add_special_tokens=add_special_tokens)
            for field, text in texts.items()
        }
        for field, ids in encoded.items():
            if not ids and not allow_empty:
                raise RequestError(f"{field} is empty", field=field)
        return encoded

    return await run_sized(len(texts) + sum(map(len, texts.values())), encode)
