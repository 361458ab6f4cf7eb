"""`/v1/chat/completions`, checked with OpenAI's own client. Owns the way of a conversation from body to reply."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from headrace.engine.chat import CALLS_NOT_READ, ChatTerms, read_terms, reader_of, render, reply_message, tokenizer_of
from headrace.server.carrying import carriage_of
from headrace.server.native_types import shared_ids
from headrace.server.openai_calls import Chunks, OpenAiCall, Prompt, choice_extras, finish_of
from headrace.server.openai_logprobs import TextTokens, TokenWriter, chat_logprobs, with_top
from headrace.server.openai_types import (
    ChatBody,
    check_model,
    logprob_options,
    offers_tools,
    openai_errors,
    prompt_bound,
    read_openai,
    sampling_params,
)
from headrace.server.prompts import encode_text, warnings_about
from headrace.server.routes import Endpoint
from headrace.server.state import ServerState
from headrace.server.wire import dropping, json_reply, read_body
from headrace.text import (
    ReplyText,
    Tokenizer,
    ToolReader,
    check_template_arguments,
    normalize_messages,
    normalize_tools,
)
from headrace.types.errors import RequestError
from headrace.types.generation import Generation
from headrace.types.http import ChatAsk

_OBJECT = "chat.completion"
_CHUNK = "chat.completion.chunk"


class ChatInput(NamedTuple):
    """What the template gets, checked."""

    messages: list[dict[str, Any]]
    terms: ChatTerms


class ChatFace:
    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._tokenizer = state.engine.tokenizer

    def endpoints(self) -> list[Endpoint]:
        return [Endpoint("/v1/chat/completions", self.chat, ("POST",), generates=True)]

    async def chat(self, request: Request) -> Response:
        body, warnings, conversation = await read_body(request, self._read)
        model = check_model(self._state, body.model)
        if conversation.terms.tools and conversation.terms.style is None:
            warnings.append(CALLS_NOT_READ)
        tokenizer = tokenizer_of(self._state.engine)
        text = await render(tokenizer, *conversation)
        key = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        max_tokens = getattr(body, key)
        prompt = await self._prompt(text, body, max_tokens, warnings)
        call = OpenAiCall(self._state, body, "chatcmpl", model, warnings, carriage_of(request.scope))
        if max_tokens is None:
            max_tokens = self._state.engine.resolved.max_length - len(prompt.ids)
        with openai_errors(body, key, "top_logprobs"):
            params = sampling_params(self._state, body, max_tokens)
            skips = params.skip_special_tokens
            reader = reader_of(tokenizer, conversation.terms, text, skips_special_tokens=skips)
            if body.top_logprobs and not body.logprobs:
                raise RequestError("top_logprobs needs logprobs to be true", field="top_logprobs")
            logprobs = logprob_options(self._state, body, body.top_logprobs, "top_logprobs")
            await call.submit([prompt], params, logprobs, shown=reader.hidden if reader else frozenset())
        if body.stream:
            return call.event_stream(_CHUNK, functools.partial(self._chunks, call, body, reader))
        with dropping(request.scope, call.cancel, self._state.metrics.count_disconnect):
            choices = await call.written(functools.partial(self._choice, call, body, reader))
            scores = await call.prompt_scores(TokenWriter(self._tokenizer, body.return_tokens_as_token_ids))
        reply = {**call.envelope(_OBJECT, choices), "usage": call.usage()}
        if scores is not None:
            reply["prompt_logprobs"] = scores
        if body.return_token_ids:
            reply["prompt_token_ids"] = call.streams[0].prompt_token_ids
        return json_reply(reply, headers=call.headers)

    def _read(self, values: Mapping[str, Any]) -> tuple[ChatBody, list[str], ChatInput]:
        body, warnings = read_openai(values, ChatBody)
        check_model(self._state, body.model)
        return body, warnings, self._conversation(body)

    def _conversation(self, body: ChatBody) -> ChatInput:
        is_offered = offers_tools(body)
        tools = normalize_tools(body.tools) if body.tools else []
        arguments = check_template_arguments(body.chat_template_kwargs) if body.chat_template_kwargs else {}
        if body.reasoning_effort is not None:
            arguments.setdefault("reasoning_effort", body.reasoning_effort)
        ask = ChatAsk(
            messages=body.messages,
            tools=tools if is_offered else [],
            chat_template_kwargs=arguments,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            parallel_tool_calls=body.parallel_tool_calls,
        )
        messages = normalize_messages(body.messages)
        return ChatInput(messages, read_terms(tokenizer_of(self._state.engine), ask))

    async def _prompt(self, text: str, body: ChatBody, max_tokens: Any, warnings: list[str]) -> Prompt:
        engine, is_added = self._state.engine, body.add_special_tokens
        limit = engine.resolved.max_length
        bound = prompt_bound(body, limit, max_tokens)
        ids = await encode_text(engine, text, "messages", add_special_tokens=is_added, bound=bound)
        if is_added:
            warnings += warnings_about(engine, {"messages": ids})
        if len(ids) >= limit:
            raise RequestError(f"messages have {len(ids)} tokens, a sequence holds at most {limit}", field="messages")
        return Prompt(shared_ids(engine, ids, "messages"), "messages")

    def _choice(
        self, call: OpenAiCall, body: ChatBody, reader: ToolReader | None, number: int, piece: Generation
    ) -> dict[str, Any]:
        message = reply_message(reader, piece.text)
        writer = TokenWriter(self._tokenizer, body.return_tokens_as_token_ids)
        return {
            "index": number,
            "message": message,
            "logprobs": chat_logprobs(writer, with_top(piece, body.top_logprobs)) if body.logprobs else None,
            **finish_of(piece, "tool_calls" in message),
            **choice_extras(call, call.streams[number], piece),
        }

    def _chunks(self, call: OpenAiCall, body: ChatBody, reader: ToolReader | None, number: int) -> Chunks:
        return _StreamedChoice(call, body, number, ReplyText(reader), self._tokenizer).chunks


class _StreamedChoice:
    """One choice of a streamed reply: a chunk with the role, chunks with text or calls, a chunk with the reason."""

    def __init__(
        self, call: OpenAiCall, body: ChatBody, number: int, text: ReplyText, tokenizer: Tokenizer | None
    ) -> None:
        self._call = call
        self._body = body
        self._number = number
        self._text = text
        self._writer = TokenWriter(tokenizer, body.return_tokens_as_token_ids)
        self._tokens = TextTokens(tokenizer, call.streams[number]) if body.logprobs else None
        self._has_begun = False

    def chunks(self, piece: Generation) -> list[dict[str, Any]]:
        """The chunks that a piece brings; its first one behind the role also has log-probabilities and ids: those of
        the tokens whose text it begins."""
        is_last = piece.finish_reason is not None
        first_index = self._text.num_calls
        text, calls = self._text.push(piece.text, is_last)
        deltas: list[dict[str, Any]] = [{"content": text}] if text else []
        deltas += [{"tool_calls": [{"index": first_index + i, **call}]} for i, call in enumerate(calls)]
        if self._tokens is not None:
            piece, _ = self._tokens.push(piece)
        has_more = bool(piece.token_ids) and (
            self._body.logprobs or self._body.return_token_ids or self._body.return_meta_info
        )
        if is_last or (not deltas and has_more):
            deltas.append({})
        chunks = [self._chunk(delta) for delta in deltas]
        if chunks:
            chunks[0] |= choice_extras(self._call, self._call.streams[self._number], piece)
            if self._body.logprobs and piece.token_ids:
                chunks[0]["logprobs"] = chat_logprobs(self._writer, piece)
        if is_last:
            chunks[-1] |= finish_of(piece, bool(self._text.num_calls))
        if self._has_begun:
            return chunks
        self._has_begun = True
        return [self._chunk({"role": "assistant", "content": ""}), *chunks]

    def _chunk(self, delta: Mapping[str, Any]) -> dict[str, Any]:
        return {"index": self._number, "delta": delta, "logprobs": None, "finish_reason": None}
