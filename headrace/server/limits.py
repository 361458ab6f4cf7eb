"""Bounds on what a client may send before anything looks at it. Owns the sizes of bodies and headers."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.server.errors import body_of, error_body, respond
from headrace.types.errors import HeadraceError, RequestTooLargeError

MAX_HEADER_BYTES = 64 << 10
MAX_QUERY_BYTES = 8 << 10


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
        num_header_bytes = sum(len(name) + len(value) for name, value in scope["headers"])
        if num_header_bytes > MAX_HEADER_BYTES or len(scope["query_string"]) > MAX_QUERY_BYTES:
            body = error_body(431, f"headers are over {MAX_HEADER_BYTES} bytes or the query over {MAX_QUERY_BYTES}")
            await respond(431, body)(scope, receive, send)
            return
        announced = _content_length(scope)
        if announced > self._max_body_bytes:
            error = self._too_large(announced)
            await respond(error.status, body_of(error))(scope, receive, send)
            return
        await self._app(scope, self._bounded(receive) if _has_body(scope) else receive, send)

    def _bounded(self, receive: Receive) -> Receive:
        num_bytes = 0
        is_complete = False
        deadline = asyncio.get_running_loop().time() + self._body_timeout

        async def bounded() -> Message:
            nonlocal num_bytes, is_complete
            if is_complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise BodyTimeoutError(f"body did not come within {self._body_timeout:g} s", field="body") from None
            num_bytes += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if num_bytes > self._max_body_bytes:
                raise self._too_large(num_bytes)
            return message

        return bounded

    def _too_large(self, num_bytes: int) -> RequestTooLargeError:
        return RequestTooLargeError(f"body has {num_bytes} bytes or more, over {self._max_body_bytes}", field="body")


def _has_body(scope: Scope) -> bool:
    return any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])


def _content_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value[:18]) if len(value) < 19 else 1 << 62
    return 0
