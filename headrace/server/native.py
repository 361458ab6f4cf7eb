"""`/generate`, SGLang's dialect. Owns the way of a request from body to reply; its spelling is in `native_*`."""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncIterator, Callable, Sequence

from starlette.requests import Request
from starlette.responses import Response

from headrace.engine import AsyncEngine, GenerateItem, Stream
from headrace.engine.pacing import Turn
from headrace.engine.stream import all_or_none, cancel_all
from headrace.server.carrying import Carriage, Pieces, carriage_of
from headrace.server.native_reply import ReplyStyle, SequenceReply
from headrace.server.native_types import Draft, GenerateCall, in_dialect, read_call
from headrace.server.routes import Endpoint
from headrace.server.state import ServerState
from headrace.server.wire import EventStream, PartsReply, decode_object, dropping, encode_json, event, read_body
from headrace.text import INLINE_CHARACTERS, run_sized
from headrace.types.errors import HeadraceError, RequestError
from headrace.types.generation import Generation

STREAM_HEADER = "x-headrace-stream"
_STREAMING = {
    True: "incremental",
    False: "cumulative; each event repeats all before it, incremental_streaming_output in the body sends what is new",
}


class NativeFace:
    """The generation route."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def endpoints(self) -> list[Endpoint]:
        return [Endpoint("/generate", self.generate, ("POST", "PUT"), generates=True)]

    async def generate(self, request: Request) -> Response:
        received_at = time.perf_counter()
        engine = self._state.engine
        call = await read_call(engine, await read_body(request, functools.partial(Draft, engine)))
        carriage = carriage_of(request.scope)
        streams = await _submit(call, self._state.submit, carriage)
        style = _style(engine, call, received_at, carriage.num_moves)
        cancel, on_disconnect = functools.partial(cancel_all, streams), self._state.metrics.count_disconnect
        if call.is_stream:
            is_incremental = call.is_incremental
            if is_incremental is None:
                is_incremental = self._state.options.incremental_streaming_output
            pieces = carriage.reading(self._state.group(streams), streams)
            events = self._events(pieces, streams, style, call, is_incremental)
            return EventStream(events, cancel, on_disconnect, headers={STREAM_HEADER: _STREAMING[is_incremental]})
        with dropping(request.scope, cancel, on_disconnect):
            await carriage.follow(lambda: self._state.group(streams), streams)
            return PartsReply(await _written(streams, style, call))

    async def _events(
        self,
        group: Pieces,
        streams: Sequence[Stream],
        style: ReplyStyle,
        call: GenerateCall,
        is_incremental: bool,
    ) -> AsyncIterator[bytes]:
        """One event per sequence that has news; a client that reads slowly gets fewer, larger ones."""
        numbers = {stream.request.request_id: number for number, stream in enumerate(streams)}
        replies: dict[int, SequenceReply] = {}
        while pieces := await group.next_pieces():
            events = []
            for piece in pieces:
                number = numbers[piece.request_id]
                if number not in replies:
                    wants = call.wants_logprobs[number]
                    replies[number] = SequenceReply(style, streams[number], wants, is_incremental=is_incremental)
                reply, index = replies[number], number if call.is_list else None
                reply.add(piece)
                if piece.routed_experts is None:
                    events.append(_event(reply, piece, index))
                else:
                    write = functools.partial(_event, reply, piece, index)
                    events.append(await run_sized(len(piece.routed_experts.experts), write))
            yield b"".join(events)


async def answer_body(engine: AsyncEngine, raw: bytes) -> bytes:
    """What `/generate` answers to a body, for a caller in this process; nothing is streamed. To be awaited on the
    engine's loop. Raises the errors of both."""
    received_at = time.perf_counter()
    draft = await run_sized(len(raw), lambda: Draft(engine, decode_object(raw)))
    call = await read_call(engine, draft)
    if call.is_stream:
        raise RequestError("stream: there is only one answer here", field="stream")
    streams = await _submit(call, engine.submit, Carriage())
    try:
        return b"".join(await _written(streams, _style(engine, call, received_at), call))
    finally:
        cancel_all(streams)


async def _submit(call: GenerateCall, submit: Callable[[GenerateItem], Stream], carriage: Carriage) -> list[Stream]:
    """All sequences or none. A long list leaves the loop to others now and then."""
    streams, turn = list[Stream](), Turn()
    try:
        with all_or_none(streams):
            for number, item in enumerate(call.items):
                await turn.give_way()
                streams.append(submit(carriage.item(number, item)))
    except HeadraceError as error:
        raise in_dialect(error, item.prompt_index, call.is_list) from None
    return streams


def _style(engine: AsyncEngine, call: GenerateCall, received_at: float, num_moves: int = 0) -> ReplyStyle:
    return ReplyStyle(
        has_text=engine.tokenizer is not None,
        tokenizer=engine.tokenizer if call.writes_text else None,
        live_version=lambda: engine.version,
        received_at=received_at,
        writes_prompt_ids=call.writes_prompt_ids,
        warnings=call.warnings,
        num_moves=num_moves,
    )


async def _written(streams: list[Stream], style: ReplyStyle, call: GenerateCall) -> list[bytes]:
    """The reply as JSON, in parts, once all sequences are finished. Their objects are written one by one, and none is
    kept: what is not bytes yet is large, and many objects for the garbage collector."""
    bodies, turn = list[bytes](), Turn()
    streams.reverse()
    for is_wanted in call.wants_logprobs:
        await turn.give_way()
        stream = streams[-1]
        piece = await stream.result()
        reply = SequenceReply(style, stream, is_wanted)
        size, write = stream.sample.num_extra_values, functools.partial(_write, reply, piece)
        bodies.append(write() if size <= INLINE_CHARACTERS else await run_sized(size, write))
        streams.pop()
    if not call.is_list:
        return bodies
    parts = [part for body in bodies for part in (b",", body)]
    return [b"[", *parts[1:], b"]"]


def _event(reply: SequenceReply, piece: Generation, index: int | None) -> bytes:
    body = reply.body(piece)
    return event(body if index is None else {**body, "index": index})


def _write(reply: SequenceReply, piece: Generation) -> bytes:
    reply.add(piece)
    return encode_json(reply.body(piece))
