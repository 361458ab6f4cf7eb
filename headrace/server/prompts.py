"""Text to ids at the door of the server: bounded before it is paid for, and off the event loop when it is long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from headrace.engine import AsyncEngine
from headrace.engine.chat import tokenizer_of
from headrace.text import Tokenizer, begins_twice, encode_bounded, run_sized
from headrace.types.errors import RequestError

_CHARACTERS_PER_TOKEN = 16  # of a text whose end is wanted, this much is encoded first
_MAX_CHARACTERS_PER_TOKEN = 256


def check_count(engine: AsyncEngine, num_sequences: int, field: str) -> None:
    """Raise `RequestError` naming `field` for more sequences in one call than the engine queues."""
    limit = engine.resolved.engine.max_sequences
    if num_sequences > limit:
        raise RequestError(f"{field}: {num_sequences} sequences in one call, over {limit}", field=field)


async def encode_text(
    engine: AsyncEngine, text: str, field: str, *, add_special_tokens: bool = True, bound: int | None = None
) -> list[int]:
    """As `encode_texts`, of one."""
    return (await encode_texts(engine, {field: text}, add_special_tokens=add_special_tokens, bound=bound))[field]


async def encode_texts(
    engine: AsyncEngine,
    texts: Mapping[str, str],
    *,
    add_special_tokens: bool = True,
    allow_empty: bool = False,
    bound: int | None = None,
) -> dict[str, list[int]]:
    """Ids of texts by the fields they came from, in the same order; of each its last `bound` ones, if that is given.

    Raises `RequestError` naming the field of a text that is over the context or, without `allow_empty`, has no ids.
    """
    if not texts:
        return {}
    tokenizer = tokenizer_of(engine, next(iter(texts)))
    limit = engine.resolved.context_length

    def encode() -> dict[str, list[int]]:
        encoded: dict[str, list[int]] = {}
        for field, text in texts.items():
            if bound is not None:
                encoded[field] = _encode_end(tokenizer, text, min(bound, limit), field, add_special_tokens)
                continue
            encoded[field] = encode_bounded(tokenizer, text, limit, field, add_special_tokens=add_special_tokens)
        for field, ids in encoded.items():
            if not ids and not allow_empty:
                raise RequestError(f"{field} is empty", field=field)
        return encoded

    return await run_sized(len(texts) + sum(map(len, texts.values())), encode)


def _encode_end(tokenizer: Tokenizer, text: str, bound: int, field: str, add_special_tokens: bool) -> list[int]:
    """The last `bound` ids of a text, of which little more is encoded; an added beginning of sequence stays."""
    size, end, ids = _CHARACTERS_PER_TOKEN * bound, "", list[int]()
    while len(ids) < bound and len(end) < len(text) and size <= _MAX_CHARACTERS_PER_TOKEN * bound:
        end, size = text[-size:], 4 * size
        ids = encode_bounded(tokenizer, end, len(end), field, add_special_tokens=add_special_tokens)
    if add_special_tokens and 1 < bound < len(ids) and ids[0] == tokenizer.bos_token_id:
        return [ids[0], *ids[1 - bound :]]
    return ids[-bound:]


def warnings_about(engine: AsyncEngine, texts: Mapping[str, Sequence[int] | None]) -> list[str]:
    """What to tell a caller about the ids, by field, of texts to which special tokens were added."""
    tokenizer = engine.tokenizer
    twice = [field for field, ids in texts.items() if tokenizer and ids is not None and begins_twice(tokenizer, ids)]
    if not twice:
        return []
    fields = twice[0] if len(twice) == 1 else f"{twice[0]} and {len(twice) - 1} more"
    return [f"{fields}: the beginning of sequence is there and was added; add_special_tokens: false adds none"]
