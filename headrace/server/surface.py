"""The engine's own surface over HTTP: a route for each method of `AsyncEngine`, its arguments, results and errors.

Owns the list of these methods and how a call is read; what they take is checked where `Engine` checks it. Updates of
weights are `native_weights`. What crosses the wire is `headrace.types.http`; `headrace.client` is the other end.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Sequence
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from headrace.engine import AsyncEngine, GenerateItem, Stream
from headrace.engine.bounds import check_body
from headrace.engine.chat import expand_chat
from headrace.engine.pacing import Turn
from headrace.engine.requests import CallArguments
from headrace.engine.stream import cancel_all, whole_samples
from headrace.ipc.codec import DECODE_ERRORS
from headrace.server.auth import Access
from headrace.server.carrying import Carriage, Pieces, carriage_of
from headrace.server.coerce import MediaTypeError
from headrace.server.errors import shown
from headrace.server.folders import Folders
from headrace.server.routes import Endpoint, Handler
from headrace.server.state import ServerState
from headrace.server.wire import EventStream, PartsReply, convert, dropping, invalid_part, read_body
from headrace.text import INLINE_CHARACTERS, run_sized
from headrace.types.errors import HeadraceError, RequestError, RequestTooLargeError
from headrace.types.generation import Generation
from headrace.types.http import MESSAGE_TYPE, PREFIX, ChatAsk, GenerateAsk, StreamPart, framed

Ask = TypeVar("Ask")
MAX_CALL_BYTES = 1 << 20
CALLS: dict[str, Access] = {
    **dict.fromkeys(("metrics", "status", "give_rewards"), "data"),
    **dict.fromkeys(("abort", "resume", "flush_cache", "set_weight_version", "digest", "weights_checker"), "admin"),
    **dict.fromkeys(("release_memory_occupation", "resume_memory_occupation"), "admin"),
    **dict.fromkeys(("init_weights_update_group", "destroy_weights_update_group"), "admin"),
    **dict.fromkeys(("update_weights_from_distributed", "collective_rpc"), "admin"),
    **dict.fromkeys(("slow_down", "freeze_gc", "stop_profile"), "admin"),
}
"""The methods that are called as they are, and the key that each needs."""

pack = msgspec.msgpack.Encoder().encode


class SurfaceFace:
    """Generation and control, as `Engine` has them."""

    def __init__(self, state: ServerState, folders: Folders) -> None:
        self._state = state
        self._engine = state.engine
        self._folders = folders

    def endpoints(self) -> list[Endpoint]:
        calls = [_post(name, functools.partial(self.call, name), access) for name, access in CALLS.items()]
        made = [
            Endpoint(f"{PREFIX}/{name}", handler, ("POST",), generates=True)
            for name, handler in (("generate", self.generate), ("chat", self.chat))
        ]
        others = [_post(name, getattr(self, name), "admin") for name in ("pause", "start_profile")]
        return [*made, *calls, *others]

    async def generate(self, request: Request) -> Response:
        """`generate`, `score` and `stream`."""
        ask = await read_body(request, lambda values: convert(values, GenerateAsk))
        arguments = ask.prompts, ask.input_ids, ask.sampling_params, _options(ask)
        items = await self._engine.expand(CallArguments(*arguments, stream=ask.stream, scores=ask.scores))
        carriage = carriage_of(request.scope)
        streams = await self._submit(items, carriage)
        cancel, on_disconnect = functools.partial(cancel_all, streams), self._state.metrics.count_disconnect
        if ask.stream:
            return _PartStream(_parts(carriage.reading(self._state.group(streams), streams)), cancel, on_disconnect)
        with dropping(request.scope, cancel, on_disconnect):
            await carriage.follow(lambda: self._state.group(streams), streams)
            samples = [_shown(sample) for sample in await whole_samples(streams)]
            return PartsReply(await _packed(streams, samples), MESSAGE_TYPE)

    async def chat(self, request: Request) -> Response:
        ask = await read_body(request, lambda values: convert(values, ChatAsk))
        expanded = await expand_chat(self._engine, ask)
        carriage = carriage_of(request.scope)
        streams = await self._submit(expanded.items, carriage)
        with dropping(request.scope, functools.partial(cancel_all, streams), self._state.metrics.count_disconnect):
            await carriage.follow(lambda: self._state.group(streams), streams)
            samples = [_shown(sample) for sample in await whole_samples(streams)]
            return PartsReply(await _packed(streams, expanded.replies(samples)), MESSAGE_TYPE)

    async def pause(self, request: Request) -> Response:
        arguments = await self._arguments(request, "pause")
        pausing, regret = self._engine.undoable_pause(arguments.get("mode", "abort"), arguments.get("timeout"))
        await self._state.run(request, pausing, regret)
        return packed_reply(None)

    async def start_profile(self, request: Request) -> Response:
        """`start_profile`; the folder is one of the server's."""
        arguments = await self._arguments(request, "start_profile")
        if arguments.get("output_dir") is not None:
            arguments["output_dir"] = str(self._folders.to_save(str(arguments["output_dir"]), "output_dir")[0])
        return packed_reply(await self._state.run(request, self._engine.start_profile(**arguments)))

    async def call(self, name: str, request: Request) -> Response:
        """Any of `CALLS`."""
        method = getattr(self._engine, name)(**await self._arguments(request, name))
        return packed_reply(await self._state.run(request, method))

    async def _submit(self, items: Sequence[GenerateItem], carriage: Carriage) -> list[Stream]:
        """Start all of them, or none. Raises `RequestError` for more log-probabilities than one answer holds."""
        firsts = [item for item in items if item.index == 0]
        asked = ((item.logprobs, len(item.packed or b"") // 4, item.params) for item in firsts)
        await run_sized(len(firsts), lambda: check_body(asked))
        streams = await self._engine.submit_all([carriage.item(*each) for each in enumerate(items)])
        self._state.adopt(streams)
        return streams

    async def _arguments(self, request: Request, name: str) -> dict[str, Any]:
        """The arguments of a method, by their names."""
        arguments = await read_ask(request, dict[str, Any], MAX_CALL_BYTES)
        try:
            inspect.signature(getattr(AsyncEngine, name)).bind(self._engine, **arguments)
        except TypeError as error:
            raise RequestError(f"{name}: {error}", field="body") from None
        return arguments


def _post(name: str, handler: Handler, access: Access) -> Endpoint:
    return Endpoint(f"{PREFIX}/{name}", handler, ("POST",), access=access)


async def read_ask(request: Request, kind: type[Ask], max_bytes: int | None = None) -> Ask:
    """The body as a value of `kind`. Raises `RequestError` naming the field."""
    if request.headers.get("content-type") != MESSAGE_TYPE:  # no page of a browser can send this one unasked
        raise MediaTypeError(f"content-type must be {MESSAGE_TYPE}", field="content-type")
    raw = b""
    if max_bytes is None:
        raw = await request.body()
    else:
        async for part in request.stream():
            raw += part
            if len(raw) > max_bytes:
                raise RequestTooLargeError(f"the body of this call has at most {max_bytes} bytes", field="body")
    return unpack(raw, kind)


def unpack(raw: bytes | memoryview, kind: type[Ask]) -> Ask:
    """A value of `kind`. Raises `RequestError` naming the field."""
    try:
        return msgspec.msgpack.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        reason, field = invalid_part(error)
        raise RequestError(f"{field}: {reason}", field=field) from None
    except DECODE_ERRORS as error:
        raise RequestError(f"body is no MessagePack: {error}", field="body") from None


def packed_reply(value: Any) -> Response:
    """A result."""
    return Response(pack(value), media_type=MESSAGE_TYPE)


def _options(ask: GenerateAsk) -> Any:
    return {**ask.options, "return_prompt_logprobs": True} if ask.scores else ask.options


async def _packed(streams: Sequence[Stream], results: list[Any]) -> list[bytes]:
    """A list of what came of `streams`, each packed by itself: one with many log-probabilities takes a while."""
    parts, turn = [b"\xdd" + len(results).to_bytes(4, "big")], Turn()
    results.reverse()
    for stream in streams:
        await turn.give_way()
        write, size = functools.partial(pack, results.pop()), stream.sample.num_extra_values
        parts.append(write() if size <= INLINE_CHARACTERS else await run_sized(size, write))
    return parts


def _shown(sample: Generation) -> Generation:
    return sample if sample.error is None else msgspec.structs.replace(sample, error=shown(sample.error))


async def _parts(group: Pieces) -> AsyncIterator[bytes]:
    while pieces := await group.next_pieces():
        yield _frame(StreamPart([_shown(piece) for piece in pieces]))


def _frame(part: StreamPart) -> bytes:
    return framed(pack(part))


class _PartStream(EventStream):
    """`StreamPart`s, each behind its length."""

    media_type = MESSAGE_TYPE
    end = _frame(StreamPart(is_last=True))

    def failure(self, error: HeadraceError) -> bytes:
        return _frame(StreamPart(error=shown(error.info())))
