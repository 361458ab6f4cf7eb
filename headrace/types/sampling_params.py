"""Sampling parameters. Owns their names, defaults and bounds; knows nothing of tensors or requests."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from headrace.types.errors import RequestError
from headrace.types.plain_values import as_flag, as_integer, as_list, as_number, hint, plain_scalar, plain_text

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
MIN_REPETITION_PENALTY = 1e-6
"""Logits are divided by it: far smaller ones would make them infinite, as if the weights were at fault."""

_TOKEN_KEY = re.compile(r"0|[1-9][0-9]{0,9}")


class _NamesMeant(msgspec.StructMeta):
    """A keyword that is no field is refused by the name that was meant."""

    def __call__(cls, *args: Any, **values: Any) -> Any:
        known = cls.__struct_fields__
        for name in values.keys() - known:
            raise RequestError(f"{name} is not a sampling parameter{hint(name, known)}", field=name)
        return super().__call__(*args, **values)


class SamplingParams(msgspec.Struct, metaclass=_NamesMeant, frozen=True, kw_only=True):
    """How to sample one request. Names are SGLang's; `sampling_seed` is accepted for `seed` by `from_dict`.

    `max_new_tokens=0` generates nothing (scoring). No stop id is drawn as one of the first `min_new_tokens` tokens, and
    of stop strings those count that are complete with token number `min_new_tokens` or later, wherever they begin. Both
    count tokens of this request only. `temperature` below 1e-6 is greedy. `top_k` of -1 or 0 is off. `seed` is any
    unsigned 64-bit integer; None lets the engine pick one, which the reply names.

    None is the default of every field. `stop` and `stop_token_ids` may be one value or any iterable, keys of
    `logit_bias` strings of digits, numbers those of NumPy or torch (`headrace.types.plain_values`). What is kept is
    plain.

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
    logit_bias: Mapping[int, float] | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    n: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, default in zip(self.__struct_fields__, self.__struct_defaults__, strict=True):
            value = getattr(self, name)
            if value is default:
                continue
            plain = default if value is None else _READERS[name](value, name)
            low, high, rule = _BOUNDS.get(name, _NO_BOUNDS)
            if rule and plain is not None and not low <= plain <= high:
                raise RequestError(f"{name} {rule}", field=name)
            if plain is not value:
                msgspec.structs.force_setattr(self, name, plain)
        if self.min_new_tokens > self.max_new_tokens:
            raise RequestError("min_new_tokens must be in [0, max_new_tokens]", field="min_new_tokens")

    @classmethod
    def from_dict(
        cls,
        values: Mapping[str, Any],
        *,
        field: str = "sampling_params",
        defaults: Mapping[str, Any] | None = None,
    ) -> SamplingParams:
        """Build from JSON-like values. A null is the default, which `defaults` may give; an unknown key raises
        `RequestError` naming it."""
        if not isinstance(values, Mapping):
            raise RequestError(f"{field} must be an object, not {type(values).__name__}", field=field)
        known = cls.__struct_fields__
        accepted: dict[str, Any] = {}
        for key, value in values.items():
            name = "seed" if key == "sampling_seed" else key
            if name not in known:
                message = f"{field}.{key} is not a sampling parameter{hint(key, known)}"
                raise RequestError(message, field=f"{field}.{key}")
            if value is None:
                continue
            if name in accepted:
                raise RequestError(f"{field}.{key} and its alias are both given", field=f"{field}.{key}")
            accepted[name] = value
        try:
            return cls(**{**(defaults or {}), **accepted})
        except RequestError as error:
            raise RequestError(f"{field}.{error.message}", field=f"{field}.{error.field}") from None

    @property
    def is_greedy(self) -> bool:
        """True when the most probable token is always taken."""
        return self.temperature < GREEDY_TEMPERATURE


