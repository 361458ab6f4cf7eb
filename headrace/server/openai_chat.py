"""`/v1/chat/completions`, checked with OpenAI's own client. Owns the way of a conversation from body to reply."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from headrace.server.native_types import shared_ids
from headrace.server.openai_calls import OpenAiCall, Prompt, choice_extras, finish_of
from headrace.server.openai_logprobs import chat_logprobs
from headrace.server.openai_types import (
    ChatBody,
    check_model,
    logprob_options,
    openai_errors,
    read_chat,
    sampling_params,
    tool_choice,
)
from headrace.server.prompts import encode_text, render_chat
from headrace.server.routes import Endpoint
from headrace.server.state import ServerState
from headrace.server.wire import dropping, event, json_reply, read_object
from headrace.text import (
    ToolCall,
    ToolCallParser,
    ToolCallStyle,
    check_template_arguments,
    normalize_messages,
    normalize_tools,
    tool_call_style,
    tool_names,
)
from headrace.types.errors import RequestError
from headrace.types.generation import Generation

_OBJECT = "chat.completion"
_CHUNK = "chat.completion.chunk"


class Conversation(msgspec.Struct, frozen=True):
    """What the template gets, checked. `style` is how calls are read back; None: they are not."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    style: ToolCallStyle | None
    template_arguments: dict[str, Any]


