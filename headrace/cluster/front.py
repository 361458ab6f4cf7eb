"""The router's side to clients: HTTP/1.1 on a listening socket, each request handed to one coroutine.

Owns connections, their deadlines and bounds, and that an answer is complete or visibly broken. Knows no route:
`Handler` says by a request's head whether its body is wanted, and answers it. The server's own front costs a request
0.2 ms, which an engine does not feel and a router does (docs/benchmarks.md).
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any, NamedTuple, Protocol, cast

import msgspec

from headrace.cluster.eager import EagerCall
from headrace.cluster.exchange import Exchange
from headrace.cluster.http_parts import (
    MAX_HEAD_BYTES,
    ChunkReader,
    FramingError,
    Head,
    HeadReader,
    parse_request,
)
from headrace.server.errors import body_of, error_body
from headrace.server.half_closed import INTERIM, HalfClosed
from headrace.server.listening import SPARE_DESCRIPTORS, raise_descriptor_limit
from headrace.types.errors import DeadlineError, HeadraceError, InternalError, RequestError

FIRST_BYTE_SECONDS = 30.0
HEAD_SECONDS = 10.0
IDLE_SECONDS = 75.0
LINGER_SECONDS = 5.0
"""A refused client that still sends is read and forgotten for so long, or a reset would take the answer from it."""
LOOK_SECONDS = 0.5
DRAIN_LOOK_SECONDS = 0.02
CUT_SECONDS = 1.0
"""What is cut off in the end has so long to give back what it holds."""
_MAX_BACKLOG_BYTES = 256 << 10
_BACKLOG = 4096
_END_OF_HEAD = b"\r\n\r\n"
_JSON = (b"content-type", b"application/json")

logger = logging.getLogger(__name__)


class FrontBounds(msgspec.Struct, frozen=True):
    """What a client may send, and how long it may take. Seconds and bytes."""

    max_body_bytes: int
    body_timeout: float
    write_timeout: float


class EarlyAnswer(NamedTuple):
    """The answer to a request that is not read further: its error body, and headers beside those of every error."""

    body: dict[str, Any]
    headers: tuple[tuple[bytes, bytes], ...] = ()


class Handler(Protocol):
    """What stands behind the connections."""

    def refusal(self, head: Head) -> EarlyAnswer | None:
        """The answer to a request that is not to be read further; None for one that is."""
        ...

    async def answer(self, head: Head, body: bytes, exchange: Exchange) -> None:
        """Answer a request. Cancelled when the client goes away; a `HeadraceError` is answered here. No task of
        asyncio's, but an `EagerCall`."""
        ...