class LogprobOptions(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What log-probabilities a request wants beside those of its generated tokens, which are always returned.

    `output_mode` and `prompt_mode` say what the numbers mean (docs/architecture.md, "Log-probabilities").
    `prompt_start` is the first prompt position to score (None: no prompt logprobs; position 0 has none and reads null).
    `num_top` asks for that many most probable tokens per position, `token_ids` for those tokens' values at each.
    `max_kept` above 0 asks for the tokens that each generated one could have been (what bias, masks, top-k, top-p and
    min-p left), and is how many all of them together may be: a request that comes to more ends with an error.
    `routed_start` asks for the experts that the tokens from that position on were given to; None: not.
    """

    output_mode: LogprobMode = "temperature"
    prompt_mode: LogprobMode = "raw"
    prompt_start: int | None = None
    num_top: int = 0
    token_ids: tuple[int, ...] = ()
    max_kept: int = 0
    routed_start: int | None = None

    @property
    def wants_extras(self) -> bool:
        """True when each position needs more than its own token's value."""
        return self.num_top > 0 or bool(self.token_ids)

    @property
    def wants_output_extras(self) -> bool:
        """As `wants_extras`, of the generated tokens."""
        return self.wants_extras or self.max_kept > 0


def _read_stop(value: Any, field: str) -> tuple[str, ...]:
    what = "a string or a list of strings"
    stops = [value] if isinstance(value, str) else as_list(value, field, what, MAX_STOP_STRINGS, takes_sets=True)
    _require(all(isinstance(stop, str) and stop for stop in stops), field, "must hold non-empty strings")
    is_short = all(len(stop) <= MAX_STOP_STRING_LENGTH for stop in stops)
    _require(is_short, field, f"strings must be at most {MAX_STOP_STRING_LENGTH} characters")
    return tuple(map(plain_text, stops))


def _read_stop_ids(value: Any, field: str) -> tuple[int, ...]:
    value = plain_scalar(value)
    what = "a list of token ids"
    ids = [value] if isinstance(value, int) else as_list(value, field, what, MAX_STOP_TOKEN_IDS, takes_sets=True)
    tokens = tuple(as_integer(token, field) for token in ids)
    _require(all(0 <= token < 1 << 31 for token in tokens), field, "must hold token ids")
    return tokens


def _read_logit_bias(value: Any, field: str) -> dict[int, float] | None:
    _require(isinstance(value, Mapping), field, "must map token ids to numbers")
    _require(len(value) <= MAX_LOGIT_BIAS, field, f"must hold at most {MAX_LOGIT_BIAS} entries")
    tokens = [_token_key(token, field) for token in value]
    _require(len(set(tokens)) == len(tokens), field, "must name a token once")
    found = dict(zip(tokens, [as_number(bias, field) for bias in value.values()], strict=True))
    is_bounded = all(0 <= token < 1 << 31 and abs(bias) <= 1e4 for token, bias in found.items())
    _require(is_bounded, field, "must map token ids to numbers in [-10000, 10000]")
    return found


def _token_key(token: Any, field: str) -> int:
    """JSON has no other keys than strings. An id has one spelling: two of them must not be one token."""
    if not isinstance(token, str):
        return as_integer(token, field)
    _require(_TOKEN_KEY.fullmatch(token) is not None, field, "keys must be token ids")
    return int(token)


_READERS: dict[str, Callable[[Any, str], Any]] = {
    **dict.fromkeys(("max_new_tokens", "min_new_tokens", "top_k", "n", "seed"), as_integer),
    **dict.fromkeys(("temperature", "top_p", "min_p"), as_number),
    **dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), as_number),
    **dict.fromkeys(("ignore_eos", "skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim"), as_flag),
    "stop": _read_stop,
    "stop_token_ids": _read_stop_ids,
    "logit_bias": _read_logit_bias,
}

_BOUNDS: dict[str, tuple[float, float, str]] = {
    "max_new_tokens": (0, MAX_NEW_TOKENS, f"must be in [0, {MAX_NEW_TOKENS}]"),
    "min_new_tokens": (0, MAX_NEW_TOKENS, "must be in [0, max_new_tokens]"),
    "temperature": (0, 1e4, "must be in [0, 10000]"),
    "top_p": (math.ulp(0.0), 1, "must be in (0, 1]"),
    "top_k": (-1, (1 << 31) - 1, "must be -1, 0 (both off) or a positive 32-bit integer"),
    "min_p": (0, 1, "must be in [0, 1]"),
    "repetition_penalty": (MIN_REPETITION_PENALTY, 100, f"must be in [{MIN_REPETITION_PENALTY:f}, 100]"),
    "presence_penalty": (-100, 100, "must be in [-100, 100]"),
    "frequency_penalty": (-100, 100, "must be in [-100, 100]"),
    "n": (1, MAX_N, f"must be in [1, {MAX_N}]"),
    "seed": (0, (1 << 64) - 1, "must be an unsigned 64-bit integer"),
}
_NO_BOUNDS = 0, 0, ""


def _require(ok: bool, name: str, rule: str) -> None:
    if not ok:
        raise RequestError(f"{name} {rule}", field=name)
