"""From what a caller says to what the core is asked. Owns the checks of every request field and the expansion of
batches and `n` into single sequences; knows nothing of links, streams or tensors.

A request that passes here can only be refused by the core for lack of room. Errors name the field as the caller spells
it (`input_ids[3]`, `sampling_params.top_p`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict, get_args

import msgspec
import numpy as np

from headrace.config import ResolvedConfig
from headrace.engine.bounds import (
    MAX_KEPT_IDS,
    check_call,
    check_kept,
    check_logprob_values,
    check_routed,
    max_kept_each,
    num_logprob_values,
)
from headrace.engine.fields import (
    InputIds,
    Prompts,
    Sampling,
    id_tuple,
    integer_within,
    name_of,
    params_list,
    per_prompt,
    read_params,
    request_ids,
    scoring,
    sources,
)
from headrace.engine.seeds import SeedSource, sample_seed
from headrace.scheduler.limits import MAX_PRIORITY
from headrace.text import Tokenizer, begins_twice, encode_bounded
from headrace.types.errors import ErrorInfo, RequestError
from headrace.types.generation import Generation
from headrace.types.plain_values import as_choice, as_flag, as_integer, as_integer_array, hint, meant_by
from headrace.types.request import Request, TokenSampling, check_prompt_length, pack_ids
from headrace.types.sampling_params import (
    MAX_LOGPROB_TOKEN_IDS,
    MAX_TOP_LOGPROBS,
    LogprobMode,
    LogprobOptions,
    SamplingParams,
)

logger = logging.getLogger(__name__)

_MODES = get_args(LogprobMode)
_UNASKED = "return_logprob", "return_logprobs", "return_text_in_logprobs", "logprob", "logprobs"
_MEANT = {
    **dict.fromkeys(_UNASKED, "; every sample has the logprobs of its tokens, unasked"),
    "prompt_token_ids": "; input_ids is",
}
"""What is told of names elsewhere for what is no option here."""


class GenerateOptions(TypedDict, total=False):
    """Keywords of `generate`, `stream` and `score`.

    request_id               a name, or one per prompt (one name for many prompts becomes name_0, name_1, ...); the
                             samples of one prompt share it. Must not be in use by a live request. None: a fresh one
    add_special_tokens       add to texts what the tokenizer adds, such as a beginning of sequence (True)
    priority                 higher runs first (0)
    extra_key                separates prefix-cache entries ("")
    logprob_mode             meaning of output log-probabilities (None: the engine's default)
    prompt_logprob_mode      meaning of prompt log-probabilities (None: the engine's default)
    return_prompt_logprobs   score the prompt too (False; always on in `score`)
    logprob_start            first prompt position to score (0)
    top_logprobs             how many most probable tokens to report per position (0)
    logprob_token_ids        tokens whose log-probability to report per position (none)
    return_kept_token_ids    report which tokens each generated one could have been: those that bias, top-k, top-p and
                             min-p left; one of the latter three has to be given, or temperature 0 (False). At most
                             2^22 ids over a sample, and 2^26 shared equally by a call's samples: a sample with more
                             ends with an error. With `logprob_mode` "sampled" log-probabilities are over these tokens
    return_routed_experts    report which experts each token was given to, in every layer (False). Needs an engine that
                             was started with `keep_routed_experts`
    routed_experts_start     the position from which on (0)
    num_output_ids_in_prompt how many of the last `input_ids` are output already, of a generation that this one
                             resumes: one number, or one per prompt (0). Penalties count them as output, stop strings
                             may begin in them, and the text begins behind theirs. With the first reply's seed, and
                             `max_new_tokens` and `min_new_tokens` less by as many, it goes on as the first would have
    clip_to_context          cut `max_new_tokens` to what the context has room for, instead of refusing (False)
    return_errors            an error of one prompt or sample is its own `Generation` with finish reason "error" and
                             `error`, and the others go on (False: the call raises it, and they are dropped)
    progress                 show on a terminal how many sequences have ended, where there are many and they take a
                             while (True). Only `generate` and `score` of an engine in this process do
    """

    request_id: str | Sequence[str] | None
    add_special_tokens: bool
    priority: int
    extra_key: str
    logprob_mode: LogprobMode | None
    prompt_logprob_mode: LogprobMode | None
    return_prompt_logprobs: bool
    logprob_start: int
    top_logprobs: int
    logprob_token_ids: Sequence[int] | None
    return_kept_token_ids: bool
    return_routed_experts: bool
    routed_experts_start: int
    num_output_ids_in_prompt: int | Sequence[int]
    clip_to_context: bool
    return_errors: bool
    progress: bool


class CallArguments(NamedTuple):
    """What one call brings, as its caller wrote it; `scores` generates nothing, whatever the parameters say."""

    prompts: Prompts
    input_ids: InputIds
    sampling_params: Sampling
    options: GenerateOptions
    stream: bool = False
    scores: bool = False


class GenerateItem(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One sequence to generate. `params.n` is ignored here: an item is one sample.

    prompt / input_ids   exactly one of them; text is encoded with special tokens added
    request_id           "" lets the engine make one; (request_id, index) must be unique among live sequences
    index, prompt_index  which sample of which prompt this is; echoed in the reply
    seed                 the sample's own seed; None: derived from `params.seed` and `index`, or given by the engine
    extra_key            as in `GenerateOptions`
    stream               deliver every token as it comes
    shown_tokens         special tokens that show in the text although `params` skips special tokens
    num_output_ids_in_prompt, clip_to_context, return_errors   as in `GenerateOptions`
    packed               ids already checked and packed by `RequestBuilder.prepare`; callers leave it None
    refusal              why it cannot be served; its stream ends with that at once
    before               what another engine has made of this sample: it goes on from there, to the same limits
    """

    prompt: str | None = None
    input_ids: Sequence[int] | None = None
    params: SamplingParams = SamplingParams()
    logprobs: LogprobOptions = LogprobOptions()
    request_id: str = ""
    index: int = 0
    prompt_index: int = 0
    seed: int | None = None
    priority: int = 0
    extra_key: str = ""
    stream: bool = False
    shown_tokens: frozenset[str] = frozenset()
    num_output_ids_in_prompt: int = 0
    clip_to_context: bool = False
    return_errors: bool = False
    packed: bytes | None = None
    refusal: ErrorInfo | None = None
    before: Generation | None = None


class RequestBuilder:
    """Checks and builds requests for one engine."""

    def __init__(self, resolved: ResolvedConfig, tokenizer: Tokenizer | None) -> None:
        engine, model = resolved.engine, resolved.model
        self._tokenizer = tokenizer
        self._vocab_size = model.vocab_size
        self._context_length = resolved.context_length
        self._eos_ids = model.eos_token_ids
        self._read_params = functools.partial(read_params, defaults=resolved.sampling_defaults)
        self._no_logprobs = LogprobOptions(engine.logprob_mode, engine.prompt_logprob_mode)
        self._max_sequences = engine.max_sequences
        self._routed_shape = model.experts_shape if engine.keep_routed_experts else None
        self._seeds = SeedSource(engine.seed)
        self._last_shared: _Shared | None = None
        self._has_warned = False
        self.resize(resolved)

    def resize(self, resolved: ResolvedConfig) -> None:
        """Bound requests by the pool of a core that has just started."""
        self._max_length = resolved.max_length
        self._pool_tokens = resolved.max_total_num_tokens

    def expand(self, call: CallArguments) -> list[GenerateItem]:
        """One item per sample, prompt-major. Raises `RequestError` before anything is submitted."""
        options = call.options
        for name in options:
            if name not in GenerateOptions.__annotations__:
                meant = _MEANT.get(name) or hint(name, (*GenerateOptions.__annotations__, "prompts", "input_ids"))
                if name in (*SamplingParams.__struct_fields__, "sampling_seed"):
                    meant = "; it belongs in sampling_params"
                elif not meant and (found := meant_by(name, SamplingParams.__struct_fields__)):
                    meant = f"; {found} of sampling_params is"
                message = f"{name} is not an argument of a request{meant}"
                raise RequestError(message, field=name)
        field, given = sources(call.prompts, call.input_ids)
        returns_errors = as_flag(options.get("return_errors", False), "return_errors")
        as_flag(options.get("progress", True), "progress")
        refusals: dict[int, RequestError] = {}
        params = params_list(call.sampling_params, len(given), refusals if returns_errors else None, self._read_params)
        params = scoring(params) if call.scores else params
        num_samples = sum(each.n for each in params)
        self._check_count(num_samples, field)
        check_call(params)
        special = as_flag(options.get("add_special_tokens", True), "add_special_tokens")
        names = request_ids(options.get("request_id"), len(given))
        num_output = per_prompt(options.get("num_output_ids_in_prompt", 0), len(given), "num_output_ids_in_prompt")
        common = GenerateItem(
            logprobs=self._logprob_options(options, num_samples),
            priority=options.get("priority", 0),
            extra_key=options.get("extra_key", ""),
            stream=call.stream,
            clip_to_context=as_flag(options.get("clip_to_context", False), "clip_to_context"),
            return_errors=returns_errors,
        )
        items: list[GenerateItem] = []
        for position, source in enumerate(given):
            item = msgspec.structs.replace(
                common,
                params=params[position],
                request_id=names[position],
                prompt_index=position,
                num_output_ids_in_prompt=num_output[position],
            )
            name = field if len(given) == 1 else f"{field}[{position}]"
            try:
                if position in refusals:
                    raise refusals[position]
                item = self._settle(item, self._pack(field, source, item.num_output_ids_in_prompt, name, special))
            except RequestError as error:
                if not returns_errors:
                    raise
                item = msgspec.structs.replace(item, refusal=error.info())
            items += self._samples(item)
        return items

    def prepare(self, item: GenerateItem) -> GenerateItem:
        """`item` checked, its prompt packed and `max_new_tokens` clipped if asked. Samples of a prompt are copies of
        what this returns with another index, name and seed. Raises `RequestError` naming the field."""
        if item.packed is not None or item.refusal is not None:
            return item
        if (item.prompt is None) == (item.input_ids is None):
            raise RequestError("exactly one of prompt and input_ids must be given", field="input_ids")
        field = "prompt" if item.input_ids is None else "input_ids"
        source = item.prompt if item.input_ids is None else item.input_ids
        return self._settle(item, self._pack(field, source, item.num_output_ids_in_prompt, field))

    def build(self, item: GenerateItem, handle: int) -> Request:
        """The core's request for `item`. Raises `RequestError` naming the field."""
        item = item if item.packed is not None else self.prepare(item)
        params, packed, shared = item.params, item.packed or b"", self._shared(item.params)
        logprobs = item.logprobs
        if logprobs.prompt_start is not None and logprobs.prompt_start >= len(packed) // 4:
            logprobs = msgspec.structs.replace(logprobs, prompt_start=None)  # none are left to give
        return Request(
            handle=handle,
            request_id=name_of(item.request_id, "request_id"),
            prompt=packed,
            max_new_tokens=params.max_new_tokens,
            seed=self._seed_of(item),
            sampling=shared.sampling,
            logprobs=logprobs,
            min_new_tokens=params.min_new_tokens,
            stop_token_ids=shared.stop_token_ids,
            priority=item.priority,
            extra_key=item.extra_key,
            deliver_every=1 if item.stream or params.stop else 0,
            num_output_ids_in_prompt=item.num_output_ids_in_prompt,
        )

    def check_before(self, ids: Iterable[int]) -> None:
        """Raise `RequestError` where these are no tokens of this model."""
        self._check_ids(ids, "before")

    def refused(self, item: GenerateItem, handle: int) -> Request:
        """What stands for `item`, of which nothing is to be drawn, in the front: it is not checked again, nor sent."""
        return Request(handle, item.request_id, item.packed or b"", 0, 0, logprobs=item.logprobs)

    def _settle(self, item: GenerateItem, packed: bytes) -> GenerateItem:
        """`item` with its prompt, after checking that it can run on this engine whatever else runs."""
        num_prompt = len(packed) // 4
        params = self._clipped(item.params, num_prompt) if item.clip_to_context else item.params
        if num_prompt + params.max_new_tokens > self._max_length:
            raise self._without_room(num_prompt, params.max_new_tokens)
        self._shared(params)
        extra_key, request_id = name_of(item.extra_key, "extra_key"), name_of(item.request_id, "request_id")
        options, priority = item.logprobs, item.priority
        if options != self._no_logprobs or type(options.num_top) is not int:
            self._check_logprobs(options, num_prompt)
            integer_within(options.max_kept, "return_kept_token_ids", 0, MAX_KEPT_IDS)
            check_kept(options, params, leaves_some_out=self._shared(params).sampling.truncates)
            if options.routed_start is not None:
                integer_within(options.routed_start, "routed_experts_start", 0, num_prompt)
                check_routed([(options, num_prompt, params)], self._routed_shape)
            check_logprob_values(num_logprob_values(options, num_prompt, params), options)
        if type(priority) is not int or abs(priority) > MAX_PRIORITY:
            priority = integer_within(priority, "priority", -MAX_PRIORITY, MAX_PRIORITY)
        name, num_output = "num_output_ids_in_prompt", item.num_output_ids_in_prompt
        return msgspec.structs.replace(
            item,
            request_id=request_id,
            extra_key=extra_key,
            packed=packed,
            prompt=None,
            input_ids=None,
            params=params,
            seed=None if item.seed is None else integer_within(item.seed, "seed", 0, (1 << 64) - 1),
            priority=priority,
            num_output_ids_in_prompt=integer_within(num_output, name, 0, num_prompt - 1) if num_output else 0,
        )

    def _clipped(self, params: SamplingParams, num_prompt: int) -> SamplingParams:
        room = max(0, self._max_length - num_prompt)
        if params.max_new_tokens <= room:
            return params
        shortest = min(params.min_new_tokens, room)
        clipped: SamplingParams = msgspec.structs.replace(params, max_new_tokens=room, min_new_tokens=shortest)
        return clipped

    def _shared(self, params: SamplingParams) -> _Shared:
        """What requests with these parameters share, checked and made once for all that come one after the other."""
        shared = self._last_shared
        if shared is None or shared.params is not params:
            if params.stop and self._tokenizer is None:
                raise RequestError("stop strings need a tokenizer; use stop_token_ids", field="sampling_params.stop")
            if params.stop_token_ids:
                self._check_ids(params.stop_token_ids, "sampling_params.stop_token_ids")
            if params.logit_bias:
                self._check_ids(params.logit_bias, "sampling_params.logit_bias")
            stop_ids = params.stop_token_ids if params.ignore_eos else (*self._eos_ids, *params.stop_token_ids)
            stop_ids = tuple(dict.fromkeys(stop_ids))
            if params.min_new_tokens and len(stop_ids) == self._vocab_size:
                message = "min_new_tokens leaves nothing to draw: every token of the vocabulary is a stop id"
                raise RequestError(f"sampling_params.{message}", field="sampling_params.min_new_tokens")
            sampling = TokenSampling(
                temperature=params.temperature,
                top_k=0 if params.top_k >= self._vocab_size else max(params.top_k, 0),
                top_p=params.top_p,
                min_p=params.min_p,
                repetition_penalty=params.repetition_penalty,
                presence_penalty=params.presence_penalty,
                frequency_penalty=params.frequency_penalty,
                logit_bias=tuple((params.logit_bias or {}).items()),
            )
            self._last_shared = shared = _Shared(params, sampling, stop_ids)
        return shared

    def _samples(self, item: GenerateItem) -> list[GenerateItem]:
        """The `n` samples of one prompt, each with its own seed; `item` is the first."""
        seed = self._seeds.take() if item.params.seed is None else item.params.seed
        replace = msgspec.structs.replace
        return [replace(item, index=index, seed=sample_seed(seed, index)) for index in range(item.params.n)]

    def _without_room(self, num_prompt: int, max_new_tokens: int) -> RequestError:
        """The whole sequence must fit the context, and alone the KV pool."""
        total = f"{num_prompt} prompt tokens + max_new_tokens {max_new_tokens}"
        bound = f"{self._pool_tokens} tokens of the KV pool"
        if num_prompt + max_new_tokens > self._context_length:
            bound = f"context of {self._context_length}"
        return RequestError(f"{total} is over the {bound}", field="sampling_params.max_new_tokens")

    def _check_logprobs(self, options: LogprobOptions, num_prompt: int) -> None:
        integer_within(options.num_top, "top_logprobs", 0, min(MAX_TOP_LOGPROBS, self._vocab_size))
        as_choice(options.output_mode, _MODES, "logprob_mode")
        as_choice(options.prompt_mode, _MODES, "prompt_logprob_mode")
        if len(options.token_ids) > MAX_LOGPROB_TOKEN_IDS:
            message = f"logprob_token_ids must hold at most {MAX_LOGPROB_TOKEN_IDS} ids"
            raise RequestError(message, field="logprob_token_ids")
        self._check_ids(options.token_ids, "logprob_token_ids")
        if options.prompt_start is not None:
            integer_within(options.prompt_start, "logprob_start", 0, num_prompt)

    def _logprob_options(self, options: GenerateOptions, num_samples: int) -> LogprobOptions:
        wants_routed = as_flag(options.get("return_routed_experts", False), "return_routed_experts")
        routed_start = as_integer(options.get("routed_experts_start", 0), "routed_experts_start")
        wants_kept = as_flag(options.get("return_kept_token_ids", False), "return_kept_token_ids")
        wants_prompt = as_flag(options.get("return_prompt_logprobs", False), "return_prompt_logprobs")
        start = integer_within(options.get("logprob_start", 0), "logprob_start", 0, self._context_length)
        return LogprobOptions(
            output_mode=_mode(options, "logprob_mode", self._no_logprobs.output_mode),
            prompt_mode=_mode(options, "prompt_logprob_mode", self._no_logprobs.prompt_mode),
            prompt_start=start if wants_prompt else None,
            num_top=as_integer(options.get("top_logprobs", 0), "top_logprobs"),
            token_ids=id_tuple(options.get("logprob_token_ids"), "logprob_token_ids", MAX_LOGPROB_TOKEN_IDS),
            max_kept=max_kept_each(num_samples) if wants_kept else 0,
            routed_start=routed_start if wants_routed else None,
        )

    def _seed_of(self, item: GenerateItem) -> int:
        if item.seed is not None:
            return item.seed
        seed = item.params.seed
        return sample_seed(self._seeds.take() if seed is None else seed, item.index)

    def _pack(self, kind: str, source: Any, num_output: int, field: str, special: bool = True) -> bytes:
        if kind == "input_ids":
            ids = as_integer_array(source, field)
        elif num_output:
            message = "num_output_ids_in_prompt counts token ids: give the prompt as input_ids"
            raise RequestError(message, field="num_output_ids_in_prompt")
        else:
            ids = np.asarray(self._encode(source, field, special), dtype=np.int64)
        check_prompt_length(ids.size, self._context_length, field)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self._vocab_size:
            raise self._not_in_vocabulary(low if low < 0 else high, field)
        return pack_ids(ids.astype(np.int32))

    def _encode(self, text: Any, field: str, special: bool) -> list[int]:
        if not isinstance(text, str):
            raise RequestError(f"{field} must be a string", field=field)
        if self._tokenizer is None:
            raise RequestError("this engine has no tokenizer; give input_ids", field=field)
        ids = encode_bounded(self._tokenizer, text, self._context_length, field, add_special_tokens=special)
        if special and not self._has_warned and begins_twice(self._tokenizer, ids):
            self._has_warned = True
            logger.warning("%s begins with the beginning of sequence, and one was added to it", field)
        return ids

    def _check_ids(self, ids: Iterable[int], field: str) -> None:
        for token in ids:
            if not 0 <= token < self._vocab_size:
                raise self._not_in_vocabulary(token, field)

    def _not_in_vocabulary(self, token: int, field: str) -> RequestError:
        return RequestError(f"{field} holds {token}, which is not in the vocabulary of {self._vocab_size}", field=field)

    def _check_count(self, num_sequences: int, field: str) -> None:
        if num_sequences > self._max_sequences:
            message = f"{num_sequences} sequences in one call; this engine queues at most {self._max_sequences}"
            raise RequestError(message, field=field)


class _Shared(msgspec.Struct, frozen=True):
    """What the requests of one `SamplingParams` have in common, as the core gets it."""

    params: SamplingParams
    sampling: TokenSampling
    stop_token_ids: tuple[int, ...]


def _mode(options: Mapping[str, Any], field: str, default: LogprobMode) -> Any:
    mode = options.get(field)
    return default if mode is None else as_choice(mode, _MODES, field)
