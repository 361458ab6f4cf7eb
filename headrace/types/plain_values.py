"""Plain values of what callers write. Owns which spellings of a number, flag, time or list are taken, for all doors.

A scalar of NumPy or torch is the number that it holds. Nothing is guessed: a string is no number, a bool no integer, a
float no integer. Every refusal names the field, in the error type that the caller asks for.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import operator
import os
from collections.abc import Iterable, Mapping, Set
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec
import numpy as np

from headrace.types.errors import HeadraceError, RequestError, encodable

TORN_JSON = "Input data was truncated"
"""What msgspec says of JSON that was cut off, as by the end of who wrote it."""

MAX_SECONDS = 1e9
"""Longest time that may be asked for: thirty years, which every clock and timer here can hold."""

_MAX_NAME_LENGTH = 40

_NAMES_ELSEWHERE = {
    **{"tp": "tp_size", "tensor_parallel_size": "tp_size", "pp": "pp_size", "pipeline_parallel_size": "pp_size"},
    **{"model_path": "model", "tokenizer_path": "tokenizer", "random_seed": "seed", "block_size": "page_size"},
    **{"max_model_len": "context_length", "max_seq_len": "context_length", "kv_cache_dtype": "kv_dtype"},
    **{"gpu_memory_utilization": "memory_fraction", "mem_fraction_static": "memory_fraction"},
    **{"max_num_seqs": "max_running_requests", "max_total_tokens": "kv_pool_tokens"},
    **{"chunked_prefill_size": "max_num_batched_tokens", "max_prefill_tokens": "max_num_batched_tokens"},
    **{"enable_prefix_caching": "prefix_cache", "enable_memory_saver": "memory_saver"},
    **{"token_ids_logprob": "logprob_token_ids", "return_top_p_token_ids": "return_kept_token_ids"},
    **{"routed_experts_start_len": "routed_experts_start", "enable_return_routed_experts": "keep_routed_experts"},
    **{"top_logprobs_num": "top_logprobs", "prompt_logprobs": "return_prompt_logprobs"},
    **{"logprob_start_len": "logprob_start", "rid": "request_id", "cache_salt": "extra_key"},
    **{"dp": "dp_size", "data_parallel_size": "dp_size", "enable_hierarchical_cache": "host_kv_tokens"},
    **{"disable_radix_cache": "no_prefix_cache", "enforce_eager": "no_cuda_graphs"},
    **{"enable_weights_cpu_backup": "keep_weights_copy", "enable_sleep_mode": "memory_saver"},
    **{"enable_deterministic_inference": "numerics", "generation_config": "sampling_defaults"},
    **{"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"},
}
"""What SGLang, vLLM and OpenAI call what is called otherwise here, and is for the same. "no_" is that of a flag."""

_ONLY_ELSEWHERE = frozenset(
    (
        *("allowed_token_ids", "length_penalty", "lora_request", "return_entropy", "return_prompt_token_ids"),
        "prompt_token_ids",
        *("dp_size", "ep_size", "sampling_backend"),
    )
)
"""Their names for what there is not here: one of ours that is spelled nearly so means something else."""

Refusal = type[HeadraceError]


def plain_scalar(value: Any) -> Any:
    """A scalar of NumPy, or an array or tensor without axes, as the Python value in it; anything else as it is."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        with contextlib.suppress(RuntimeError):  # a tensor without a value: on the meta device, or traced
            return value.item()
    return value


def plain_text(value: Any) -> Any:
    """A string of NumPy or of an enumeration as the plain string in it; anything else as it is."""
    return str.__str__(value) if isinstance(value, str) else value  # `str()` of an enumeration's is its member's name


def as_setting(value: Any, kind: Any, field: str, refusal: Refusal) -> Any:
    """The value of a setting of type `kind`: a path as a string, a scalar as its number, text that can be sent."""
    plain = os.fspath(value) if isinstance(value, os.PathLike) else plain_text(plain_scalar(value))
    if isinstance(plain, str) and plain != encodable(plain):
        raise refusal(f"{field} must be Unicode text, without lone surrogates", field=field)  # it may be a key
    if get_origin(kind) is Literal:
        return as_choice(plain, get_args(kind), field, refusal)
    try:
        return msgspec.convert(plain, kind, strict=True)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:  # the latter of text inside a list
        raise refusal(f"{field}: {error}", field=field) from None


def as_path(name: str, field: str, refusal: Refusal) -> Path:
    """The absolute path of a name, without links; "~nobody" stays as it is."""
    try:
        return Path(os.path.expanduser(plain_text(name))).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # no working directory, links in a circle, a null character
        raise refusal(f"{field} {name!r} is not a path on this machine: {error}", field=field) from None


def as_integer(value: Any, field: str, refusal: Refusal = RequestError) -> int:
    """An integer; no bool, no float, no string."""
    if type(value) is int:
        return value
    value = plain_scalar(value)
    if hasattr(type(value), "__index__") and not isinstance(value, bool) and not hasattr(value, "shape"):
        return operator.index(value)
    raise refusal(f"{field} must be an integer, not {_shown(value)}", field=field)


