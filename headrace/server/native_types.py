"""The request of `/generate`, SGLang's dialect. Owns its keys and their checks, and its expansion into sequences."""

from __future__ import annotations

import functools
import operator
import uuid
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from headrace.engine import AsyncEngine, GenerateItem
from headrace.engine.bounds import check_body, check_call, check_routed, max_kept_each
from headrace.engine.fields import name_of, params_list, read_params
from headrace.engine.pacing import Turn
from headrace.server.errors import renamed
from headrace.server.keys import LACKING_GENERATE, LACKING_SAMPLING, refuse_lacking, warnings_for
from headrace.server.prompts import check_count, encode_text, encode_texts, warnings_about
from headrace.server.wire import convert
from headrace.text import run_sized
from headrace.types.errors import HeadraceError, RequestError
from headrace.types.plain_values import as_flag
from headrace.types.request import check_prompt_length
from headrace.types.sampling_params import LogprobMode, LogprobOptions, SamplingParams


class GenerateBody(msgspec.Struct, kw_only=True):
    """The body as JSON has it. Fields that may be one value or a list of them, one per prompt, are checked later."""

    text: str | list[str] | None = None
    add_special_tokens: bool = True
    input_ids: list[Any] | None = None
    sampling_params: dict[str, Any] | list[Any] | None = None
    rid: str | list[str] | None = None
    return_logprob: bool | list[bool] = False
    logprob_start_len: int | list[int] = -1
    top_logprobs_num: int | list[int] = 0
    token_ids_logprob: list[Any] | None = None
    return_text_in_logprobs: bool = False
    return_prompt_token_ids: bool = False
    return_routed_experts: bool | list[bool] = False
    routed_experts_start_len: int | list[int] = 0
    stream: bool = False
    incremental_streaming_output: bool | None = None
    extra_key: str | list[str] | None = None
    priority: int | list[int] = 0
    logprob_mode: LogprobMode | None = None
    prompt_logprob_mode: LogprobMode | None = None
    num_output_ids_in_prompt: int | list[int] = 0
    clip_to_context: bool = False
    return_errors: bool = False
    no_logs: bool = False
    log_metrics: bool = True


CUSTOM, RETURN_TOP_P = "custom_params", "return_top_p_token_ids"
"""How slime asks for the tokens that each one could have been: an object among the sampling parameters, and its key."""

_KNOWN = LACKING_GENERATE.union(GenerateBody.__struct_fields__)
_NUM_SAMPLES = operator.attrgetter("n")
_FIELDS = {
    "request_id": "rid",
    "logprob_start": "logprob_start_len",
    "top_logprobs": "top_logprobs_num",
    "logprob_token_ids": "token_ids_logprob",
    "seed": "sampling_params.sampling_seed",
    "routed_experts_start": "routed_experts_start_len",
    "return_kept_token_ids": f"sampling_params.{CUSTOM}.{RETURN_TOP_P}",
}


class GenerateCall(msgspec.Struct):
    """A checked request: its sequences in reply order, and how the reply is written."""

    items: list[GenerateItem]
    wants_logprobs: list[bool]
    is_list: bool
    is_stream: bool
    is_incremental: bool | None  # None: as the server streams
    writes_text: bool
    writes_prompt_ids: bool
    warnings: list[str]


class Draft:
    """A body checked as far as that needs neither the tokenizer nor the engine's loop: in any thread.

    Raises `RequestError` naming the field.
    """

    def __init__(self, engine: AsyncEngine, values: Mapping[str, Any]) -> None:
        if not LACKING_GENERATE.isdisjoint(values):
            refuse_lacking(values, LACKING_GENERATE)
        self.body = body = convert(values, GenerateBody)
        self.sources, self.is_batch, self.field = _sources(body)
        check_count(engine, len(self.sources), self.field)
        self.fields = [f"{self.field}[{i}]" for i in range(len(self.sources))] if self.is_batch else [self.field]
        read = functools.partial(read_native_params, engine.resolved.sampling_defaults)
        self.refusals: dict[int, RequestError] | None = {} if body.return_errors else None
        self.params = params_list(body.sampling_params, len(self.sources), self.refusals, read)
        counts = list(map(_NUM_SAMPLES, self.params))
        num_sequences = sum(counts)
        if num_sequences > len(counts):
            check_count(engine, num_sequences, self.field)
        if len(self.params) > 1:
            check_call(self.params)
        self.wants_logprobs = _per_prompt(body.return_logprob, len(self.sources), "return_logprob")
        wants_kept = _wants_kept(body.sampling_params, len(self.params))
        max_kept = [max_kept_each(num_sequences) if wanted else 0 for wanted in wants_kept]
        self.items = _items(engine, body, self.params, self.wants_logprobs, max_kept, self.refusals)
        self.warnings = [] if values.keys() <= _KNOWN else warnings_for(values, _KNOWN)
        self.is_list = self.is_batch or num_sequences > 1
        self.names = [""] * num_sequences  # the engine makes them
        if body.rid is not None and body.rid != "":
            self.names = _names(body.rid, counts, self.is_list, self.refusals)
        self.prompts: list[Any] = []
        """Arrays of ids; None for one that is refused. Texts are encoded later."""
        for position, ids in enumerate(self.sources if body.text is None else ()):
            try:
                self.prompts.append(shared_ids(engine, ids, self.fields[position]))
            except RequestError as error:
                if self.refusals is None:
                    raise
                self.refusals.setdefault(position, error)
                self.prompts.append(None)