class ChatFace:
    """The chat route."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._tokenizer = state.engine.tokenizer
        self._style = tool_call_style(self._tokenizer.chat_template) if self._tokenizer is not None else None

    def endpoints(self) -> list[Endpoint]:
        """The routes of this face."""
        return [Endpoint("/v1/chat/completions", self.chat, ("POST",), generates=True)]

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        body, warnings = read_chat(await read_object(request))
        model = check_model(self._state, body.model)
        conversation = self._conversation(body)
        prompt = await self._prompt(conversation, body)
        call = OpenAiCall(self._state, body, "chatcmpl", model, warnings)
        key = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        with openai_errors(key, "top_logprobs"):
            params = sampling_params(body, self._max_tokens(body, prompt))
            call.submit([prompt], params, self._logprobs(body))
        if body.stream:
            return call.event_stream(self._events(call, body, conversation))
        with dropping(request.receive, call.cancel, self._state.metrics.count_disconnect):
            pieces = [await stream.result() for stream in call.streams]
        for piece in pieces:
            call.count(piece)
        choices = [self._choice(call, body, conversation, number, piece) for number, piece in enumerate(pieces)]
        reply = {**call.envelope(_OBJECT, choices), "usage": call.usage()}
        if body.return_token_ids:
            reply["prompt_token_ids"] = call.streams[0].prompt_token_ids
        return json_reply(reply, headers=call.headers)

    def _conversation(self, body: ChatBody) -> Conversation:
        offers_tools = tool_choice(body.tool_choice) == "auto"
        tools = normalize_tools(body.tools) if body.tools else []
        tools = tools if offers_tools else []
        arguments = check_template_arguments(body.chat_template_kwargs) if body.chat_template_kwargs else {}
        return Conversation(normalize_messages(body.messages), tools, self._style if tools else None, arguments)

    async def _prompt(self, conversation: Conversation, body: ChatBody) -> Prompt:
        engine = self._state.engine
        text = await render_chat(
            engine,
            conversation.messages,
            conversation.tools,
            body.add_generation_prompt,
            conversation.template_arguments,
        )
        ids = await encode_text(engine, text, "messages", add_special_tokens=False)
        limit = engine.resolved.max_length
        if len(ids) >= limit:
            raise RequestError(f"messages have {len(ids)} tokens, a sequence holds at most {limit}", field="messages")
        return Prompt(shared_ids(engine, ids, "messages"), "messages")

    def _max_tokens(self, body: ChatBody, prompt: Prompt) -> Any:
        for given in (body.max_completion_tokens, body.max_tokens):
            if given is not None:
                return given
        return self._state.engine.resolved.max_length - len(prompt.ids)

    def _logprobs(self, body: ChatBody) -> Any:
        if body.top_logprobs and not body.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", field="top_logprobs")
        return logprob_options(self._state, body.top_logprobs, "top_logprobs")

    def _choice(
        self, call: OpenAiCall, body: ChatBody, conversation: Conversation, number: int, piece: Generation
    ) -> dict[str, Any]:
        text, calls = piece.text, list[ToolCall]()
        parser = _parser(conversation)
        if parser is not None:
            (shown, calls), (rest, more) = parser.push(text), parser.finish()
            text, calls = shown + rest, calls + more
        message: dict[str, Any] = {"role": "assistant", "content": None if calls and not text else text}
        if calls:
            message["tool_calls"] = [_tool_call(each) for each in calls]
        return {
            "index": number,
            "message": message,
            "logprobs": chat_logprobs(self._tokenizer, piece) if body.logprobs else None,
            **finish_of(piece, bool(calls)),
            **choice_extras(call, call.streams[number], piece),
        }

    async def _events(self, call: OpenAiCall, body: ChatBody, conversation: Conversation) -> AsyncIterator[bytes]:
        group, numbers = self._state.group(call.streams), call.numbers()
        choices = [
            _StreamedChoice(call, body, number, _parser(conversation), self._tokenizer)
            for number in range(len(call.streams))
        ]
        while pieces := await group.next_pieces():
            events: list[bytes] = []
            for piece in pieces:
                call.count(piece)
                chunks = choices[numbers[piece.request_id]].chunks(piece)
                events += [event(call.chunk(_CHUNK, chunk, piece)) for chunk in chunks]
            if events:
                yield b"".join(events)
        if body.stream_options is not None and body.stream_options.include_usage:
            yield event({**call.envelope(_CHUNK, []), "usage": call.usage()})


class _StreamedChoice:
    """One choice of a streamed reply: a chunk with the role, chunks with text or calls, a chunk with the reason."""

    def __init__(
        self, call: OpenAiCall, body: ChatBody, number: int, parser: ToolCallParser | None, tokenizer: Any
    ) -> None:
        self._call = call
        self._body = body
        self._number = number
        self._parser = parser
        self._tokenizer = tokenizer
        self._has_begun = False
        self._num_calls = 0

    def chunks(self, piece: Generation) -> list[dict[str, Any]]:
        """The chunks that a piece brings; the first also carries its log-probabilities and ids."""
        is_last = piece.finish_reason is not None
        text, calls = self._read(piece.text, is_last)
        deltas: list[dict[str, Any]] = []
        if not self._has_begun:
            self._has_begun = True
            deltas.append({"role": "assistant", "content": ""})
        if text:
            deltas.append({"content": text})
        deltas += [{"tool_calls": [{"index": self._next_index(), **_tool_call(each)}]} for each in calls]
        has_more = self._body.logprobs or self._body.return_token_ids or self._body.return_meta_info
        if is_last or (not deltas and has_more):
            deltas.append({})
        chunks = [self._chunk(delta) for delta in deltas]
        if chunks:
            chunks[0] |= self._details(piece)
        if is_last:
            chunks[-1] |= finish_of(piece, bool(self._num_calls))
        return chunks

    def _read(self, text: str, is_last: bool) -> tuple[str, Sequence[ToolCall]]:
        if self._parser is None:
            return text, ()
        shown, calls = self._parser.push(text)
        if is_last:
            rest, more = self._parser.finish()
            shown, calls = shown + rest, calls + more
        return shown, calls

    def _details(self, piece: Generation) -> dict[str, Any]:
        details = choice_extras(self._call, self._call.streams[self._number], piece)
        if self._body.logprobs:
            details["logprobs"] = chat_logprobs(self._tokenizer, piece)
        return details

    def _chunk(self, delta: Mapping[str, Any]) -> dict[str, Any]:
        return {"index": self._number, "delta": delta, "logprobs": None, "finish_reason": None}

    def _next_index(self) -> int:
        self._num_calls += 1
        return self._num_calls - 1


def _parser(conversation: Conversation) -> ToolCallParser | None:
    if conversation.style is None:
        return None
    return ToolCallParser(conversation.style, tool_names(conversation.tools))


def _tool_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
