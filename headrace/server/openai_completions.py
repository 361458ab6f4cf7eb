"""`/v1/completions`, checked with OpenAI's own client. Owns the way of a request from body to reply."""

from __future__ import annotations

import functools
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from headrace.engine.fields import per_prompt
from headrace.server.carrying import carriage_of
from headrace.server.native_types import shared_rows
from headrace.server.openai_calls import Chunks, OpenAiCall, Prompt, choice_extras, finish_of
from headrace.server.openai_logprobs import (
    TextTokens,
    TokenWriter,
    completion_logprobs,
    prompt_logprobs,
    with_top,
)
from headrace.server.openai_types import (
    CompletionBody,
    check_model,
    logprob_options,
    openai_errors,
    prompt_bound,
    read_openai,
    sampling_params,
)
from headrace.server.prompts import check_count, encode_texts, warnings_about
from headrace.server.routes import Endpoint
from headrace.server.state import ServerState
from headrace.server.wire import dropping, json_reply, read_body
from headrace.types.errors import RequestError
from headrace.types.generation import Generation

DEFAULT_MAX_TOKENS = 16
_OBJECT = "text_completion"


class CompletionsFace:
    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._tokenizer = state.engine.tokenizer

    def endpoints(self) -> list[Endpoint]:
        return [Endpoint("/v1/completions", self.completions, ("POST",), generates=True)]

    async def completions(self, request: Request) -> Response:
        body, warnings = await read_body(request, functools.partial(read_openai, kind=CompletionBody))
        model = check_model(self._state, body.model)
        prompts = await self._prompts(body, warnings)
        call = OpenAiCall(self._state, body, "cmpl", model, warnings, carriage_of(request.scope))
        with openai_errors(body, "max_tokens", "logprobs"):
            params = sampling_params(self._state, body, self._max_tokens(body, prompts))
            await call.submit(prompts, params, logprob_options(self._state, body, body.logprobs or 0, "logprobs"))
        if body.stream:
            return call.event_stream(_OBJECT, functools.partial(self._chunks, call, body))
        with dropping(request.scope, call.cancel, self._state.metrics.count_disconnect):
            choices = await call.written(functools.partial(self._choice, call, body))
        return json_reply({**call.envelope(_OBJECT, choices), "usage": call.usage()}, headers=call.headers)

    async def _prompts(self, body: CompletionBody, warnings: list[str]) -> list[Prompt]:
        """A text, ids, or a list of either."""
        engine, prompt = self._state.engine, body.prompt
        if not isinstance(prompt, (str, list)) or prompt == []:
            raise RequestError("prompt must be a text, token ids, or a list of either", field="prompt")
        sources = {"prompt": prompt}
        if isinstance(prompt, list) and isinstance(prompt[0], (str, list)):
            check_count(engine, len(prompt), "prompt")
            sources = {f"prompt[{i}]": each for i, each in enumerate(prompt)}
        texts = {field: source for field, source in sources.items() if isinstance(source, str)}
        key = "num_output_ids_in_prompt"
        num_output = per_prompt(body.num_output_ids_in_prompt, len(sources), key)
        if any(num_output) and texts:
            raise RequestError(f"{key} counts token ids: give the prompt as token ids", field=key)
        max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        bound = prompt_bound(body, engine.resolved.max_length, max_tokens)
        encoded = await encode_texts(engine, texts, add_special_tokens=body.add_special_tokens, bound=bound)
        if body.add_special_tokens:
            warnings += warnings_about(engine, encoded)
        ids = {field: encoded.get(field, given) for field, given in sources.items()}
        if bound is not None:  # of ids as of texts; whether they are a list of ids is checked later
            ids = {field: each[-bound:] if isinstance(each, list) else each for field, each in ids.items()}
        rows = await shared_rows(engine, ids)
        return [Prompt(*each) for each in zip(rows, ids, num_output, strict=True)]

    def _max_tokens(self, body: CompletionBody, prompts: list[Prompt]) -> Any:
        if body.max_tokens is not None:
            return body.max_tokens
        room = self._state.engine.resolved.max_length - max(len(prompt.ids) for prompt in prompts)
        return max(0, min(DEFAULT_MAX_TOKENS, room))

    def _chunks(self, call: OpenAiCall, body: CompletionBody, number: int) -> Chunks:
        tokens = self._tokens(call, body, number)
        return lambda piece: [self._choice(call, body, number, piece, tokens)]

    def _tokens(self, call: OpenAiCall, body: CompletionBody, number: int) -> TextTokens | None:
        return None if body.logprobs is None else TextTokens(self._tokenizer, call.streams[number])

    def _choice(
        self, call: OpenAiCall, body: CompletionBody, number: int, piece: Generation, tokens: TextTokens | None = None
    ) -> dict[str, Any]:
        """`tokens` are those of a stream, of which `piece` is only what is new."""
        stream, tokens = call.streams[number], tokens or self._tokens(call, body, number)
        choice: dict[str, Any] = {"index": number, "text": piece.text, "logprobs": None, **finish_of(piece)}
        writer = TokenWriter(self._tokenizer, body.return_tokens_as_token_ids)
        if tokens is not None:
            piece, offsets = tokens.push(with_top(piece, body.logprobs or 0))
            choice["logprobs"] = completion_logprobs(writer, piece, offsets)
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(writer, stream, piece, body.prompt_logprobs)
        if body.return_token_ids:
            choice["prompt_token_ids"] = stream.prompt_token_ids
        return {**choice, **choice_extras(call, stream, piece)}
