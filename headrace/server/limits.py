"""Bounds on what a client may send before anything looks at it. Owns the sizes of bodies and headers, and how a
connection whose body nobody wants is closed."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.server.connections import CLIENT, Connection
from headrace.server.errors import error_body, respond
from headrace.types.errors import DeadlineError, RequestTooLargeError

MAX_HEADER_BYTES = 64 << 10
MAX_PATH_BYTES = MAX_QUERY_BYTES = 8 << 10
LINGER_BYTES = 1 << 30
LINGER_SECONDS = 30.0
LINGER_SILENT_SECONDS = 2.0
STRANGER_LINGER_BYTES = 128 << 20
STRANGER_LINGER_SECONDS = 5.0
"""For somebody without a key, to whom little is owed."""
_SMALL_BODY_BYTES = 64 << 10
_SMALL_BODY_SECONDS = 0.05


class BodyTimeoutError(DeadlineError):
    """The client did not send its body in time."""

    status = 408


class Limits:
    """ASGI middleware: a body over `max_body_bytes` is 413, announced or not, to the route that reads it, which knows
    what a call means that did not get through. Headers over 64 KiB are 431.

    On a connection over the server's number all but `open_paths` is 503.
    """

    def __init__(
        self, app: ASGIApp, max_body_bytes: int, body_timeout: float, open_paths: Collection[str] = ()
    ) -> None:
        self._app = app
        self._open_paths = frozenset(open_paths)
        self._max_body_bytes = max_body_bytes
        self._body_timeout = body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        values = dict(scope["headers"])
        length, num_announced = values.get(b"content-length"), 0
        if length is not None:
            num_announced = int(length) if length.isdigit() and len(length) < 19 else 1 << 62
        is_chunked = b"transfer-encoding" in values
        app = self._refusal(scope, num_announced, is_ambiguous=is_chunked and length is not None) or self._app
        if num_announced == 0 and not is_chunked:
            await app(scope, receive, send)
            return
        announced = None if is_chunked else num_announced
        body = _Body(scope, receive, send, announced, self._max_body_bytes, self._body_timeout)
        try:
            await app(scope, body.receive, body.send)
        finally:
            if body.owes_end:
                await body.finish()

    def _refusal(self, scope: Scope, num_announced: int, *, is_ambiguous: bool) -> ASGIApp | None:
        """The answer to what is refused by its headers alone. Chunks beside a length are ambiguous: whoever stands in
        front of this server may believe the other of the two."""
        num_header_bytes = sum(map(len, itertools.chain.from_iterable(scope["headers"])))
        if num_header_bytes > MAX_HEADER_BYTES or len(scope["query_string"]) > MAX_QUERY_BYTES:
            message = f"headers are over {MAX_HEADER_BYTES} bytes or the query over {MAX_QUERY_BYTES}"
            return respond(error_body(431, message))
        if len(scope["raw_path"]) > MAX_PATH_BYTES:
            return respond(error_body(414, f"the path is over {MAX_PATH_BYTES} bytes"))
        if is_ambiguous:
            return respond(error_body(400, "transfer-encoding and content-length exclude each other"))
        if scope["state"][CLIENT].is_crowded and scope["path"] not in self._open_paths:
            return respond(error_body(503, "too many connections", retryable=True))
        return None


class _Body:
    """One request's body on its way in. Stands between the server and the application on both sides.

    A reply that is sent before the body was read ends the connection: reading what nobody wants, perhaps without end,
    would be work for nothing. But a client that still sends would see a reset instead of the reply if the connection
    closed at once; so what it sends is read and forgotten, within bounds, after the reply.
    """

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, announced: int | None, max_bytes: int, timeout: float
    ) -> None:
        self._receive = receive
        self._send = send
        self._announced = announced
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._deadline = asyncio.get_running_loop().time() + timeout
        self._num_bytes = 0
        self._client: Connection = scope["state"][CLIENT]
        self._linger_bytes, self._linger_seconds = LINGER_BYTES, LINGER_SECONDS
        self._is_read = False
        self.owes_end = False
        """An early reply was sent, all but its end."""

    async def receive(self) -> Message:
        """The next part; `RequestTooLargeError` beyond the bound, `BodyTimeoutError` when it does not come."""
        if self._is_read:
            return await self._receive()
        if (self._announced or 0) > self._max_bytes:
            raise too_large(self._announced or 0, self._max_bytes)
        if self._client.has_all:
            message = await self._next()
        else:
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
            if message["status"] == 401:
                self._linger_bytes, self._linger_seconds = STRANGER_LINGER_BYTES, STRANGER_LINGER_SECONDS
            if self._announced is not None and self._announced <= _SMALL_BODY_BYTES:
                await self._forget(_SMALL_BODY_SECONDS, _SMALL_BODY_SECONDS)
            if not self._is_read:
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await self._send(message)
        else:
            self.owes_end = not message.get("more_body", False)
            await self._send({**message, "more_body": True})

    async def finish(self) -> None:
        """End an early reply, and with it the connection, once the client has seen it."""
        self._client.is_lingering = True
        await self._forget(self._linger_seconds, LINGER_SILENT_SECONDS)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _next(self) -> Message:
        message = await self._receive()
        self._num_bytes += len(message.get("body", b""))
        self._is_read = not message.get("more_body", False)
        return message

    async def _forget(self, seconds: float, silent_seconds: float) -> None:
        """Read and forget what comes, up to so many bytes on the wire."""
        end = self._client.num_received + self._linger_bytes
        try:
            async with asyncio.timeout(seconds):
                while not self._is_read and self._client.num_received < end:
                    async with asyncio.timeout(silent_seconds):
                        await self._next()
        except TimeoutError:
            pass


def too_large(num_bytes: int, max_bytes: int) -> RequestTooLargeError:
    """What a body over the bound is answered."""
    return RequestTooLargeError(f"body has {num_bytes} bytes or more, over {max_bytes}", field="body")
