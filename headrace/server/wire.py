"""Bytes in and out: JSON bodies, JSON replies, server-sent events, and the watch for clients that go away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from headrace.engine import Stream
from headrace.server import errors
from headrace.types.errors import HeadraceError, RequestError

JSON_TYPE = "application/json"
DONE_EVENT = b"data: [DONE]\n\n"
_ENCODER = msgspec.json.Encoder()

Value = TypeVar("Value")


def json_reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`value` as a JSON response; numbers that are not finite become null."""
    return Response(_ENCODER.encode(value), status, headers, JSON_TYPE)


def event(value: Any) -> bytes:
    """`value` as one server-sent event."""
    return b"data: " + _ENCODER.encode(value) + b"\n\n"


async def read_object(request: Request) -> dict[str, Any]:
    """The JSON object in the body. Raises `RequestError` naming `body` when it is anything else."""
    return decode_object(await request.body())


def decode_object(raw: bytes) -> dict[str, Any]:
    """As `read_object`, from bytes."""
    if not raw.strip():
        raise RequestError("body is empty; a JSON object is needed", field="body")
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
    present = {key: value for key, value in values.items() if value is not None}
    try:
        return msgspec.convert(present, kind, strict=strict)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$")
        field = path.rstrip("`").lstrip(".").replace("[...]", "") or "body"
        raise RequestError(f"{field}: {reason}", field=field) from None


def cancel_all(streams: Iterable[Stream]) -> None:
    """Free sequences whose answer nobody reads; those that have ended are left alone."""
    for stream in streams:
        stream.cancel()


@contextmanager
def dropping(receive: Receive, cancel: Callable[[], None], on_disconnect: Callable[[], None]) -> Iterator[None]:
    """Call `on_disconnect` and `cancel` when the client goes away, `cancel` also when the block is left for any reason.

    For use once the body is read and until the answer is: whatever the client's connection then brings is its end.
    """

    def on_end(watcher: asyncio.Future[Message]) -> None:
        if not watcher.cancelled():
            on_disconnect()
        cancel()

    watcher = asyncio.ensure_future(receive())
    watcher.add_done_callback(on_end)
    try:
        yield
    finally:
        watcher.cancel()
        cancel()


class EventStream(Response):
    """Server-sent events from an iterator of encoded events, ended by [DONE].

    The headers wait for the first event, so that a request which fails before it gets its proper status. `cancel`
    frees what is behind `events`; it is called when the client goes away, after `on_disconnect`, and at the end.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        cancel: Callable[[], None],
        on_disconnect: Callable[[], None],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.body = b""
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._events = events
        self._cancel = cancel
        self._on_disconnect = on_disconnect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with dropping(receive, self._cancel, self._on_disconnect):
            try:
                first = await anext(self._events, DONE_EVENT)
            except HeadraceError as error:
                reply = errors.respond(error.status, errors.body_of(error), retryable=error.retryable)
                await reply(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._send_all(first, send)
            await send({"type": "http.response.body", "body": DONE_EVENT, "more_body": False})

    async def _send_all(self, first: bytes, send: Send) -> None:
        if first is DONE_EVENT:
            return
        await self._send(first, send)
        try:
            async for chunk in self._events:
                await self._send(chunk, send)
        except HeadraceError as error:
            await self._send(event(errors.event_body(error)), send)

    async def _send(self, chunk: bytes, send: Send) -> None:
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
