"""What the body of a data call says to a policy: its prompt, how long it may become, and what it belongs with.

Only looks: a body is passed on as it is, and what cannot be read here is the replica's to refuse. Knows the names that
the dialects give these things, and nothing else of them.
"""

from __future__ import annotations

from typing import Any

import msgspec

from headrace.cluster.http_parts import Head
from headrace.cluster.policies import Ask
from headrace.cluster.prefix_index import blocks_of
from headrace.ipc.codec import DECODE_ERRORS

ROUTING_KEY_HEADERS = (b"x-smg-routing-key", b"x-session-id")
MAX_READ_BYTES = 1 << 20
"""A longer body is not read: it is many prompts at once, or one that is far longer than what decides."""
EXPECTED_NEW_TOKENS = 256
"""At most so many of the tokens that a request may generate count: rows are decoded side by side, so that one more
costs a replica little, and few requests use all that they are allowed."""
_BYTES_PER_TOKEN = 4
_NONE = msgspec.Raw()


class _Sampling(msgspec.Struct):
    max_new_tokens: Any = None
    max_tokens: Any = None
    n: Any = None


class _Body(msgspec.Struct):
    """The prompt under any name that it has, and what bounds the answer."""

    input_ids: msgspec.Raw = _NONE
    text: msgspec.Raw = _NONE
    prompt: msgspec.Raw = _NONE
    messages: msgspec.Raw = _NONE
    token_ids: msgspec.Raw = _NONE
    prompts: msgspec.Raw = _NONE
    tools: msgspec.Raw = _NONE
    sampling_params: _Sampling | None = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    n: Any = None


_decode = msgspec.json.Decoder(_Body).decode
_MIN_CUT_BYTES = 256
_CUT = b"[]"
_NO_SAMPLING = _Sampling()


def read_ask(body: bytes, key: str = "") -> Ask:
    """What there is to say of a request with this body and `routing_key`."""
    if len(body) > MAX_READ_BYTES:
        return Ask(len(body) // _BYTES_PER_TOKEN, EXPECTED_NEW_TOKENS, key=key)
    try:
        found, prompt, num_tokens = _read(body)
    except DECODE_ERRORS:
        return Ask(len(body) // _BYTES_PER_TOKEN, EXPECTED_NEW_TOKENS, key=key)
    sampling = found.sampling_params or _NO_SAMPLING
    limit = _first_count(sampling.max_new_tokens, sampling.max_tokens, found.max_tokens, found.max_completion_tokens)
    num_new = EXPECTED_NEW_TOKENS if limit is None else min(limit, EXPECTED_NEW_TOKENS)
    num_samples = _first_count(sampling.n, found.n) or 1
    return Ask(num_tokens, num_new, min(num_samples, 1 << 16), blocks_of(prompt), key)


def routing_key(head: Head) -> str:
    """The caller's word for what belongs together; "" if there is none."""
    for name, value in head.headers:
        if name in ROUTING_KEY_HEADERS:
            return value.decode("latin-1")
    return ""


def _read(body: bytes) -> tuple[_Body, bytes, int]:
    """A body, the bytes of its prompt, and its tokens. A prompt that is a long list of ids is cut out before the rest
    is decoded, which takes far longer than to find its end."""
    start = body.find(b"[")
    end = body.find(b"]", start)
    if end - start > _MIN_CUT_BYTES:
        ids = body[start : end + 1]
        if b'"' not in ids and ids.rfind(b"[") == 0:
            found = _decode(body[:start] + _CUT + body[end + 1 :])
            if _prompt_of(found) == _CUT:
                return found, ids, ids.count(b",") + 1
    found = _decode(body)
    prompt = _prompt_of(found)
    return found, prompt, _num_tokens(prompt)


def _prompt_of(found: _Body) -> bytes:
    prompt = found.input_ids or found.text or found.prompt or found.messages or found.token_ids or found.prompts
    return bytes(found.tools) + bytes(prompt)


def _num_tokens(prompt: bytes) -> int:
    """An estimate: of token ids their number."""
    is_ids = prompt[:1] == b"[" and b'"' not in prompt[:64]
    return prompt.count(b",") + 1 if is_ids else -(-len(prompt) // _BYTES_PER_TOKEN)


def _first_count(*values: Any) -> int | None:
    for value in values:
        if type(value) is int and value >= 0:
            return value
    return None
