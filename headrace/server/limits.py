"""Bounds on what a client may send before anything looks at it. Owns the sizes of bodies and headers."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.server.errors import body_of, error_body, respond
from headrace.types.errors import HeadraceError, RequestTooLargeError

MAX_HEADER_BYTES = 64 << 10
MAX_QUERY_BYTES = 8 << 10
LINGER_SECONDS = 0.05
_SMALL_BODY_BYTES = 64 << 10


class BodyTimeoutError(HeadraceError):
    """The client did not send its body in time."""

    status = 408


class Limits:
    """ASGI middleware: a body over `max_body_bytes` is 413, announced or not; headers over 64 KiB are 431."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, body_timeout: float) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._body_timeout = body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = _announced_bytes(scope)
        if announced != 0:
            body = _Body(receive, send, announced, self._max_body_bytes, self._body_timeout)
            receive, send = body.receive, body.send
        num_header_bytes = sum(len(name) + len(value) for name, value in scope["headers"])
        if num_header_bytes > MAX_HEADER_BYTES or len(scope["query_string"]) > MAX_QUERY_BYTES:
            message = f"headers are over {MAX_HEADER_BYTES} bytes or the query over {MAX_QUERY_BYTES}"
            await respond(431, error_body(431, message))(scope, receive, send)
        elif announced is not None and announced > self._max_body_bytes:
            error = too_large(announced, self._max_body_bytes)
            await respond(error.status, body_of(error))(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class _Body:
    """One request's body on its way in. Stands between the server and the application on both sides.

    A reply that is sent before the body was read ends the connection: reading what nobody wants, perhaps without end,
    would be work for nothing. The client is given `LINGER_SECONDS` to see the reply before the connection closes.
    """

    def __init__(self, receive: Receive, send: Send, announced: int | None, max_bytes: int, timeout: float) -> None:
        self._receive = receive
        self._send = send
        self._announced = announced
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._deadline = asyncio.get_running_loop().time() + timeout
        self._num_bytes = 0
        self._is_read = False

    async def receive(self) -> Message:
        """The next part; `RequestTooLargeError` beyond the bound, `BodyTimeoutError` when it does not come."""
        if self._is_read:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._next()
        except TimeoutError:
            raise BodyTimeoutError(f"body did not come within {self._timeout:g} s", field="body") from None
        if self._num_bytes > self._max_bytes:
            self._is_read = False
            raise too_large(self._num_bytes, self._max_bytes)
        return message

    async def send(self, message: Message) -> None:
        """Pass a reply on; the first of an early one also says that the connection will close."""
        if self._is_read:
            await self._send(message)
        elif message["type"] == "http.response.start":
            if self._announced is not None and self._announced <= _SMALL_BODY_BYTES:
                await self._linger()
            if not self._is_read:
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await self._send(message)
        elif message.get("more_body", False):
            await self._send(message)
        else:
            await self._send({**message, "more_body": True})
            await self._linger()
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _next(self) -> Message:
        message = await self._receive()
        self._num_bytes += len(message.get("body", b""))
        self._is_read = not message.get("more_body", False)
        return message

    async def _linger(self) -> None:
        """Read and forget, for a moment."""
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                while not self._is_read:
                    await self._next()
        except TimeoutError:
            pass


def too_large(num_bytes: int, max_bytes: int) -> RequestTooLargeError:
    """What a body over the bound is answered."""
    return RequestTooLargeError(f"body has {num_bytes} bytes or more, over {max_bytes}", field="body")


def _announced_bytes(scope: Scope) -> int | None:
    """The length of the body as announced; None when it comes in chunks, 0 when there is none."""
    num_bytes: int | None = 0
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            num_bytes = int(value[:18]) if len(value) < 19 else 1 << 62
        elif name == b"transfer-encoding":
            num_bytes = None
    return num_bytes