class ClientConnection(asyncio.Protocol):
    """A client. One request at a time; what it sends meanwhile waits."""

    def __init__(self, front: Front) -> None:
        self.front = front
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._heads = HeadReader(parse_request)
        self._head: Head | None = None
        self._chunks: ChunkReader | None = None
        self._chunk_parts: list[bytes] = []
        self._call: EagerCall | None = None
        self._drained: asyncio.Future[None] | None = None
        self._is_full = self._is_lost = self._is_lingering = False
        self._is_due = False
        """The next request is looked for soon."""
        self._exchange: Exchange | None = None
        self._half_closed: HalfClosed | None = None
        self._num_unsent, self._unsent_since = 0, 0.0
        self._limit = FIRST_BYTE_SECONDS
        self._waiting_since = self._loop.time()

    @property
    def is_closing(self) -> bool:
        """True when no further request is taken."""
        return self.front.is_closing

    @property
    def is_busy(self) -> bool:
        """True while a request is answered."""
        return self._call is not None

    def look(self, now: float) -> None:
        """End a wait for the client that is too long."""
        num_unsent = self._transport.get_write_buffer_size()
        if num_unsent == 0 or num_unsent != self._num_unsent:
            self._num_unsent, self._unsent_since = num_unsent, now
        if num_unsent and now - self._unsent_since > self.front.bounds.write_timeout:
            self._transport.abort()
        elif self._call is None and now - self._waiting_since > self._limit:
            if self._head is None or self._is_lingering:
                self._transport.abort()
            else:
                message = f"body did not come within {self._limit:g} s"
                late = error_body(408, message, param="body", retryable=True, err_type=DeadlineError.__name__)
                self._refuse(EarlyAnswer(late))

    def abort(self) -> None:
        """Close it now."""
        self._transport.abort()

    def close(self) -> None:
        """Close it; an answer that is whole is sent to its end."""
        (self._transport.abort if self.is_busy else self._transport.close)()

    async def drain(self) -> None:
        """Wait until the client has taken enough of what it was sent."""
        if self._is_full and not self._is_lost:
            self._drained = self._loop.create_future()
            await self._drained

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.write = self._transport.write
        """Sends bytes; never waits."""
        if self.front.logs_answers:
            peer = transport.get_extra_info("peername")
            self._client = f"{peer[0]}:{peer[1]}" if peer else "-"
        self.front.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True
        self.resume_writing()
        self.front.discard(self)
        if self._half_closed is not None:
            self._half_closed.close()
        if self._call is not None:
            self._call.cancel()

    def pause_writing(self) -> None:
        self._is_full = True

    def resume_writing(self) -> None:
        self._is_full = False
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._go_on()

    def eof_received(self) -> bool:
        """The client sends nothing more. What it has asked for is answered if it still listens; HTTP/1.0 has no way to
        find that out, nor has an answer that has begun."""
        is_old = self._head is not None and self._head.is_old
        is_asked = self._call is not None or self._is_due or self._is_full  # the last: by what waits behind an answer
        if self._is_lingering or is_old or not is_asked:
            return False
        if self._half_closed is None and (self._exchange is None or not self._exchange.has_begun):
            self._half_closed = HalfClosed(self._loop, self._transport, self._probe)
        return self._half_closed is not None

    def _probe(self) -> None:
        if self._exchange is not None and not self._exchange.has_begun:
            self.write(INTERIM)

    def data_received(self, data: bytes) -> None:
        if self._is_lingering:
            return
        is_waiting = self._call is None and not self._is_due and not self._is_full
        if not self._buffer and self._head is None and is_waiting:
            if self._begin_at_once(data):
                return
            self._wait(HEAD_SECONDS)
        self._buffer += data
        if is_waiting:
            self._advance()
        elif len(self._buffer) > _MAX_BACKLOG_BYTES:
            self._transport.pause_reading()

    def _wait(self, seconds: float) -> None:
        self._limit, self._waiting_since = seconds, self._loop.time()

    def _advance(self) -> None:
        """Do what can be done with what has come."""
        try:
            if self._head is None:
                self._read_head()
            if self._head is not None and (body := self._read_body(self._head)) is not None:
                self._begin(self._head, body)
        except FramingError as error:
            self._refuse(EarlyAnswer(error_body(error.status, str(error), err_type=RequestError.__name__)))

    def _begin_at_once(self, data: bytes) -> bool:
        """Begin the request that `data` is, without a copy in the buffer; False if it is no more or less than one, or
        there is anything else about it."""
        end = data.find(_END_OF_HEAD)
        if not 0 <= end <= MAX_HEAD_BYTES:
            return False
        try:
            head = self._heads.read(data[:end])
        except FramingError:
            return False
        start = end + len(_END_OF_HEAD)
        size = head.body_size
        if size is None or len(data) - start != size or size > self.front.bounds.max_body_bytes:
            return False
        if head.expects_continue or self.front.handler.refusal(head) is not None:
            return False
        self._head = head
        self._begin(head, data[start:])
        return True

    def _read_head(self) -> None:
        end = self._buffer.find(_END_OF_HEAD)
        if end > MAX_HEAD_BYTES or end < 0 and len(self._buffer) > MAX_HEAD_BYTES:
            raise FramingError(f"headers are over {MAX_HEAD_BYTES} bytes", 431)
        if end < 0:
            return
        head = self._heads.read(bytes(self._buffer[:end]))
        del self._buffer[: end + len(_END_OF_HEAD)]
        refusal = self.front.handler.refusal(head)
        if refusal is None and (head.body_size or 0) > self.front.bounds.max_body_bytes:
            raise FramingError(f"body has {head.body_size} bytes, over {self.front.bounds.max_body_bytes}", 413)
        if refusal is not None:
            self._refuse(refusal, head)
            return
        self._head = head
        self._chunks = ChunkReader(self.front.bounds.max_body_bytes) if head.body_size is None else None
        if head.body_size is None or len(self._buffer) < head.body_size:
            self._wait(self.front.bounds.body_timeout)
        if head.expects_continue:
            self.write(INTERIM)

    def _read_body(self, head: Head) -> bytes | None:
        """The body, once it is whole."""
        if self._chunks is None:
            size = head.body_size or 0
            if len(self._buffer) < size:
                return None
            body = bytes(self._buffer[:size])
            del self._buffer[:size]
            return body
        self._chunk_parts += self._chunks.read(self._buffer)
        if self._chunks.is_wasteful:
            raise FramingError("the body's framing is out of all proportion to what is in it")
        if not self._chunks.is_complete:
            return None
        body, self._chunk_parts = b"".join(self._chunk_parts), []
        return body

    def _begin(self, head: Head, body: bytes) -> None:
        self._exchange = Exchange(self, head)
        self._call = EagerCall(self._answer(head, body, self._exchange), self._loop)
        self._call.go_on()

    async def _answer(self, head: Head, body: bytes, exchange: Exchange) -> None:
        """Have a request answered, and do what follows from that."""
        try:
            await self.front.handler.answer(head, body, exchange)
        except Exception as error:
            self._tell(exchange, error)
        finally:
            self._finish(exchange)

    def _finish(self, exchange: Exchange) -> None:
        """A request is answered, or not."""
        if self.front.logs_answers:
            exchange.log(self._client, self._head)
        self._call = self._head = self._exchange = None
        if self._is_lost:
            return
        if not exchange.is_complete:
            self._transport.abort()  # the client must not take what it has for the whole
        elif not exchange.keeps_connection:
            self._transport.close()
        elif self._buffer:
            self._go_on_soon()
        elif self._half_closed is not None:
            self._transport.close()
        else:
            self._wait(IDLE_SECONDS)

    def _tell(self, exchange: Exchange, error: Exception) -> None:
        """Answer with an error, where nothing is said yet."""
        if not isinstance(error, HeadraceError):
            logger.error("a request failed", exc_info=error)
            error = InternalError("internal error; the router's log has the details")
        if not exchange.has_begun and not self._is_lost:
            exchange.error(body_of(error))

    def _refuse(self, refusal: EarlyAnswer, head: Head | None = None) -> None:
        """Answer a request that is read no further; the connection ends with it, unless all of it is here."""
        last = head or Head([], 0, False)
        is_whole = head is not None and head.body_size == 0 and head.keeps_alive and refusal.body["code"] != 401
        if not is_whole:
            last = last.changed(keeps_alive=False, is_old=False)
        exchange = Exchange(self, last)
        exchange.error(refusal.body, *refusal.headers)
        if self.front.logs_answers:
            exchange.log(self._client, head or self._head)
        self._head = None
        if exchange.keeps_connection:
            self._go_on_soon()
            return
        self._buffer.clear()
        self._wait(LINGER_SECONDS)
        self._is_lingering = True
        self._transport.write_eof()

    def _go_on_soon(self) -> None:
        """Not at once: many may be answered without a wait, each within the one before."""
        self._is_due = True
        self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        """A request has its answer: the next one, which may be there already. None is begun while the client does not
        take its answers, nor behind the last one, and in the end nothing more is read."""
        self._is_due = False
        is_last = self._is_lost or self._is_lingering or self._transport.is_closing()
        if is_last or self._is_full or self._call is not None:
            return
        if self._head is None:
            self._wait(HEAD_SECONDS if self._buffer else IDLE_SECONDS)
        if self._buffer:
            self._advance()
        if self._half_closed is not None and self._call is None and not self._is_due:
            self._transport.close()  # what is left is no whole request, and will not be
        if len(self._buffer) <= _MAX_BACKLOG_BYTES or not (self._is_due or self._call is not None):
            self._transport.resume_reading()