async def read_call(engine: AsyncEngine, draft: Draft) -> GenerateCall:
    """Check the rest of a body. Raises `RequestError` naming the field; nothing has been submitted then."""
    body, is_list, warnings = draft.body, draft.is_list, draft.warnings
    if body.text is not None:
        await _encode(engine, draft)
        if body.add_special_tokens:
            warnings += warnings_about(engine, dict(zip(draft.fields, draft.prompts, strict=True)))
    items, wants_logprobs, turn = list[GenerateItem](), list[bool](), Turn()
    for position, item in enumerate(draft.items):
        item = msgspec.structs.replace(item, input_ids=draft.prompts[position], request_id=draft.names[len(items)])
        first = _prepared(engine, item, is_list, draft.refusals)
        for index in range(item.params.n):
            await turn.give_way()
            items.append(msgspec.structs.replace(first, index=index, request_id=draft.names[len(items)]))
            wants_logprobs.append(draft.wants_logprobs[position])
    if body.return_prompt_token_ids or any(wants_logprobs):  # else there is nothing to count
        firsts = [item for item in items if item.index == 0 and item.packed is not None]
        prompts_asked = ((item.logprobs, len(item.packed or b"") // 4, item.params) for item in firsts)
        repeats_ids_for = "return_prompt_token_ids" if body.return_prompt_token_ids else ""
        try:
            await run_sized(len(firsts), lambda: check_body(prompts_asked, repeats_ids_for))
        except RequestError as error:
            raise in_dialect(error, 0, is_list) from None
    if any(item.logprobs.routed_start is not None for item in items):
        firsts = [item for item in items if item.index == 0 and item.packed is not None]
        asked = ((item.logprobs, len(item.packed or b"") // 4, item.params) for item in firsts)
        check_routed(asked, engine.resolved.model.experts_shape)
    return GenerateCall(
        items=items,
        wants_logprobs=wants_logprobs,
        is_list=is_list,
        is_stream=body.stream,
        is_incremental=body.incremental_streaming_output,
        writes_text=body.return_text_in_logprobs,
        writes_prompt_ids=body.return_prompt_token_ids,
        warnings=warnings,
    )


def in_dialect(error: HeadraceError, position: int, is_list: bool) -> HeadraceError:
    """The engine's complaint about a sequence, naming the fields of this dialect."""
    prompt = f"input_ids[{position}]" if is_list else "input_ids"
    return renamed(error, {**_FIELDS, "input_ids": prompt})


def _items(
    engine: AsyncEngine,
    body: GenerateBody,
    params: list[SamplingParams],
    wants_logprobs: list[bool],
    max_kept: list[int],
    refusals: dict[int, RequestError] | None,
) -> list[GenerateItem]:
    """The first sample of each prompt, without the prompt and its name, from values given once or per prompt."""
    priorities = _per_prompt(body.priority, len(params), "priority")
    extra_keys = _per_prompt(body.extra_key, len(params), "extra_key")
    num_output = _per_prompt(body.num_output_ids_in_prompt, len(params), "num_output_ids_in_prompt")
    starts = _per_prompt(body.logprob_start_len, len(params), "logprob_start_len")
    tops = _per_prompt(body.top_logprobs_num, len(params), "top_logprobs_num")
    if any(num_output) and body.text is not None:
        message = "num_output_ids_in_prompt counts token ids: give the prompt as input_ids"
        raise RequestError(message, field="num_output_ids_in_prompt")
    asked = _asked_ids(body.token_ids_logprob, len(params)) if body.token_ids_logprob else [()] * len(params)
    config, items = engine.config, list[GenerateItem]()
    prompt_mode = body.prompt_logprob_mode or config.prompt_logprob_mode
    routed = _routed_starts(body, len(params))
    for position, (most, *each) in enumerate(zip(max_kept, wants_logprobs, starts, tops, asked, strict=True)):
        # Who asks for the tokens that were left compares with a distribution over these.
        default: LogprobMode = "sampled" if most else config.logprob_mode
        mode = body.logprob_mode or default
        plain = LogprobOptions(mode, prompt_mode, max_kept=most, routed_start=routed[position])
        logprobs = plain
        try:
            logprobs = plain if each == _NO_LOGPROBS else _logprob_options(plain, *each)
        except RequestError as error:
            if refusals is None:
                raise
            refusals.setdefault(position, error)
        item = GenerateItem(
            params=params[position],
            logprobs=logprobs,
            prompt_index=position,
            priority=priorities[position],
            extra_key=extra_keys[position] or "",
            stream=body.stream,
            num_output_ids_in_prompt=num_output[position],
            clip_to_context=body.clip_to_context,
            return_errors=body.return_errors,
        )
        items.append(item)
    return items


def _routed_starts(body: GenerateBody, num_prompts: int) -> list[int | None]:
    """From which position on each prompt's experts are asked for; None: they are not."""
    asked = _per_prompt(body.return_routed_experts, num_prompts, "return_routed_experts")
    starts = _per_prompt(body.routed_experts_start_len, num_prompts, "routed_experts_start_len")
    return [start if wanted else None for wanted, start in zip(asked, starts, strict=True)]


_NO_LOGPROBS = [False, -1, 0, ()]


def _logprob_options(
    plain: LogprobOptions, is_wanted: bool, start: int, num_top: int, asked: tuple[int, ...]
) -> LogprobOptions:
    if start < -1:
        raise RequestError("logprob_start_len must be -1 or a prompt position", field="logprob_start_len")
    if num_top < 0:
        raise RequestError("top_logprobs_num must not be negative", field="top_logprobs_num")
    if not is_wanted:
        return plain
    start_or_none = None if start < 0 else start
    found: LogprobOptions = replace(plain, prompt_start=start_or_none, num_top=num_top, token_ids=asked)
    return found


def _sources(body: GenerateBody) -> tuple[list[Any], bool, str]:
    """The prompts as they came, texts or lists of ids; whether they came as a batch; and their key."""
    if (body.text is None) == (body.input_ids is None):
        problem = "neither is given" if body.text is None else "both are given"
        raise RequestError(f"input_ids or text, exactly one of them, is needed; {problem}", field="input_ids")
    field, given = ("input_ids", body.input_ids) if body.text is None else ("text", body.text)
    if given == []:
        raise RequestError(f"{field} is empty", field=field)
    if isinstance(given, list) and (field == "text" or isinstance(given[0], list)):
        return given, True, field
    return [given], False, field


def _prepared(
    engine: AsyncEngine, item: GenerateItem, is_list: bool, refusals: dict[int, RequestError] | None
) -> GenerateItem:
    """The item as the engine takes it; a refused one, if refusals are to be returned, as one that fails at once."""
    refusal: HeadraceError | None = refusals.get(item.prompt_index) if refusals else None
    if refusal is None:
        try:
            return engine.prepare(item)
        except RequestError as error:
            refusal = in_dialect(error, item.prompt_index, is_list)
    if refusals is None:
        raise refusal
    return msgspec.structs.replace(item, input_ids=None, refusal=refusal.info())


async def _encode(engine: AsyncEngine, draft: Draft) -> None:
    """Texts become prompts; one that cannot is among the refusals where these are to be returned."""
    special, named = draft.body.add_special_tokens, dict(zip(draft.fields, draft.sources, strict=True))
    if draft.refusals is None:
        draft.prompts = await shared_rows(engine, await encode_texts(engine, named, add_special_tokens=special))
        return
    turn = Turn()
    for position, (name, text) in enumerate(named.items()):
        await turn.give_way()
        try:
            ids = await encode_text(engine, text, name, add_special_tokens=special)
            draft.prompts.append(shared_ids(engine, ids, name))
        except RequestError as error:
            draft.refusals.setdefault(position, error)
            draft.prompts.append(None)


async def shared_rows(engine: AsyncEngine, rows: Mapping[str, Any]) -> list[Any]:
    """As `shared_ids`, of many by the fields they came from."""
    size = sum(1 + len(ids) for ids in rows.values() if isinstance(ids, list))
    return await run_sized(size, lambda: [shared_ids(engine, ids, field) for field, ids in rows.items()])


def shared_ids(engine: AsyncEngine, ids: Any, field: str) -> Any:
    """Ids as an array that all samples of a prompt may share; the engine checks their range."""
    if isinstance(ids, list):  # before all of them are looked at
        check_prompt_length(len(ids), engine.resolved.context_length, field)
    if not isinstance(ids, list) or set(map(type, ids)) != {int}:
        raise RequestError(f"{field} must be a list of integers", field=field)
    try:
        return np.array(ids, dtype=np.int64)
    except OverflowError:
        raise RequestError(f"{field} holds a number that is no token id", field=field) from None


def read_native_params(defaults: Mapping[str, Any], values: Any, field: str) -> SamplingParams:
    """Sampling parameters in the dialect's spelling. Raises `RequestError` naming the parameter."""
    if isinstance(values, dict) and CUSTOM in values:
        _check_custom(values[CUSTOM], f"{field}.{CUSTOM}")
        values = {key: value for key, value in values.items() if key != CUSTOM}
    if isinstance(values, dict) and not LACKING_SAMPLING.isdisjoint(values):
        if values.get("stream_interval") == 1:
            values = {**values, "stream_interval": None}
        refuse_lacking(values, LACKING_SAMPLING, field)
        values = {key: value for key, value in values.items() if key not in LACKING_SAMPLING}
    return read_params(values, field, defaults)


def _check_custom(custom: Any, field: str) -> None:
    if custom is None:
        return
    if not isinstance(custom, dict):
        raise RequestError(f"{field} must be an object", field=field)
    refuse_lacking(custom, custom.keys() - {RETURN_TOP_P}, field)
    if custom.get(RETURN_TOP_P) is not None:
        as_flag(custom[RETURN_TOP_P], f"{field}.{RETURN_TOP_P}")


def _wants_kept(sampling_params: Any, num_prompts: int) -> list[bool]:
    """Which prompts ask for the tokens that each one could have been; parameters that are refused ask for nothing."""
    given = sampling_params if isinstance(sampling_params, list) else [sampling_params] * num_prompts
    asked = [each.get(CUSTOM) if isinstance(each, dict) else None for each in given]
    return [isinstance(each, dict) and each.get(RETURN_TOP_P) is True for each in asked]


def _per_prompt(value: Any, num_prompts: int, field: str) -> list[Any]:
    if not isinstance(value, list):
        return [value] * num_prompts
    if len(value) != num_prompts:
        raise RequestError(f"{field} holds {len(value)} values for {num_prompts} prompts", field=field)
    return value


def _asked_ids(given: list[Any], num_prompts: int) -> list[tuple[int, ...]]:
    """`token_ids_logprob` is a list of ids for all prompts, or a list of such lists."""
    if isinstance(given[0], list) or given[0] is None:
        rows = _per_prompt(given, num_prompts, "token_ids_logprob")
        return [_id_row(row or [], f"token_ids_logprob[{i}]") for i, row in enumerate(rows)]
    return [_id_row(given, "token_ids_logprob")] * num_prompts


def _id_row(row: Any, field: str) -> tuple[int, ...]:
    if not isinstance(row, list) or not all(type(token) is int for token in row):
        raise RequestError(f"{field} must be a list of integers", field=field)
    return tuple(row)


def _own(name: str, position: int, refusals: dict[int, RequestError] | None) -> str:
    """What the names of one prompt's samples begin with. One too long is refused, with its prompt where that may be."""
    try:
        return name_of(name, "rid")
    except RequestError as error:
        if refusals is None:
            raise
        refusals.setdefault(position, error)
        return uuid.uuid4().hex


def _names(
    rid: str | list[str], counts: list[int], is_list: bool, refusals: dict[int, RequestError] | None
) -> list[str]:
    """A name per sequence. One name for many becomes name_0, name_1, ...; so does each of a list when n > 1."""
    num_sequences = sum(counts)
    if isinstance(rid, str):
        rid = name_of(rid, "rid")
        return [f"{rid}_{number}" for number in range(num_sequences)] if is_list else [rid]
    if len(rid) != len(counts) or len(set(rid)) != len(rid) or not all(rid):
        raise RequestError(f"rid must hold {len(counts)} different names, one per prompt", field="rid")
    checked = [_own(name, position, refusals) for position, name in enumerate(rid)]
    names = [
        name if count == 1 else f"{name}_{index}"
        for name, count in zip(checked, counts, strict=True)
        for index in range(count)
    ]
    if len(set(names)) != num_sequences:
        raise RequestError("rid holds a name that is also the name of another prompt's sample", field="rid")
    return names
