"""Bytes in and out: JSON bodies, JSON replies, server-sent events, and the watch for clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from headrace.config.json_bounds import BODY, excess
from headrace.server import errors
from headrace.server.carrying import Carriage, carriage_of
from headrace.server.connections import CLIENT, Connection
from headrace.text import INLINE_CHARACTERS, run_sized
from headrace.types.errors import HeadraceError, RequestError, RequestTooLargeError

JSON_TYPE = "application/json"
DONE_EVENT = b"data: [DONE]\n\n"
_HUGE_BYTES = 1 << 20
_NO_SUCH_WORD = "Invalid enum value "  # as msgspec begins
_CHUNK_BYTES = 1 << 18
# U+0085, U+2028 and U+2029, which JSON leaves as they are; they can only be inside its strings.
_LINE_SEPARATORS = tuple((chr(code).encode(), b"\\u%04x" % code) for code in (0x85, 0x2028, 0x2029))

Value = TypeVar("Value")


def json_reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`value` as a JSON response; numbers that are not finite become null."""
    return Response(encode_json(value), status, headers, JSON_TYPE)


encode_json = msgspec.json.Encoder().encode
"""A value as JSON bytes; numbers that are not finite become null."""


def event(value: Any) -> bytes:
    """`value` as one server-sent event. A line of it has no character that a client which reads text lines may take for
    the end of one."""
    written = encode_json(value)
    if not written.isascii():
        for separator, escape in _LINE_SEPARATORS:
            written = written.replace(separator, escape)
    return b"data: %b\n\n" % written


async def read_body(request: Request, make: Callable[[dict[str, Any]], Value]) -> Value:
    """What `make` makes of the JSON object in the body. Raises `RequestError` naming `body` when it is anything else.

    A large one is read and made in another thread, so that streams go on: a few bytes may cost `make` as much as a page
    of text. It must not touch what the loop owns. Huge ones are decoded one at a time: each keeps the interpreter, and
    many times its size, while it is.
    """
    raw = await request.body()
    if len(raw) <= INLINE_CHARACTERS:  # nearly always
        return make(decode_object(raw))
    async with request.app.state.server.huge_bodies if len(raw) > _HUGE_BYTES else contextlib.nullcontext():
        return await run_sized(len(raw), lambda: make(decode_object(raw)))


def decode_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in these bytes."""
    if not raw.strip():
        raise RequestError("body is empty; a JSON object is needed", field="body")
    too_much = excess(raw, BODY)
    if too_much is not None:
        message = f"body has {too_much} or more; no request needs so many"
        raise RequestTooLargeError(message, field="body")
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"body is not JSON: {error}", field="body") from None
    except RecursionError:
        raise RequestError("body is nested too deeply", field="body") from None
    if not isinstance(value, dict):
        raise RequestError("body must be a JSON object", field="body")
    return value


def convert(values: Mapping[str, Any], kind: type[Value], *, strict: bool = True) -> Value:
    """`values` as the struct `kind`; nulls and unknown keys are left out. Raises `RequestError` naming the field."""
    if None in values.values():
        values = {key: value for key, value in values.items() if value is not None}
    try:
        return msgspec.convert(values, kind, strict=strict)
    except msgspec.ValidationError as error:
        reason, field = invalid_part(error)
        words = _words_of(kind, field) if reason.startswith(_NO_SUCH_WORD) else ""
        if words:
            reason = f"must be one of {words}, not {reason.removeprefix(_NO_SUCH_WORD)}"
        raise RequestError(f"{field}: {reason}", field=field) from None


def invalid_part(error: msgspec.ValidationError) -> tuple[str, str]:
    """(what is wrong, the field of the body that it is wrong with)."""
    reason, _, path = str(error).partition(" - at `$")
    return reason, path.rstrip("`").lstrip(".").replace("[...]", "") or "body"


def _words_of(kind: Any, field: str) -> str:
    """The words that a field of the struct `kind` may be, if it is one of few."""
    types = [each.type for each in msgspec.structs.fields(kind) if each.name == field]
    literals = [part for each in types for part in (each, *get_args(each)) if get_origin(part) is Literal]
    return ", ".join(word for literal in literals for word in get_args(literal))


@contextlib.contextmanager
def dropping(scope: Scope, cancel: Callable[[], None], on_disconnect: Callable[[], None]) -> Iterator[None]:
    """Call `on_disconnect` and `cancel` when the client goes away, `cancel` also when the block is left."""

    def on_lost() -> None:
        on_disconnect()
        cancel()

    client: Connection = scope["state"][CLIENT]
    if client.is_gone:
        on_lost()
    else:
        client.on_lost = on_lost
    try:
        yield
    finally:
        client.on_lost = None
        cancel()


class PartsReply(Response):
    """A JSON response given in parts, sent one by one: never joined, so that a large one keeps no event loop."""

    media_type = JSON_TYPE

    def __init__(
        self,
        parts: Sequence[bytes | memoryview],
        media_type: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status_code = 200
        self.media_type = media_type or self.media_type
        self.background = None
        self.body = b""
        self._parts = parts
        self._num_bytes = sum(map(len, parts))
        self.init_headers({"content-length": str(self._num_bytes), **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        num_left = self._num_bytes
        for chunk in _in_chunks(self._parts) if num_left > _CHUNK_BYTES else (b"".join(self._parts),):
            num_left -= len(chunk)
            await send({"type": "http.response.body", "body": chunk, "more_body": num_left > 0})


def _in_chunks(parts: Sequence[bytes | memoryview]) -> Iterator[bytes]:
    """The same bytes with small parts joined."""
    chunk: list[bytes | memoryview] = []
    num_bytes = 0
    for part in parts:
        chunk.append(part)
        num_bytes += len(part)
        if num_bytes >= _CHUNK_BYTES:
            yield b"".join(chunk)
            chunk, num_bytes = [], 0
    if chunk:
        yield b"".join(chunk)


class EventStream(Response):
    """Server-sent events from an iterator of encoded events, ended by [DONE].

    The headers wait for the first event, so that a request which fails before it gets its proper status. `cancel`
    frees what is behind `events`; it is called when the client goes away, after `on_disconnect`, and at the end.
    """

    media_type = "text/event-stream"
    end = DONE_EVENT

    def __init__(
        self,
        events: AsyncIterator[bytes],
        cancel: Callable[[], None],
        on_disconnect: Callable[[], None],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._events = events
        self._cancel = cancel
        self._on_disconnect = on_disconnect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with dropping(scope, self._cancel, self._on_disconnect):
            try:
                first = await anext(self._events, self.end)
            except HeadraceError as error:
                await errors.respond(errors.body_of(error))(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            # In a task of its own: woken for every piece, it need not come down through the whole application.
            client: Connection = scope["state"][CLIENT]
            await asyncio.create_task(self._send_all(first, send, carriage_of(scope), client))
            await send({"type": "http.response.body", "body": self.end, "more_body": False})

    def failure(self, error: HeadraceError) -> bytes:
        """What is sent of an error after the first event."""
        return event(errors.event_body(error))

    async def _send_all(self, first: bytes, send: Send, carriage: Carriage, client: Connection) -> None:
        if first is self.end:
            return

        async def send_message(part: bytes) -> None:
            await send({"type": "http.response.body", "body": part, "more_body": True})

        send_part = send_message if carriage.is_carried else client.send_part
        await send_message(first)
        try:
            async for part in self._events:
                await send_part(part)
        except HeadraceError as error:
            carriage.note_failure(error)
            await send_part(self.failure(error))
