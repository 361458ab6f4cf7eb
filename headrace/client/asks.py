"""What a caller of a client says, as it is sent: the arguments of `generate`. Owns their spelling only.

Checked here is what the wire could not carry, by the same functions as in an engine; the rest is checked there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from headrace.engine.fields import InputIds, Prompts, Sampling, conversations, params_list, sources
from headrace.engine.requests import GenerateOptions
from headrace.types.errors import RequestError
from headrace.types.http import ChatAsk, GenerateAsk
from headrace.types.plain_values import as_integer_array, plain_scalar, plain_text
from headrace.types.sampling_params import SamplingParams


def generate_body(
    prompts: Prompts,
    input_ids: InputIds,
    sampling_params: Sampling,
    options: GenerateOptions,
    *,
    stream: bool = False,
    scores: bool = False,
) -> bytes:
    """The JSON of a `GenerateAsk`. Raises `RequestError` naming the field."""
    field, given = sources(prompts, input_ids)
    returns_errors = plain_scalar(options.get("return_errors", False)) is True
    params = _params(sampling_params, len(given), returns_errors)
    names = [field] if len(given) == 1 else [f"{field}[{i}]" for i in range(len(given))]
    if field == "input_ids":
        given = [_ids(row, name, returns_errors) for row, name in zip(given, names, strict=True)]
    else:
        given = [_text(each, name, returns_errors) for each, name in zip(given, names, strict=True)]
    ask = GenerateAsk(**{field: given}, sampling_params=params, options=_spelled(options), stream=stream, scores=scores)
    return _encoded(ask, field)


def chat_body(ask: ChatAsk) -> bytes:
    """The JSON of `ask`, whose arguments are as the caller gave them. Raises `RequestError` naming the field."""
    given = conversations(ask.messages)
    params = _params(ask.sampling_params, len(given), plain_scalar(ask.options.get("return_errors", False)) is True)
    spelled = {"messages": given, "sampling_params": params, "options": _spelled(ask.options)}
    return _encoded(msgspec.structs.replace(ask, **spelled), "messages")


def native_body(values: Mapping[str, Any]) -> bytes:
    """The JSON of a body of `/generate`, without what is None. Raises `RequestError`."""
    spelled = {name: _spelled_all(value) for name, value in values.items() if value is not None}
    try:
        return _ENCODER.encode(spelled)
    except (OverflowError, RecursionError, TypeError, UnicodeEncodeError) as error:
        raise RequestError(f"the arguments cannot be sent: {error}") from None


def message_body(value: Any) -> bytes:
    """MessagePack of the arguments of any other call. Raises `RequestError`."""
    try:
        return msgspec.msgpack.encode(value, enc_hook=_plain)
    except (OverflowError, RecursionError, TypeError, UnicodeEncodeError) as error:
        raise RequestError(f"the arguments cannot be sent: {error}") from None


def _encoded(ask: Any, field: str) -> bytes:
    try:
        return _ENCODER.encode(ask)
    except (OverflowError, RecursionError, TypeError, UnicodeEncodeError) as error:
        raise RequestError(f"{field}, sampling_params or options cannot be sent: {error}", field=field) from None


def _params(sampling_params: Sampling, num_prompts: int, returns_errors: bool) -> Any:
    """Checked, one for all or a list, with nothing that was not given; those that are refused as they were given, if
    they are to be refused there."""
    refusals: dict[int, RequestError] = {}
    params = params_list(sampling_params, num_prompts, refusals if returns_errors else None)
    if not isinstance(sampling_params, (list, tuple)):
        return _as_given(sampling_params, params[0])
    pairs = enumerate(zip(sampling_params, params, strict=True))
    return [_spelled(given) if position in refusals else _as_given(given, each) for position, (given, each) in pairs]


def _as_given(given: Any, checked: SamplingParams) -> Any:
    """What was given, with the plain values of what was made of it: the rest is the engine's to choose."""
    if not isinstance(given, Mapping):
        return given
    return {name: getattr(checked, "seed" if name == "sampling_seed" else name) for name in given}


def _ids(row: Any, name: str, returns_errors: bool) -> list[Any]:
    try:
        ids: list[int] = as_integer_array(row, name).tolist()
        return ids
    except RequestError:
        if not returns_errors:
            raise
        return [None]  # refused there, as an error of this prompt


def _text(text: Any, name: str, returns_errors: bool) -> Any:
    if isinstance(text, str) and not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            if returns_errors and "[" in name:
                return None  # as above; a call without any text would be refused as a whole
            message = f"{name}: text is not valid Unicode: {error.reason} at {error.start}"
            raise RequestError(message, field=name) from None
    return text


def _spelled(value: Any) -> Any:
    """JSON has no number that is not finite, and null would be the default: such a one is sent as text, and refused."""
    if isinstance(value, Mapping):
        return {key: _spelled(each) for key, each in value.items()}
    plain = plain_text(plain_scalar(value))
    return str(plain) if isinstance(plain, float) and not math.isfinite(plain) else plain


def _spelled_all(value: Any) -> Any:
    return [_spelled(each) for each in value] if isinstance(value, (list, tuple)) else _spelled(value)


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "__iter__"):
        return list(value)
    if hasattr(value, "__fspath__"):
        return value.__fspath__()
    raise TypeError(f"a {type(value).__name__} is no plain value")


_ENCODER = msgspec.json.Encoder(enc_hook=_plain)
