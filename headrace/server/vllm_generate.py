"""`/inference/v1/generate`: token ids in, token ids out, as SkyRL and prime-rl ask vLLM for them. Owns its spelling;
what is asked for is a completion (`openai_completions`) without text."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from headrace.server.carrying import carriage_of
from headrace.server.errors import FieldNames
from headrace.server.native_types import shared_rows
from headrace.server.openai_calls import OpenAiCall, Prompt
from headrace.server.openai_completions import DEFAULT_MAX_TOKENS
from headrace.server.openai_logprobs import TokenWriter, chat_logprobs, with_top
from headrace.server.openai_types import (
    CompletionBody,
    check_model,
    logprob_options,
    openai_errors,
    read_openai,
    sampling_params,
)
from headrace.server.routes import Endpoint
from headrace.server.state import ServerState
from headrace.server.wire import convert, dropping, json_reply, read_body
from headrace.types.errors import RequestError
from headrace.types.generation import Generation, RoutedExperts

_OF_THE_REPLY = ("output_kind", "detokenize")  # of vLLM's parameters: it is whole, and without text
_OWN_KEYS = ("model", "cache_salt", "priority", "request_id")


class TokensBody(msgspec.Struct, kw_only=True):
    """`priority` is as on the other routes. Features are of images, `kv_transfer_params` of split engines."""

    token_ids: list[Any]
    sampling_params: dict[str, Any] = {}
    model: str = ""
    cache_salt: str = ""
    priority: int = 0
    request_id: str = ""
    stream: bool = False
    features: Any = None
    kv_transfer_params: Any = None


class VllmGenerateFace:
    """The route of generation that has no text."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._writer = TokenWriter(state.engine.tokenizer, by_id=True)

    def endpoints(self) -> list[Endpoint]:
        return [Endpoint("/inference/v1/generate", self.generate, ("POST",), generates=True)]

    async def generate(self, request: Request) -> Response:
        ids, (body, warnings) = await read_body(request, _read)
        model = check_model(self._state, body.model)
        (row,) = await shared_rows(self._state.engine, {"token_ids": ids})
        call = OpenAiCall(self._state, body, "gen", model, warnings, carriage_of(request.scope))
        names = {"rid": "request_id", "return_routed_experts": "max_tokens"}  # nobody asks for the latter here
        with FieldNames(names), openai_errors(body, "max_tokens", "logprobs"):
            max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
            params = sampling_params(self._state, body, max_tokens)
            options = logprob_options(self._state, body, body.logprobs or 0, "logprobs")
            if self._state.engine.config.keep_routed_experts:  # asked for by the server's setting, as of vLLM
                options = msgspec.structs.replace(options, routed_start=0)
            await call.submit([Prompt(row, "token_ids")], params, options)
        with dropping(request.scope, call.cancel, self._state.metrics.count_disconnect):
            choices = await call.written(functools.partial(self._choice, body))
            scores = await call.prompt_scores(self._writer)
        reply = {"request_id": call.request_id, "choices": choices, "prompt_logprobs": scores, "usage": call.usage()}
        return json_reply({**reply, "metadata": call.envelope("", ())["metadata"]}, headers=call.headers)

    def _choice(self, body: CompletionBody, number: int, piece: Generation) -> dict[str, Any]:
        return {
            "index": number,
            "token_ids": piece.token_ids,
            "finish_reason": piece.finish_reason,
            "logprobs": None if body.logprobs is None else chat_logprobs(self._writer, with_top(piece, body.logprobs)),
            "version_spans": piece.version_spans,
            "routed_experts": None if piece.routed_experts is None else _npy(piece.routed_experts),
        }


def _npy(routed: RoutedExperts) -> str:
    """As vLLM answers them: base64 of a NumPy file, [tokens, layers, experts per token] of all tokens but the last."""
    file = io.BytesIO()
    np.save(file, routed.array().astype("<i2"), allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _read(values: Mapping[str, Any]) -> tuple[list[Any], tuple[CompletionBody, list[str]]]:
    """The prompt, and the rest in the words of a completion. Raises `RequestError` naming the field."""
    asked = convert(values, TokensBody)
    for name in ("stream", "features", "kv_transfer_params"):
        if getattr(asked, name):
            raise RequestError(f"{name} is not supported here", field=name)
    for name in (*_OWN_KEYS, "prompt"):
        if name in asked.sampling_params:
            raise RequestError(f"sampling_params.{name} is not a sampling parameter", field=f"sampling_params.{name}")
    params = {name: value for name, value in asked.sampling_params.items() if name not in _OF_THE_REPLY}
    own = {name: getattr(asked, name) for name in _OWN_KEYS}
    return asked.token_ids, read_openai({**params, **own}, CompletionBody)
