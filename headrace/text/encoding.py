"""Encoding what strangers send: hopelessly long text is refused early, and much of it keeps no event loop."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from headrace.text.tokenizer import Tokenizer
from headrace.types.errors import RequestError

INLINE_CHARACTERS = 1 << 15
_MAX_CHARACTERS_PER_TOKEN = 256
_MIN_CHARACTERS_PER_TOKEN = 16  # that every tokenizer gets, whatever comes of them
_PROBE_CHARACTERS_PER_TOKEN = 16
_USUAL_GROWTH = 4

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
    of its parts, before all of it is encoded. The more a tokenizer can make of a text, the smaller are these.
    """
    excess_growth = max(1.0, tokenizer.growth / _USUAL_GROWTH)
    if len(text) > max(_MIN_CHARACTERS_PER_TOKEN, _MAX_CHARACTERS_PER_TOKEN / excess_growth) * context_length:
        message = f"{field} has {len(text)} characters, over what a context of {context_length} tokens can hold"
        raise RequestError(message, field=field)
    num_probed = math.ceil(_PROBE_CHARACTERS_PER_TOKEN * context_length / excess_growth)
    num_left = context_length
    try:
        for start in range(0, len(text) if len(text) > 2 * num_probed else 0, num_probed):
            num_ids = len(tokenizer.encode(text[start : start + num_probed], add_special_tokens=False))
            num_left -= max(0, num_ids - _PROBE_CHARACTERS_PER_TOKEN)  # the cut itself may make a few
            if num_left < 0:
                break
        else:
            return tokenizer.encode(text, add_special_tokens)
    except RequestError as error:
        raise RequestError(f"{field}: {error.message}", field=field) from None
    raise RequestError(f"{field} has over {context_length} tokens, the most that the context holds", field=field)
