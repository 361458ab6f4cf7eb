"""The fields of a request, one check each. Owns how callers may spell them; every error names the field."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from headrace.types.errors import RequestError
from headrace.types.sampling_params import LogprobMode, SamplingParams

MAX_NAME_LENGTH = 1024

Prompts = str | Sequence[str] | None
InputIds = Sequence[int] | Sequence[Sequence[int]] | None
Sampling = SamplingParams | Mapping[str, Any] | Sequence[SamplingParams | Mapping[str, Any]] | None


def sources(prompts: Prompts, input_ids: InputIds) -> tuple[str, list[Any]]:
    """The field that was used and its prompts as a list: texts, or sequences of ids."""
    if (prompts is None) == (input_ids is None):
        field = "prompts" if prompts is not None else "input_ids"
        raise RequestError("exactly one of prompts and input_ids must be given", field=field)
    if isinstance(prompts, str):
        return "prompts", [prompts]
    if prompts is not None:
        if not isinstance(prompts, (list, tuple)) or not all(isinstance(text, str) for text in prompts):
            raise RequestError("prompts must be a string or a list of strings", field="prompts")
        return "prompts", _nonempty(list(prompts), "prompts")
    if isinstance(input_ids, (str, bytes)) or not hasattr(input_ids, "__len__"):
        raise RequestError("input_ids must be a list of token ids or a list of such lists", field="input_ids")
    rows = list(input_ids) if input_ids is not None else []
    if rows and all(hasattr(row, "__len__") and getattr(row, "shape", None) != () for row in rows):
        return "input_ids", rows
    return "input_ids", [_nonempty(rows, "input_ids") if isinstance(input_ids, (list, tuple)) else input_ids]


def _nonempty(values: list[Any], field: str) -> list[Any]:
    if not values:
        raise RequestError(f"{field} is empty", field=field)
    return values


def params_list(sampling_params: Sampling, num_prompts: int) -> list[SamplingParams]:
    """One `SamplingParams` per prompt."""
    if not isinstance(sampling_params, (list, tuple)):
        return [_params(sampling_params, "sampling_params")] * num_prompts
    if len(sampling_params) != num_prompts:
        raise RequestError(f"{len(sampling_params)} sampling_params for {num_prompts} prompts", field="sampling_params")
    return [_params(each, f"sampling_params[{i}]") for i, each in enumerate(sampling_params)]


def _params(value: Any, field: str) -> SamplingParams:
    if isinstance(value, SamplingParams):
        return value
    return SamplingParams() if value is None else SamplingParams.from_dict(value, field=field)


def request_ids(names: Any, num_prompts: int) -> list[str]:
    """One name per prompt."""
    if names is None:
        return [uuid.uuid4().hex for _ in range(num_prompts)]
    if isinstance(names, str):
        check_name(names, "request_id")
        if not names:
            raise RequestError("request_id is empty", field="request_id")
        return [names] if num_prompts == 1 else [f"{names}_{i}" for i in range(num_prompts)]
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
        raise RequestError("request_id must be a string or a list of strings", field="request_id")
    if len(names) != num_prompts or len(set(names)) != num_prompts:
        raise RequestError(f"request_id must hold {num_prompts} different names, one per prompt", field="request_id")
    return list(names)


def check_integer(value: Any, field: str, low: int, high: int) -> None:
    """An integer, not a bool, within bounds."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{field} must be an integer", field=field)
    if not low <= value <= high:
        raise RequestError(f"{field} must be in [{low}, {high}]", field=field)


def check_name(value: Any, field: str) -> None:
    """A plain string of bounded length, of characters that can be encoded."""
    if type(value) is not str or len(value) > MAX_NAME_LENGTH:
        raise RequestError(f"{field} must be a plain string of at most {MAX_NAME_LENGTH} characters", field=field)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{field} is no text: {error}", field=field) from None


def check_mode(value: Any, field: str) -> None:
    """A meaning of log-probabilities."""
    if value not in get_args(LogprobMode):
        raise RequestError(f"{field} must be one of {', '.join(get_args(LogprobMode))}", field=field)


def id_tuple(ids: Any, field: str) -> tuple[int, ...]:
    """A short list of token ids, None being an empty one."""
    if ids is None:
        return ()
    array = id_array(ids, field)
    return tuple(array.tolist())


def id_array(source: Any, field: str) -> npt.NDArray[Any]:
    """Token ids as a 1-D integer array. Lists may hold plain ints only: a bool or a float is an error, not a 1."""
    if isinstance(source, (list, tuple)):
        wrong = {type(token) for token in source} - {int}
        if any(not issubclass(kind, np.integer) for kind in wrong):
            raise RequestError(f"{field} must hold integers only", field=field)
    if isinstance(source, (str, bytes)):
        raise RequestError(f"{field} must be a list of token ids", field=field)
    try:
        array: npt.NDArray[Any] = np.asarray(source) if len(source) else np.empty(0, dtype=np.int64)
    except (OverflowError, ValueError, TypeError):
        raise RequestError(f"{field} must be a list of token ids", field=field) from None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise RequestError(f"{field} must be a flat list of token ids", field=field)
    return array
