"""Calls over HTTP: one is sent, its answer or its typed error comes back by its deadline. Owns the connections, and
what becomes of everything that may go wrong between a client and its server. Knows no call.

What is asked of a server is written once, as coroutines over a `Transport`. That of `AsyncClient` waits on the caller's
loop; that of `Client` blocks, so that the same coroutines never wait and are run without a loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket
import time
import weakref
from collections.abc import AsyncGenerator, Coroutine, Iterator
from typing import Any, Protocol

import httpx
import msgspec

from headrace.engine.calls import outlast
from headrace.ipc.codec import DECODE_ERRORS
from headrace.types.errors import (
    ConfigError,
    DeadlineError,
    ErrorInfo,
    HeadraceError,
    NotFoundError,
    RequestError,
    ShutdownError,
    UnavailableError,
    UnreachableError,
)

CONNECT_SECONDS = 30.0


class HttpCall(msgspec.Struct, frozen=True, kw_only=True):
    """What is sent. `name` is the method's, for errors; `timeout` is for the whole call, of a stream for each part."""

    name: str
    path: str
    key: str | None
    timeout: float
    content: bytes = b""
    media_type: str = ""
    method: str = "POST"
    key_field: str = "api_key"

    def headers(self) -> dict[str, str]:
        """The headers of the request."""
        headers = {"content-type": self.media_type} if self.media_type else {}
        return headers if self.key is None else {**headers, "authorization": f"Bearer {self.key}"}


class HttpAnswer(msgspec.Struct, frozen=True):
    """What came back of a call that succeeded."""

    body: bytearray
    headers: httpx.Headers
    own_end: tuple[str, int]
    """Of the connection that it came on."""


class Transport(Protocol):
    """Carries calls to one server."""

    @property
    def is_closed(self) -> bool: ...

    async def send(self, call: HttpCall) -> HttpAnswer:
        """The answer. Raises the server's error, `DeadlineError` naming the call, or `UnreachableError`."""
        ...

    def stream(self, call: HttpCall) -> AsyncGenerator[bytes]:
        """The answer's bytes as they come. Raises as `send`."""
        ...

    async def outlast(self, cleaning: Coroutine[Any, Any, None]) -> None:
        """Await what undoes a thing that failed: no cancellation ends it."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


class LoopTransport:
    """Waits on the caller's event loop, which is always the same one: connections cannot be used on another."""

    def __init__(self, url: str) -> None:
        self._http = httpx.AsyncClient(base_url=url, trust_env=False, limits=_LIMITS)
        self._loop: asyncio.AbstractEventLoop | None = None

    async def send(self, call: HttpCall) -> HttpAnswer:
        """See `Transport`."""
        http = self._opened(call)
        with _failures(call, self):
            try:
                async with asyncio.timeout(call.timeout), http.stream(**_request(call)) as reply:
                    body, own_end = bytearray(), _own_end(reply)
                    async for chunk in reply.aiter_raw():
                        body += chunk
            except TimeoutError:
                raise _late(call) from None
            _raise_for(call, reply.status_code, body)
            return HttpAnswer(body, reply.headers, own_end)

    async def stream(self, call: HttpCall) -> AsyncGenerator[bytes]:
        """See `Transport`."""
        http = self._opened(call)
        with _failures(call, self):
            async with http.stream(**_request(call)) as reply:
                if reply.status_code != httpx.codes.OK:
                    _raise_for(call, reply.status_code, await reply.aread())
                async for chunk in reply.aiter_raw():
                    yield chunk

    async def outlast(self, cleaning: Coroutine[Any, Any, None]) -> None:
        """See `Transport`."""
        await outlast(cleaning)

    @property
    def is_closed(self) -> bool:
        """See `Transport`."""
        return self._http.is_closed

    async def close(self) -> None:
        """See `Transport`."""
        await self._http.aclose()

    def _opened(self, call: HttpCall) -> httpx.AsyncClient:
        self._loop = self._loop or asyncio.get_running_loop()
        if self._loop is not asyncio.get_running_loop():
            raise UnavailableError(f"{call.name}: this client belongs to another event loop; make one for each")
        if self.is_closed:
            raise _closed(call)
        return self._http


