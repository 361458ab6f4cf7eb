"""Requests of the OpenAI routes. Owns their keys, and how they become sampling parameters and sequences."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import msgspec

from headrace.server.errors import FieldNames
from headrace.server.keys import LACKING_OPENAI, refuse_lacking, warnings_for
from headrace.server.state import ServerState
from headrace.server.wire import convert
from headrace.types.errors import NotFoundError, RequestError
from headrace.types.sampling_params import LogprobOptions, SamplingParams

_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
LEAST_TOP_P = 1e-9


class StreamOptions(msgspec.Struct):
    """`include_usage` adds a last chunk with the token counts, `continuous_usage_stats` to each those of its choice."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class OpenAiBody(msgspec.Struct, kw_only=True):
    """What both generation routes take. Sampling keys are checked by `SamplingParams`, hence Any. `prompt_logprobs` is
    vLLM's: each prompt token's log-probability, with so many of the most probable at its position."""

    model: str = ""
    n: Any = 1
    temperature: Any = None
    top_p: Any = None
    top_k: Any = None
    min_p: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    repetition_penalty: Any = None
    seed: Any = None
    stop: Any = None
    stop_token_ids: Any = None
    logit_bias: Any = None
    ignore_eos: Any = None
    skip_special_tokens: Any = None
    no_stop_trim: Any = None
    spaces_between_special_tokens: Any = None
    include_stop_str_in_output: bool = False
    max_tokens: Any = None
    min_tokens: Any = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    rid: str = ""
    request_id: str = ""
    extra_key: str = ""
    cache_salt: str = ""
    priority: int = 0
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    return_meta_info: bool = False
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    clip_to_context: bool = False


_SAME_NAMES = tuple(name for name in OpenAiBody.__struct_fields__ if name in SamplingParams.__struct_fields__)


class CompletionBody(OpenAiBody, kw_only=True):
    """POST /v1/completions"""

    prompt: Any = None
    add_special_tokens: bool = True
    logprobs: int | None = None
    num_output_ids_in_prompt: int | list[int] = 0


class ChatBody(OpenAiBody, kw_only=True):
    """POST /v1/chat/completions"""

    messages: Any = None
    max_completion_tokens: Any = None
    logprobs: bool = False
    top_logprobs: int = 0
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: Any = None
    add_generation_prompt: bool | None = None  # None: unless the final message is continued
    continue_final_message: bool = False
    add_special_tokens: bool = False
    reasoning_effort: str | None = None


Body = TypeVar("Body", bound=OpenAiBody)


def read_openai(values: Mapping[str, Any], kind: type[Body]) -> tuple[Body, list[str]]:
    """The checked body and warnings about keys nobody knows."""
    _refuse(values)
    return convert(values, kind), warnings_for(values, {*kind.__struct_fields__, *LACKING_OPENAI, *_IGNORED})


def check_model(state: ServerState, name: str) -> str:
    """The name to answer with. Raises `NotFoundError` for a model that is not the one served."""
    if name in ("", "default", state.model_name, state.engine.config.model):
        return name if name not in ("", "default") else state.model_name
    raise NotFoundError(f"model {name[:200]!r} is not served here; {state.model_name!r} is", field="model")


def sampling_params(state: ServerState, body: OpenAiBody, max_new_tokens: Any) -> SamplingParams:
    """Sampling parameters of a body. Errors name the dialect's keys once inside `openai_errors`.

    OpenAI's `seed` is any signed 64-bit integer, of which -1 is none, as in vLLM. A `top_p` of 0 leaves the most
    probable token, like the least `top_p` there is.
    """
    values = {name: getattr(body, name) for name in _SAME_NAMES}
    values["seed"] = _unsigned(body.seed)
    if type(body.top_p) in (int, float) and body.top_p == 0:
        values["top_p"] = LEAST_TOP_P
    if body.include_stop_str_in_output:
        values["no_stop_trim"] = True
    values |= {"max_new_tokens": max_new_tokens, "min_new_tokens": body.min_tokens}
    return SamplingParams.from_dict(values, defaults=state.engine.resolved.sampling_defaults)


def prompt_bound(body: OpenAiBody, max_length: int, max_tokens: Any) -> int | None:
    """How many of its last tokens `truncate_prompt_tokens` leaves of a prompt, if given; -1 leaves room for the reply.

    `max_tokens` is what the reply may have, checked later; a reply without a bound is left one token.
    """
    field, bound = "truncate_prompt_tokens", body.truncate_prompt_tokens
    if bound is not None and bound < -1:
        raise RequestError(f"{field} must be -1 or a number of tokens", field=field)
    if bound == -1:
        return max(1, max_length - (max_tokens if type(max_tokens) is int and max_tokens > 0 else 1))
    return bound or None


def openai_errors(body: OpenAiBody, max_tokens_key: str, top_logprobs_key: str) -> AbstractContextManager[None]:
    """Inside, errors name fields as the engine does; outside, as these routes do."""
    num_top = int(getattr(body, top_logprobs_key) or 0)
    is_of_prompt = body.prompt_logprobs is not None and body.prompt_logprobs > num_top
    return FieldNames(
        {
            "sampling_params": "",
            "sampling_params.max_new_tokens": max_tokens_key,
            "sampling_params.min_new_tokens": "min_tokens",
            "top_logprobs": "prompt_logprobs" if is_of_prompt else top_logprobs_key,
            "logprob_start": "prompt_logprobs",
            "request_id": "rid",
        }
    )


def logprob_options(state: ServerState, body: OpenAiBody, num_top: int, field: str) -> LogprobOptions:
    """What the engine is asked for: it has one number of most probable tokens, for prompt and output."""
    of_prompt = body.prompt_logprobs
    for name, value in ((field, num_top), ("prompt_logprobs", of_prompt or 0)):
        if value < 0:
            raise RequestError(f"{name} must not be negative", field=name)
    if of_prompt is not None and body.stream:
        raise RequestError("prompt_logprobs are in whole replies only: leave stream out", field="prompt_logprobs")
    config, start = state.engine.config, None if of_prompt is None else 0
    return LogprobOptions(config.logprob_mode, config.prompt_logprob_mode, start, max(num_top, of_prompt or 0))


def offers_tools(body: ChatBody) -> bool:
    """Choices that force a call need a grammar, which this engine lacks."""
    if body.tool_choice not in (None, "auto", "none"):
        raise RequestError("tool_choice must be 'none' or 'auto'; a forced call is not supported", field="tool_choice")
    return bool(body.tool_choice != "none")


def _unsigned(seed: Any) -> Any:
    """The unsigned 64-bit number that a negative seed is the two's complement of; None for -1."""
    if type(seed) is not int or not -(1 << 63) <= seed < 0:
        return seed
    return None if seed == -1 else seed + (1 << 64)


def _refuse(values: Mapping[str, Any]) -> None:
    response_format = values.get("response_format")
    if isinstance(response_format, dict) and response_format.get("type") == "text":
        values = {**values, "response_format": None}
    if values.get("best_of") in (1, values.get("n", 1)):
        values = {**values, "best_of": None}
    key, salt = values.get("extra_key"), values.get("cache_salt")
    if key and salt and key != salt:
        raise RequestError("cache_salt is another name of extra_key: give one of them", field="cache_salt")
    refuse_lacking(values, LACKING_OPENAI)
