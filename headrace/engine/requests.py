"""From what a caller says to what the core is asked. Owns the checks of every request field and the expansion of
batches and `n` into single sequences; knows nothing of links, streams or tensors.

A request that passes here can only be refused by the core for lack of room. Errors name the field as the caller spells
it (`input_ids[3]`, `sampling_params.top_p`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

import msgspec
import numpy as np

from headrace.config import ResolvedConfig
from headrace.engine.fields import (
    InputIds,
    Prompts,
    Sampling,
    check_integer,
    check_mode,
    check_name,
    id_array,
    id_tuple,
    params_list,
    request_ids,
    sources,
)
from headrace.engine.seeds import SeedSource, sample_seed
from headrace.scheduler.limits import MAX_PRIORITY
from headrace.text import Tokenizer, encode_bounded
from headrace.types.errors import RequestError
from headrace.types.request import Request, TokenSampling, pack_ids
from headrace.types.sampling_params import (
    MAX_LOGPROB_TOKEN_IDS,
    MAX_TOP_LOGPROBS,
    LogprobMode,
    LogprobOptions,
    SamplingParams,
)

_MAX_EXTRA_BYTES = 1 << 29  # half of what a message may have


class GenerateOptions(TypedDict, total=False):
    """Keywords of `generate`, `stream` and `score`.

    request_id               a name, or one per prompt (one name for many prompts becomes name_0, name_1, ...); the
                             samples of one prompt share it. Must not be in use by a live request. None: a fresh one
    priority                 higher runs first (0)
    extra_key                separates prefix-cache entries ("")
    logprob_mode             meaning of output log-probabilities (None: the engine's default)
    prompt_logprob_mode      meaning of prompt log-probabilities (None: the engine's default)
    return_prompt_logprobs   score the prompt too (False; always on in `score`)
    logprob_start            first prompt position to score (0)
    top_logprobs             how many most probable tokens to report per position (0)
    logprob_token_ids        tokens whose log-probability to report per position (none)
    """

    request_id: str | Sequence[str] | None
    priority: int
    extra_key: str
    logprob_mode: LogprobMode | None
    prompt_logprob_mode: LogprobMode | None
    return_prompt_logprobs: bool
    logprob_start: int
    top_logprobs: int
    logprob_token_ids: Sequence[int] | None


class GenerateItem(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to generate. `params.n` is ignored here: an item is one sample.

    prompt / input_ids   exactly one of them; text is encoded with special tokens added
    request_id           "" lets the engine make one; (request_id, index) must be unique among live sequences
    index, prompt_index  which sample of which prompt this is; echoed in the reply
    seed                 the sample's own seed; None: derived from `params.seed` and `index`, or given by the engine
    namespace            separates prefix-cache entries
    stream               deliver every token as it comes
    packed               ids already checked and packed by `RequestBuilder.expand`; callers leave it None
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
    namespace: str = ""
    stream: bool = False
    packed: bytes | None = None


class RequestBuilder:
    """Checks and builds requests for one engine."""

    def __init__(self, resolved: ResolvedConfig, tokenizer: Tokenizer | None) -> None:
        engine, model = resolved.engine, resolved.model
        self._tokenizer = tokenizer
        self._vocab_size = model.vocab_size
        self._context_length = resolved.context_length
        self._eos_ids = tuple(t for t in model.eos_token_ids if 0 <= t < model.vocab_size)
        self._output_mode: LogprobMode = engine.logprob_mode
        self._prompt_mode: LogprobMode = engine.prompt_logprob_mode
        self._max_sequences = engine.max_sequences
        self._seeds = SeedSource(engine.seed)
        self.resize(resolved)

    def resize(self, resolved: ResolvedConfig) -> None:
        """Bound requests by the pool of a core that has just started."""
        self._max_length = resolved.max_length
        self._pool_tokens = resolved.max_total_num_tokens

    def expand(
        self,
        prompts: Prompts,
        input_ids: InputIds,
        sampling_params: Sampling,
        options: GenerateOptions,
        *,
        stream: bool,
    ) -> list[GenerateItem]:
        """One item per sample, prompt-major. Raises `RequestError` before anything is submitted."""
        for name in options:
            if name not in GenerateOptions.__annotations__:
                raise RequestError(f"{name} is not an argument of a request", field=name)
        field, given = sources(prompts, input_ids)
        params = params_list(sampling_params, len(given))
        self._check_count(sum(each.n for each in params), field)
        names = request_ids(options.get("request_id"), len(given))
        logprobs = self._logprob_options(options)
        items: list[GenerateItem] = []
        for position, source in enumerate(given):
            name = field if len(given) == 1 else f"{field}[{position}]"
            packed = self._pack_text(source, name) if field == "prompts" else self._pack_ids(source, name)
            seed = params[position].seed
            item = GenerateItem(
                packed=packed,
                params=params[position],
                logprobs=logprobs,
                request_id=names[position],
                prompt_index=position,
                seed=self._seeds.take() if seed is None else seed,
                priority=options.get("priority", 0),
                namespace=options.get("extra_key", ""),
                stream=stream,
            )
            self.check(item, packed)
            items += _samples(item)
        return items

    def build(self, item: GenerateItem, handle: int) -> Request:
        """The core's request for `item`. Raises `RequestError` naming the field."""
        if (item.prompt is None) == (item.input_ids is None) and item.packed is None:
            raise RequestError("exactly one of prompt and input_ids must be given", field="input_ids")
        packed = item.packed
        if packed is None:
            is_text = item.input_ids is None
            packed = self._pack_text(item.prompt, "prompt") if is_text else self._pack_ids(item.input_ids, "input_ids")
            self.check(item, packed)
        params = item.params
        stop_ids = params.stop_token_ids if params.ignore_eos else (*self._eos_ids, *params.stop_token_ids)
        return Request(
            handle=handle,
            request_id=item.request_id,
            prompt=packed,
            max_new_tokens=params.max_new_tokens,
            seed=self._seed_of(item),
            sampling=_token_sampling(params, self._vocab_size),
            logprobs=_effective(item.logprobs, len(packed) // 4),
            min_new_tokens=params.min_new_tokens,
            stop_token_ids=tuple(dict.fromkeys(stop_ids)),
            priority=item.priority,
            namespace=item.namespace,
            deliver_every=1 if item.stream or params.stop else 0,
        )

    def check(self, item: GenerateItem, packed: bytes) -> None:
        """Raise `RequestError` if `item` cannot run on this engine whatever else runs."""
        params, num_prompt = item.params, len(packed) // 4
        self._check_room(num_prompt, params.max_new_tokens)
        if params.stop and self._tokenizer is None:
            raise RequestError("stop strings need a tokenizer; use stop_token_ids", field="sampling_params.stop")
        self._check_ids(params.stop_token_ids, "sampling_params.stop_token_ids")
        self._check_ids(params.logit_bias or (), "sampling_params.logit_bias")
        check_integer(item.priority, "priority", -MAX_PRIORITY, MAX_PRIORITY)
        check_name(item.namespace, "extra_key")
        check_name(item.request_id, "request_id")
        self._check_logprobs(item.logprobs, num_prompt)
        _check_answer(item.logprobs, num_prompt, params.max_new_tokens)
        if item.seed is not None:
            check_integer(item.seed, "seed", 0, (1 << 64) - 1)

    def _check_room(self, num_prompt: int, max_new_tokens: int) -> None:
        """The whole sequence must fit the context, and alone the KV pool."""
        length = num_prompt + max_new_tokens
        if length > self._max_length:
            total = f"{num_prompt} prompt tokens + max_new_tokens {max_new_tokens}"
            bound = f"{self._pool_tokens} tokens of the KV pool"
            if length > self._context_length:
                bound = f"context of {self._context_length}"
            raise RequestError(f"{total} is over the {bound}", field="sampling_params.max_new_tokens")

    def _check_logprobs(self, options: LogprobOptions, num_prompt: int) -> None:
        check_integer(options.num_top, "top_logprobs", 0, min(MAX_TOP_LOGPROBS, self._vocab_size))
        check_mode(options.output_mode, "logprob_mode")
        check_mode(options.prompt_mode, "prompt_logprob_mode")
        if len(options.token_ids) > MAX_LOGPROB_TOKEN_IDS:
            message = f"logprob_token_ids must hold at most {MAX_LOGPROB_TOKEN_IDS} ids"
            raise RequestError(message, field="logprob_token_ids")
        self._check_ids(options.token_ids, "logprob_token_ids")
        if options.prompt_start is not None:
            check_integer(options.prompt_start, "logprob_start", 0, num_prompt)

    def _logprob_options(self, options: GenerateOptions) -> LogprobOptions:
        wants_prompt = options.get("return_prompt_logprobs", False)
        if not isinstance(wants_prompt, bool):
            raise RequestError("return_prompt_logprobs must be true or false", field="return_prompt_logprobs")
        start = options.get("logprob_start", 0)
        check_integer(start, "logprob_start", 0, self._context_length)
        return LogprobOptions(
            output_mode=options.get("logprob_mode") or self._output_mode,
            prompt_mode=options.get("prompt_logprob_mode") or self._prompt_mode,
            prompt_start=start if wants_prompt else None,
            num_top=options.get("top_logprobs", 0),
            token_ids=id_tuple(options.get("logprob_token_ids"), "logprob_token_ids"),
        )

    def _seed_of(self, item: GenerateItem) -> int:
        if item.seed is not None:
            return item.seed
        seed = item.params.seed
        return sample_seed(self._seeds.take() if seed is None else seed, item.index)

    def _pack_ids(self, source: Any, field: str) -> bytes:
        array = id_array(source, field)
        if not array.size:
            raise RequestError(f"{field} is empty", field=field)
        self._check_length(array.size, field)
        self._check_range(array, field)
        return pack_ids(array.astype(np.int32))

    def _pack_text(self, text: Any, field: str) -> bytes:
        if not isinstance(text, str):
            raise RequestError(f"{field} must be a string", field=field)
        if self._tokenizer is None:
            raise RequestError("this engine has no tokenizer; give input_ids", field=field)
        ids = encode_bounded(self._tokenizer, text, self._context_length, field)
        if not ids:
            raise RequestError(f"{field} has no tokens", field=field)
        self._check_length(len(ids), field)
        array = np.asarray(ids, dtype=np.int64)
        self._check_range(array, field)
        return pack_ids(array.astype(np.int32))

    def _check_length(self, num_tokens: int, field: str) -> None:
        if num_tokens > self._context_length:
            message = f"{field} has {num_tokens} tokens, over the context of {self._context_length}"
            raise RequestError(message, field=field)

    def _check_range(self, ids: Any, field: str) -> None:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self._vocab_size:
            raise self._not_in_vocabulary(low if low < 0 else high, field)

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


def _check_answer(options: LogprobOptions, num_prompt: int, max_new_tokens: int) -> None:
    """What is asked beside each token must fit the one message that ends a sequence."""
    num_scored = 0 if options.prompt_start is None else num_prompt - options.prompt_start
    num_bytes = (num_scored + max_new_tokens) * (8 * options.num_top + 4 * len(options.token_ids))
    if num_bytes > _MAX_EXTRA_BYTES:
        message = f"log-probabilities of further tokens would take {num_bytes} bytes; at most {_MAX_EXTRA_BYTES} do"
        raise RequestError(message, field="top_logprobs" if options.num_top else "logprob_token_ids")


def _samples(item: GenerateItem) -> list[GenerateItem]:
    """The `n` samples of one prompt, each with its own seed; `item` is the first."""
    if item.params.n == 1 or item.seed is None:
        return [item]
    replace = msgspec.structs.replace
    return [replace(item, index=index, seed=sample_seed(item.seed, index)) for index in range(item.params.n)]


def _effective(options: LogprobOptions, num_prompt: int) -> LogprobOptions:
    """The same, without prompt scores when none are left to give."""
    if options.prompt_start is None or options.prompt_start < num_prompt:
        return options
    return msgspec.structs.replace(options, prompt_start=None)


def _token_sampling(params: SamplingParams, vocab_size: int) -> TokenSampling:
    """`float` makes plain numbers of numpy's, which do not travel."""
    return TokenSampling(
        temperature=0.0 if params.is_greedy else float(params.temperature),
        top_k=0 if params.top_k >= vocab_size else max(params.top_k, 0),
        top_p=float(params.top_p),
        min_p=float(params.min_p),
        repetition_penalty=float(params.repetition_penalty),
        presence_penalty=float(params.presence_penalty),
        frequency_penalty=float(params.frequency_penalty),
        logit_bias=tuple((token, float(value)) for token, value in (params.logit_bias or {}).items()),
    )
