"""`/v1/models`, `/tokenize` and `/detokenize`: what is served, and its tokenizer for those who have none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from headrace.engine.chat import read_terms, render, tokenizer_of
from headrace.server.openai_types import check_model
from headrace.server.prompts import encode_text, encode_texts
from headrace.server.routes import Endpoint
from headrace.server.state import ServerState
from headrace.server.wire import PartsReply, convert, encode_json, json_reply, read_body
from headrace.text import normalize_messages, run_sized
from headrace.types.errors import RequestError
from headrace.types.http import ChatAsk

MAX_LIST_LENGTH = 1 << 17
MAX_DETOKENIZE_IDS = 1 << 20
MAX_DETOKENIZE_CHARACTERS = 1 << 23
"""As the vocabulary writes them; the reply repeats its text."""


class TokenizeBody(msgspec.Struct):
    model: str = ""
    prompt: str | list[str] | None = None
    messages: Any = None
    tools: Any = None
    add_special_tokens: bool | None = None  # None: to a prompt, not to a conversation
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: Any = None


class DetokenizeBody(msgspec.Struct):
    tokens: list[Any]
    model: str = ""
    skip_special_tokens: bool = True


class ModelsFace:
    """The routes around the one served model."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._engine = state.engine

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint("/v1/models", self.models),
            Endpoint("/v1/models/{model:path}", self.model),
            *(Endpoint(path, self.tokenize, ("POST",)) for path in ("/tokenize", "/v1/tokenize")),
            *(Endpoint(path, self.detokenize, ("POST",)) for path in ("/detokenize", "/v1/detokenize")),
        ]

    async def models(self, request: Request) -> Response:
        return json_reply({"object": "list", "data": [self._card(self._state.model_name)]})

    async def model(self, request: Request) -> Response:
        return json_reply(self._card(check_model(self._state, request.path_params["model"])))

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize: ids of a prompt, of many, or of a conversation."""
        body = await read_body(request, _read_tokenize)
        check_model(self._state, body.model)
        limit = self._engine.resolved.context_length
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("exactly one of prompt and messages must be given", field="prompt")
        if body.prompt is None:
            tokenizer = tokenizer_of(self._engine)
            text = await render(tokenizer, body.messages, read_terms(tokenizer, _ask(body)))
            special = bool(body.add_special_tokens)
            rows = [await encode_text(self._engine, text, "messages", add_special_tokens=special)]
        else:
            texts = _rows(body.prompt, "prompt", isinstance(body.prompt, list))
            special = body.add_special_tokens is not False
            encoded = await encode_texts(self._engine, texts, add_special_tokens=special, allow_empty=True)
            rows = list(encoded.values())
        if isinstance(body.prompt, list):
            return json_reply({"tokens": rows, "count": [len(ids) for ids in rows], "max_model_len": limit})
        return json_reply({"tokens": rows[0], "count": len(rows[0]), "max_model_len": limit})

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize: text of ids, or texts of many lists of ids."""
        body = await read_body(request, lambda values: convert(values, DetokenizeBody))
        check_model(self._state, body.model)
        is_many = bool(body.tokens) and isinstance(body.tokens[0], list)
        rows = _rows(body.tokens, "tokens", is_many)
        size = len(rows) + sum(len(ids) for ids in rows.values() if isinstance(ids, list))
        if size > MAX_DETOKENIZE_IDS:
            raise RequestError(f"tokens must hold at most {MAX_DETOKENIZE_IDS} ids", field="tokens")

        def write() -> bytes:
            self._check_ids(rows)
            tokenizer = tokenizer_of(self._engine, "tokens")
            texts = [tokenizer.decode(ids, body.skip_special_tokens) for ids in rows.values()]
            reply = texts if is_many else texts[0]
            return encode_json({"text": reply, "prompt": reply})

        return PartsReply([await run_sized(size, write)])

    def _check_ids(self, rows: Mapping[str, Any]) -> None:
        """Before any is decoded: a vocabulary may hold tokens of a thousand characters."""
        vocab_size, tokenizer, num_characters = self._engine.resolved.model.vocab_size, self._engine.tokenizer, 0
        for field, ids in rows.items():
            if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < vocab_size for token in ids):
                raise RequestError(f"{field} must be a list of ids below {vocab_size}", field=field)
            num_characters += 0 if tokenizer is None else tokenizer.length_of(ids)
        if num_characters > MAX_DETOKENIZE_CHARACTERS:
            message = f"tokens have {num_characters} characters; at most {MAX_DETOKENIZE_CHARACTERS} may be"
            raise RequestError(message, field="tokens")

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": int(self._state.started_at),
            "owned_by": "headrace",
            "root": self._engine.config.model,
            "max_model_len": self._engine.resolved.context_length,
        }


def _read_tokenize(values: Mapping[str, Any]) -> TokenizeBody:
    body = convert(values, TokenizeBody)
    if body.messages is not None:
        body.messages = normalize_messages(body.messages)
    return body


def _ask(body: TokenizeBody) -> ChatAsk:
    """The conversation of a body, as it would be replied to."""
    return ChatAsk(
        messages=body.messages,
        tools=body.tools,
        chat_template_kwargs=body.chat_template_kwargs,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
    )


def _rows(values: Any, field: str, is_many: bool) -> dict[str, Any]:
    """What a field holds, one value or a list of many, by the names that errors use."""
    if not is_many:
        return {field: values}
    if len(values) > MAX_LIST_LENGTH:
        raise RequestError(f"{field} must hold at most {MAX_LIST_LENGTH} entries", field=field)
    return {f"{field}[{i}]": value for i, value in enumerate(values)}
