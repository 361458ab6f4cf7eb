"""The fields of a request, one check each. Owns how callers may spell them; every error names the field."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from headrace.types.errors import RequestError
from headrace.types.plain_values import as_integer, as_integer_array, as_list, plain_text
from headrace.types.sampling_params import SamplingParams

MAX_NAME_LENGTH = 1024
_CHARACTERS_PER_PROMPT = 128  # whose encoding takes as long as all else that is done about a prompt

Prompts = str | Sequence[str] | None
InputIds = Sequence[int] | Sequence[Sequence[int]] | None
Sampling = SamplingParams | Mapping[str, Any] | Sequence[SamplingParams | Mapping[str, Any]] | None


def sources(prompts: Prompts, input_ids: InputIds) -> tuple[str, list[Any]]:
    """The field that was used and its prompts as a list: texts, or sequences of ids."""
    for field, value in (("prompts", prompts), ("input_ids", input_ids)):
        first = value[0] if isinstance(value, (list, tuple)) and value else value
        if _is_params(first):
            raise RequestError(f"{field} must be no sampling parameters: give them as sampling_params", field=field)
    if (prompts is None) == (input_ids is None):
        field = "prompts" if prompts is not None else "input_ids"
        raise RequestError("exactly one of prompts and input_ids must be given", field=field)
    if prompts is None:
        return "input_ids", _id_rows(input_ids)
    what = "a string or a list of strings"
    texts = [prompts] if isinstance(prompts, str) else as_list(prompts, "prompts", what)
    if texts and not any(isinstance(text, str) for text in texts):  # of single ones each prompt is told
        raise RequestError(f"prompts must be {what}", field="prompts")
    return "prompts", _nonempty(texts, "prompts")


def conversations(messages: Any) -> list[Any]:
    """One conversation, or many, as a list of conversations, each as it was given."""
    listed = as_list(messages, "messages", "a list of messages, or a list of such lists")
    is_many = any(isinstance(each, (list, tuple)) for each in listed)
    return listed if is_many else [_nonempty(listed, "messages")]


def _is_params(value: Any) -> bool:
    is_like = isinstance(value, Mapping) and bool(value) and set(value) <= set(SamplingParams.__struct_fields__)
    return is_like or isinstance(value, SamplingParams)


def _id_rows(input_ids: Any) -> list[Any]:
    """One prompt's ids, or many prompts', each as it was given. An array or tensor has a prompt per row."""
    if hasattr(input_ids, "shape"):
        return _nonempty(list(input_ids), "input_ids") if len(input_ids.shape) == 2 else [input_ids]
    rows = as_list(input_ids, "input_ids", "a list of token ids or a list of such lists")
    return rows if any(map(_is_row, rows)) else [_nonempty(rows, "input_ids")]


def _is_row(value: Any) -> bool:
    is_list = isinstance(value, Iterable) and not isinstance(value, (str, bytes))
    return is_list and getattr(value, "shape", None) != ()


def _nonempty(values: list[Any], field: str) -> list[Any]:
    if not values:
        raise RequestError(f"{field} is empty", field=field)
    return values


def read_params(value: Any, field: str, defaults: Mapping[str, Any] | None = None) -> SamplingParams:
    """Sampling parameters as a caller may give them; `defaults` are those of parameters that a dict does not have. A
    `SamplingParams` has all of them."""
    if isinstance(value, SamplingParams):
        return value
    return SamplingParams.from_dict({} if value is None else value, field=field, defaults=defaults)


def params_list(
    sampling_params: Sampling,
    num_prompts: int,
    refusals: dict[int, RequestError] | None = None,
    read: Callable[[Any, str], SamplingParams] = read_params,
) -> list[SamplingParams]:
    """One `SamplingParams` per prompt; `read` makes it of a value and its name. Of a list, errors go into `refusals` by
    position if it is given."""
    if not isinstance(sampling_params, (list, tuple)):
        return [read(sampling_params, "sampling_params")] * num_prompts
    if len(sampling_params) != num_prompts:
        raise RequestError(f"{len(sampling_params)} sampling_params for {num_prompts} prompts", field="sampling_params")
    found = []
    for position, each in enumerate(sampling_params):
        try:
            found.append(read(each, f"sampling_params[{position}]"))
        except RequestError as error:
            if refusals is None:
                raise
            refusals[position] = error
            found.append(SamplingParams())
    return found


def scoring(params: list[SamplingParams]) -> list[SamplingParams]:
    """The same parameters, generating nothing; prompts that shared one object share one again."""
    asked = {id(each): each for each in params}
    nothing = {"max_new_tokens": 0, "min_new_tokens": 0, "n": 1, "stop": ()}
    made = {key: msgspec.structs.replace(each, **nothing) for key, each in asked.items()}
    return [made[id(each)] for each in params]


def request_ids(names: Any, num_prompts: int) -> list[str]:
    if names is None:
        return [uuid.uuid4().hex for _ in range(num_prompts)]
    if isinstance(names, str):
        names = name_of(names, "request_id")
        if not names:
            raise RequestError("request_id is empty", field="request_id")
        return [names] if num_prompts == 1 else [f"{names}_{i}" for i in range(num_prompts)]
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
        raise RequestError("request_id must be a string or a list of strings", field="request_id")
    if len(names) != num_prompts or len(set(names)) != num_prompts:
        raise RequestError(f"request_id must hold {num_prompts} different names, one per prompt", field="request_id")
    return list(map(plain_text, names))


def integer_within(value: Any, field: str, low: int, high: int) -> int:
    integer = as_integer(value, field)
    if not low <= integer <= high:
        raise RequestError(f"{field} must be in [{low}, {high}]", field=field)
    return integer


def per_prompt(value: Any, num_prompts: int, field: str) -> list[int]:
    """An integer for each prompt, from one for all or a list with one each."""
    if not isinstance(value, Iterable) or getattr(value, "shape", None) == ():
        return [as_integer(value, field)] * num_prompts
    values = as_list(value, field, "an integer, or a list with one per prompt", num_prompts)
    if len(values) != num_prompts:
        raise RequestError(f"{field} holds {len(values)} values for {num_prompts} prompts", field=field)
    return [as_integer(each, f"{field}[{i}]") for i, each in enumerate(values)]


def name_of(value: Any, field: str) -> str:
    """A plain string of bounded length, of characters that can be encoded."""
    name = value if type(value) is str else plain_text(value)
    if not isinstance(name, str) or len(name) > MAX_NAME_LENGTH:
        raise RequestError(f"{field} must be a string of at most {MAX_NAME_LENGTH} characters", field=field)
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{field} is no text: {error}", field=field) from None
    return name


def id_tuple(ids: Any, field: str, max_length: int) -> tuple[int, ...]:
    """A short list of token ids, None being an empty one."""
    if ids is None:
        return ()
    listed = as_list(ids, field, "a list of token ids", max_length, takes_sets=True)
    return tuple(as_integer_array(listed, field).tolist())


def reading_cost(given: Any) -> int:
    """About what prompts cost to be read, in characters of text. One prompt's ids cost little."""
    if isinstance(given, str):
        return len(given)
    is_list = isinstance(given, (list, tuple)) and not isinstance(next(iter(given), 0), int)
    if not is_list and getattr(given, "ndim", 1) != 2:
        return 0
    return _CHARACTERS_PER_PROMPT * len(given) + sum(len(text) for text in given if isinstance(text, str))