def as_number(value: Any, field: str, refusal: Refusal = RequestError) -> float:
    """A finite number, which an integer is too."""
    value = value if type(value) is float else plain_scalar(value)
    if hasattr(type(value), "__float__") and not isinstance(value, bool) and not hasattr(value, "shape"):
        with contextlib.suppress(OverflowError, ValueError):  # an integer that no float can hold
            number = float(value)
            if math.isfinite(number):
                return number
    raise refusal(f"{field} must be a finite number, not {_shown(value)}", field=field)


def as_flag(value: Any, field: str, refusal: Refusal = RequestError) -> bool:
    """True or false; nothing that is merely truthy."""
    value = plain_scalar(value)
    if isinstance(value, bool):
        return value
    raise refusal(f"{field} must be true or false, not {_shown(value)}", field=field)


def as_seconds(value: Any, field: str, refusal: Refusal = RequestError) -> float:
    """A time to wait: more than 0 seconds, at most `MAX_SECONDS`."""
    seconds = as_number(value, field, refusal)
    if not 0 < seconds <= MAX_SECONDS:
        raise refusal(f"{field} must be more than 0 and at most {MAX_SECONDS:g} seconds, not {seconds:g}", field=field)
    return seconds


def as_choice(value: Any, choices: tuple[str, ...], field: str, refusal: Refusal = RequestError) -> Any:
    """One of a few words."""
    if isinstance(value, str) and value in choices:
        return plain_text(value)
    raise refusal(f"{field} must be one of {', '.join(choices)}, not {_shown(value)}", field=field)


def as_list(
    value: Any,
    field: str,
    what: str,
    max_length: int | None = None,
    refusal: Refusal = RequestError,
    *,
    takes_sets: bool = False,
) -> list[Any]:
    """The elements of any iterable that has an order, or of a set if order is nothing; of an endless one as many as
    show that it is over `max_length`. `what` describes it in refusals. No string, bytes or mapping: those are iterable
    by accident."""
    if isinstance(value, Set) and not takes_sets:
        raise refusal(f"{field} must have an order; a set has none", field=field)
    if isinstance(value, (str, bytes, bytearray, Mapping)) or not isinstance(value, Iterable):
        raise refusal(f"{field} must be {what}, not {_shown(value)}", field=field)
    try:
        found = list(value) if max_length is None else list(islice(value, max_length + 1))
    except TypeError:  # an array without axes calls itself iterable
        raise refusal(f"{field} must be {what}, not {_shown(value)}", field=field) from None
    if max_length is not None and len(found) > max_length:
        raise refusal(f"{field} must hold at most {max_length}", field=field)
    return found


def as_integer_array(value: Any, field: str) -> np.ndarray[Any, np.dtype[np.integer[Any]]]:
    """A flat integer array of any iterable of integers: list, range, generator, array, tensor (copied to the CPU)."""
    if hasattr(value, "detach"):  # a tensor of torch, wherever it lies
        try:
            value = value.detach().cpu().numpy()
        except (RuntimeError, TypeError):  # of a type that NumPy lacks, or without values
            raise RequestError(f"{field} must be a flat list of integers", field=field) from None
    if not isinstance(value, np.ndarray):
        values = as_list(value, field, "a list of integers")
        if any(not issubclass(kind, np.integer) for kind in set(map(type, values)) - {int}):
            values = [_element(each, field, position) for position, each in enumerate(values)]
        try:
            value = np.array(values, dtype=np.int64)
        except OverflowError:
            raise RequestError(f"{field} holds an integer of more than 64 bits", field=field) from None
    if value.ndim != 1 or value.dtype.kind not in "iu":
        raise RequestError(f"{field} must be a flat list of integers", field=field)
    array: np.ndarray[Any, np.dtype[np.integer[Any]]] = value
    return array


def meant_by(name: Any, known: Iterable[str]) -> str:
    """Which of the known names was meant by one that is none: what other engines' name for it is here, or the one that
    is spelled nearly so; "" if there is none."""
    if not isinstance(name, str) or len(name) > _MAX_NAME_LENGTH:  # comparing takes the square of it
        return ""
    names = list(known)
    if name in _NAMES_ELSEWHERE or name in _ONLY_ELSEWHERE:
        meant = _NAMES_ELSEWHERE.get(name, "")
        return meant if meant in names else ""
    return next(iter(difflib.get_close_matches(name, names, n=1)), "")


def hint(name: Any, known: Iterable[str]) -> str:
    """What to add to the refusal of a name that nobody knows: the one that was meant, if there is one."""
    names = list(known)
    meant = meant_by(name, names)
    opposite = _NAMES_ELSEWHERE.get(name, "").removeprefix("no_") if isinstance(name, str) else ""
    if not meant and opposite in names:
        return f"; {opposite}=False is"
    return f"; {meant} is" if meant else ""


def _element(value: Any, field: str, position: int) -> int:
    try:
        return as_integer(value, field)
    except RequestError:
        message = f"{field} must hold integers only; number {position} is {_shown(value)}"
        raise RequestError(message, field=field) from None


def _shown(value: Any) -> str:
    """A value as an error names it: itself where it is short, else its type."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        text = repr(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "a huge number"
        return text if len(text) <= 40 else type(value).__name__
    return type(value).__name__
