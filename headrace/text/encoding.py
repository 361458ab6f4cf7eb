"""Encoding what strangers send: hopelessly long text is refused early, and much of it keeps no event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from headrace.text.tokenizer import Tokenizer
from headrace.types.errors import RequestError

INLINE_CHARACTERS = 1 << 15
_MAX_CHARACTERS_PER_TOKEN = 256
_PROBE_CHARACTERS_PER_TOKEN = 16

Result = TypeVar("Result")


async def run_sized(size: int, work: Callable[[], Result]) -> Result:
    """The result of `work` on `size` characters or ids; much of it is done in another thread, so that streams go on."""
    if size <= INLINE_CHARACTERS:
        return work()
    return await asyncio.get_running_loop().run_in_executor(None, work)


def begins_twice(tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    """True for ids that begin with two beginnings of sequence: mostly the text's own and one that was added to it."""
    bos = tokenizer.bos_token_id
    return bos is not None and len(ids) > 1 and ids[0] == bos and ids[1] == bos


def encode_bounded(
    tokenizer: Tokenizer, text: str, context_length: int, field: str, *, add_special_tokens: bool = True
) -> list[int]:
    """Ids of `text`, which came in `field`; they may still be over the context.

    Raises `RequestError` for text that is not Unicode, and for one that is hopelessly long, by its length or by the ids
    of its beginning, before all of it is encoded.
    """
    if len(text) > _MAX_CHARACTERS_PER_TOKEN * context_length:
        message = f"{field} has {len(text)} characters, over what a context of {context_length} tokens can hold"
        raise RequestError(message, field=field)
    num_probed = _PROBE_CHARACTERS_PER_TOKEN * context_length
    try:
        probe = tokenizer.encode(text[:num_probed], add_special_tokens) if len(text) > 2 * num_probed else []
        if len(probe) <= context_length + _PROBE_CHARACTERS_PER_TOKEN:  # the cut itself may make a few
            return tokenizer.encode(text, add_special_tokens)
    except RequestError as error:
        raise RequestError(f"{field}: {error.message}", field=field) from None
    raise RequestError(f"{field} has over {context_length} tokens, the most that the context holds", field=field)
