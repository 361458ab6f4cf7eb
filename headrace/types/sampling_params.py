"""Sampling parameters. Owns their names, defaults and bounds; knows nothing of tensors or requests."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from headrace.types.errors import RequestError

LogprobMode = Literal["raw", "temperature", "sampled"]

MAX_NEW_TOKENS = 1 << 24
MAX_N = 4096
MAX_STOP_STRINGS = 64
MAX_STOP_STRING_LENGTH = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS = 4096
MAX_TOP_LOGPROBS = 1024
MAX_LOGPROB_TOKEN_IDS = 4096
GREEDY_TEMPERATURE = 1e-6


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to sample one request. Names are SGLang's; `sampling_seed` is accepted for `seed` by `from_dict`.

    `max_new_tokens=0` generates nothing (scoring). `temperature` below 1e-6 is greedy. `top_k` of -1 or 0 is off.
    `seed` is any unsigned 64-bit integer; None lets the engine pick one, which the reply names.

    Raises `RequestError` naming the field when a value is of a wrong type or out of bounds.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    n: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        _check_bounds(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, field: str = "sampling_params") -> SamplingParams:
        """Build from JSON-like values. A null is the default; an unknown key raises `RequestError` naming it."""
        if not isinstance(values, Mapping):
            raise RequestError(f"{field} must be an object, not {type(values).__name__}", field=field)
        known = cls.__struct_fields__
        accepted: dict[str, Any] = {}
        for key, value in values.items():
            name = "seed" if key == "sampling_seed" else key
            if name not in known:
                raise RequestError(f"{field}.{key} is not a sampling parameter", field=f"{field}.{key}")
            if value is None:
                continue
            if name in accepted:
                raise RequestError(f"{field}.{key} and its alias are both given", field=f"{field}.{key}")
            accepted[name] = _coerce(name, value)
        try:
            return cls(**accepted)
        except RequestError as error:
            raise RequestError(f"{field}.{error.message}", field=f"{field}.{error.field}") from None

    @property
    def is_greedy(self) -> bool:
        """True when the most probable token is always taken."""
        return self.temperature < GREEDY_TEMPERATURE


class LogprobOptions(msgspec.Struct, frozen=True, array_like=True):
    """What log-probabilities a request wants beside those of its generated tokens, which are always returned.

    `output_mode` and `prompt_mode` say what the numbers mean (docs/architecture.md, "Log-probabilities").
    `prompt_start` is the first prompt position to score (None: no prompt logprobs; position 0 has none and reads null).
    `num_top` asks for that many most probable tokens per position, `token_ids` for those tokens' values at each.
    """

    output_mode: LogprobMode = "temperature"
    prompt_mode: LogprobMode = "raw"
    prompt_start: int | None = None
    num_top: int = 0
    token_ids: tuple[int, ...] = ()

    @property
    def wants_extras(self) -> bool:
        """True when each position needs more than its own token's value."""
        return self.num_top > 0 or bool(self.token_ids)


def _coerce(name: str, value: Any) -> Any:
    """Accept the JSON spellings of a field: a lone stop string, integer keys written as strings."""
    if name in ("stop", "stop_token_ids"):
        if isinstance(value, (str, int)) and not isinstance(value, bool):
            return (value,)
        return tuple(value) if isinstance(value, (list, tuple)) else value
    if name == "logit_bias" and isinstance(value, Mapping):
        try:
            return {int(token): bias for token, bias in value.items()}
        except (TypeError, ValueError):
            raise RequestError("logit_bias keys must be token ids", field="sampling_params.logit_bias") from None
    return value


_INTEGERS = ("max_new_tokens", "min_new_tokens", "top_k", "n")
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_FLAGS = ("ignore_eos", "skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max  # false for NaN, and for integers that no float can hold


def _require(ok: bool, name: str, rule: str) -> None:
    if not ok:
        raise RequestError(f"{name} {rule}", field=name)


def _check_types(params: SamplingParams) -> None:
    for name in _INTEGERS:
        _require(_is_integer(getattr(params, name)), name, "must be an integer")
    for name in _NUMBERS:
        _require(_is_number(getattr(params, name)), name, "must be a finite number")
    for name in _FLAGS:
        _require(isinstance(getattr(params, name), bool), name, "must be true or false")
    _require(params.seed is None or _is_integer(params.seed), "seed", "must be an integer")
    _require(isinstance(params.stop, tuple), "stop", "must be a string or a list of strings")
    _require(all(isinstance(s, str) and s for s in params.stop), "stop", "must hold non-empty strings")
    _require(isinstance(params.stop_token_ids, tuple), "stop_token_ids", "must be a list of token ids")
    _require(all(map(_is_integer, params.stop_token_ids)), "stop_token_ids", "must hold integers")
    bias = params.logit_bias
    _require(bias is None or isinstance(bias, dict), "logit_bias", "must map token ids to numbers")
    _require(
        all(_is_integer(k) and _is_number(v) for k, v in (bias or {}).items()),
        "logit_bias",
        "must map token ids to finite numbers",
    )


def _check_bounds(params: SamplingParams) -> None:
    _require(0 <= params.max_new_tokens <= MAX_NEW_TOKENS, "max_new_tokens", f"must be in [0, {MAX_NEW_TOKENS}]")
    _require(0 <= params.min_new_tokens <= params.max_new_tokens, "min_new_tokens", "must be in [0, max_new_tokens]")
    _require(0 <= params.temperature <= 1e4, "temperature", "must be in [0, 10000]")
    _require(0 < params.top_p <= 1, "top_p", "must be in (0, 1]")
    _require(-1 <= params.top_k < 1 << 31, "top_k", "must be -1, 0 (both off) or a positive 32-bit integer")
    _require(0 <= params.min_p <= 1, "min_p", "must be in [0, 1]")
    _require(0 < params.repetition_penalty <= 100, "repetition_penalty", "must be in (0, 100]")
    _require(-100 <= params.presence_penalty <= 100, "presence_penalty", "must be in [-100, 100]")
    _require(-100 <= params.frequency_penalty <= 100, "frequency_penalty", "must be in [-100, 100]")
    _require(1 <= params.n <= MAX_N, "n", f"must be in [1, {MAX_N}]")
    _require(params.seed is None or 0 <= params.seed < 1 << 64, "seed", "must be an unsigned 64-bit integer")
    _require(len(params.stop) <= MAX_STOP_STRINGS, "stop", f"must hold at most {MAX_STOP_STRINGS} strings")
    _require(
        all(len(s) <= MAX_STOP_STRING_LENGTH for s in params.stop),
        "stop",
        f"strings must be at most {MAX_STOP_STRING_LENGTH} characters",
    )
    _require(
        len(params.stop_token_ids) <= MAX_STOP_TOKEN_IDS,
        "stop_token_ids",
        f"must hold at most {MAX_STOP_TOKEN_IDS} ids",
    )
    _require(all(0 <= t < 1 << 31 for t in params.stop_token_ids), "stop_token_ids", "must hold token ids")
    bias = params.logit_bias or {}
    _require(len(bias) <= MAX_LOGIT_BIAS, "logit_bias", f"must hold at most {MAX_LOGIT_BIAS} entries")
    _require(
        all(0 <= token < 1 << 31 and abs(value) <= 1e4 for token, value in bias.items()),
        "logit_bias",
        "must map token ids to numbers in [-10000, 10000]",
    )