class Front:
    """Listens, and looks after the connections. Lives on one event loop."""

    def __init__(self, handler: Handler, bounds: FrontBounds, *, logs_answers: bool = False) -> None:
        self.handler = handler
        self.logs_answers = logs_answers
        self.bounds = bounds
        self.is_closing = False
        self._connections: set[ClientConnection] = set()
        self._max_connections = max(16, (raise_descriptor_limit() - SPARE_DESCRIPTORS) // 2)
        """Each may have one to a replica."""

    async def start(self, listener: socket.socket) -> None:
        """Accept connections on `listener` from now on."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: ClientConnection(self), sock=listener, backlog=_BACKLOG)
        self._looking = loop.create_task(self._look())

    async def close(self, seconds: float) -> None:
        """Let what is being answered end within so many seconds, then close. Who comes meanwhile is answered, once."""
        self.is_closing = True
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while (num_busy := sum(each.is_busy for each in self._connections)) and loop.time() < end:
            await asyncio.sleep(DRAIN_LOOK_SECONDS)
        self._server.close()
        if num_busy:
            logger.warning("%d requests did not finish in %g s and are cut off", num_busy, seconds)
        cut = [each for each in self._connections if each.is_busy]
        for connection in list(self._connections):
            connection.close()
        self._looking.cancel()
        end = loop.time() + CUT_SECONDS
        while any(each.is_busy for each in cut) and loop.time() < end:
            await asyncio.sleep(DRAIN_LOOK_SECONDS)
        await asyncio.sleep(0)

    def add(self, connection: ClientConnection) -> None:
        """A client has connected; one too many is told so."""
        self._connections.add(connection)
        if len(self._connections) > self._max_connections:
            idle = next((each for each in self._connections if not each.is_busy and each is not connection), None)
            (idle or connection).abort()

    def discard(self, connection: ClientConnection) -> None:
        self._connections.discard(connection)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            now = asyncio.get_running_loop().time()
            for connection in list(self._connections):
                connection.look(now)


def not_found(what: str) -> dict[str, Any]:
    """The error body for a path that is no route."""
    return error_body(404, f"Not Found: {what}", kind="404")