class BlockingTransport:
    """Blocks. Its coroutines never wait (`headrace.engine.calls.run_here`), and may be run in any thread."""

    def __init__(self, url: str) -> None:
        self._make = functools.partial(httpx.Client, base_url=url, trust_env=False, limits=_LIMITS)
        self._http, self._pid = self._make(), os.getpid()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._extensions = {"trace": self._note_socket}
        self.is_closed = False

    async def send(self, call: HttpCall) -> HttpAnswer:
        """See `Transport`. The deadline is looked at between two parts of an answer, each of which has it too."""
        deadline, http = time.monotonic() + call.timeout, self._opened(call)
        with _failures(call, self), http.stream(**_request(call), extensions=self._extensions) as reply:
            body, own_end = bytearray(), _own_end(reply)
            for chunk in reply.iter_raw():
                body += chunk
                if time.monotonic() > deadline:
                    raise _late(call)
            _raise_for(call, reply.status_code, body)
            return HttpAnswer(body, reply.headers, own_end)

    async def stream(self, call: HttpCall) -> AsyncGenerator[bytes]:
        """See `Transport`."""
        http = self._opened(call)
        with _failures(call, self), http.stream(**_request(call), extensions=self._extensions) as reply:
            if reply.status_code != httpx.codes.OK:
                _raise_for(call, reply.status_code, reply.read())
            for chunk in reply.iter_raw():
                yield chunk

    async def outlast(self, cleaning: Coroutine[Any, Any, None]) -> None:
        """See `Transport`."""
        await cleaning

    async def close(self) -> None:
        """See `Transport`. A thread that waits for an answer is woken: to close a socket alone would not do it."""
        self.is_closed = True
        if self._pid == os.getpid():
            for each in list(self._sockets):
                with contextlib.suppress(OSError):  # it is closed already
                    each.shutdown(socket.SHUT_RDWR)
        self._http.close()

    def _note_socket(self, event: str, info: dict[str, Any]) -> None:
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._sockets.add(info["return_value"].get_extra_info("socket"))

    def _opened(self, call: HttpCall) -> httpx.Client:
        """The connections of this process: on one that a fork shares with its parent, each would read the other's
        answers."""
        if self.is_closed:
            raise _closed(call)
        if self._pid != os.getpid():
            self._http, self._sockets = self._make(), weakref.WeakSet()
            self._pid = os.getpid()  # last: another thread of the fork may look meanwhile
        return self._http


# Proxies and keys that the environment names are for the web, not for a replica: `trust_env` is off.
_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=64)


def _own_end(reply: httpx.Response) -> tuple[str, int]:
    """To be asked before the body is read, with which the connection may end."""
    stream = reply.extensions.get("network_stream")
    host, port, *_ = stream and stream.get_extra_info("client_addr") or ("", 0)
    return host, port


def _request(call: HttpCall) -> dict[str, Any]:
    timeout = httpx.Timeout(call.timeout, connect=min(call.timeout, CONNECT_SECONDS))
    return {
        "method": call.method,
        "url": call.path,
        "content": call.content or None,
        "headers": call.headers(),
        "timeout": timeout,
    }


def check_url(url: Any) -> str:
    """The base of all routes. `ConfigError` for what is none."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise ConfigError(f"url {url!r} is no address: {error}", field="url") from None
    # A name in it would take the place of the key, and a query that of the route.
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo or parsed.query:
        raise ConfigError(f"url {url!r} is no address like http://127.0.0.1:30000", field="url")
    return str(parsed).rstrip("/")


def check_key(key: Any, field: str) -> str | None:
    """A bearer key. `ConfigError` for what no server can have."""
    if key is None or isinstance(key, str) and key.strip() == key != "" and key.isascii() and key.isprintable():
        return key
    raise ConfigError(f"{field} must be printable ASCII, not empty, without spaces around it", field=field)


@contextlib.contextmanager
def _failures(call: HttpCall, transport: Transport) -> Iterator[None]:
    try:
        yield
    except httpx.TimeoutException as error:
        if isinstance(error, httpx.ConnectTimeout) and call.timeout > CONNECT_SECONDS:
            raise UnreachableError(f"{call.name}: the server took no connection in {CONNECT_SECONDS:g} s") from None
        raise _late(call) from None
    except (httpx.TransportError, RuntimeError) as error:
        if transport.is_closed:  # meanwhile
            raise _closed(call) from None
        if isinstance(error, RuntimeError):
            raise
        raise UnreachableError(f"{call.name}: no answer from the server: {error or type(error).__name__}") from None


def _closed(call: HttpCall) -> ShutdownError:
    return ShutdownError(f"{call.name}: this client is closed")


def _late(call: HttpCall) -> DeadlineError:
    return DeadlineError(f"{call.name} had no answer within {call.timeout:g} s", field="timeout")


class _ErrorBody(msgspec.Struct):
    """As `headrace.server.errors` writes it, and, without `err_type`, whoever else stands in the way."""

    message: str = ""
    param: str | None = None
    retryable: bool = False
    err_type: str = ""


def _raise_for(call: HttpCall, status: int, body: bytes | bytearray) -> None:
    """Raise the error that an answer is, if it is one."""
    if status == httpx.codes.OK:
        return
    try:
        told = msgspec.json.decode(body, type=_ErrorBody)
    except DECODE_ERRORS:
        told = _ErrorBody()
    message = told.message or f"{call.name}: the server answered {status}"
    if told.err_type:
        raise ErrorInfo(told.err_type, message, told.param or "").to_exception()
    if status == httpx.codes.UNAUTHORIZED:
        raise ConfigError(f"{call.name}: the server refuses this {call.key_field}", field=call.key_field)
    field = told.param or ""
    if status in (httpx.codes.NOT_FOUND, httpx.codes.METHOD_NOT_ALLOWED):
        raise NotFoundError(f"{call.name}: no such route on this server: {message}", field="url")
    if told.retryable or status in (502, 503, 504):
        raise (UnreachableError if told.retryable else UnavailableError)(message, field=field)
    raise (RequestError if status < 500 else HeadraceError)(message, field=field)
