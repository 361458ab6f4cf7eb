"""One client's connection: how long it may take over what uvicorn waits for without a bound, and how much of what it
sends is parsed at once. Knows no route.

Owns when a connection is idle, late or stuck. Whoever runs the server looks at that now and then, which costs less than
a timer each.
"""

from __future__ import annotations

import asyncio
import http
import logging
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from headrace.server.framing import Parser, ParsingQueue
from headrace.server.half_closed import INTERIM, HalfClosed
from headrace.types.carried import CARRY_HEADER

FIRST_BYTE_SECONDS = 30.0
HEADER_SECONDS = 10.0
_MAX_BACKLOG_BYTES = 64 << 10

CLIENT = "headrace.client"
"""Key of a request's state: the `Connection` that it came on."""


class Connection(H11Protocol):
    """A connection that can say since when its client keeps the server waiting. Times are the loop's."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        queue: ParsingQueue,
        is_crowded: bool = False,
    ) -> None:
        parser = Parser(config.h11_max_incomplete_event_size)
        super().__init__(config, server_state, {**app_state, CLIENT: self})
        self.conn = self._parser = parser
        self._queue = queue
        self._waiting = bytearray()
        self.logger = _CLIENT_FAULTS
        self.is_crowded = is_crowded
        """The server has more connections than it wants: only a short answer is due."""
        self.is_lingering = False
        """The last answer is sent, and what is left of the request's body is read and forgotten."""
        self.on_lost: Callable[[], None] | None = None
        """To be called when the client goes away before its answer is complete."""
        self.num_streamed = 0
        """Bytes of answers so far that went by `send_part`."""
        self.used_at = self.loop.time()
        self._headers_since: float | None = self.used_at
        self._has_begun = False
        self._num_unsent = 0
        self._unsent_since = 0.0
        self._half_closed: HalfClosed | None = None

    @property
    def is_idle(self) -> bool:
        """True when closing it takes nothing from the client: no request is whole, or its answer is sent and taken."""
        return (self._is_between_requests or self.is_lingering) and self.transport.get_write_buffer_size() == 0

    @property
    def is_gone(self) -> bool:
        """True when there is nobody left to take the rest of an answer."""
        return not self._is_between_requests and (self.cycle.disconnected or self.transport.is_closing())

    @property
    def has_all(self) -> bool:
        """True when the end of the request's body has come."""
        return not self.cycle.more_body

    @property
    def num_received(self) -> int:
        """Bytes so far, framing included."""
        return self._parser.num_received

    def is_late(self, now: float) -> bool:
        """True when a request's headers do not come: the first byte within 30 s, the rest within 10 s of the first."""
        limit = HEADER_SECONDS if self._has_begun else FIRST_BYTE_SECONDS
        return self._headers_since is not None and now - self._headers_since > limit

    def is_stuck(self, now: float, limit: float) -> bool:
        """True when the client has taken nothing of what waits for it for `limit` seconds. To be asked regularly."""
        num_unsent = self.transport.get_write_buffer_size()
        if num_unsent == 0 or num_unsent != self._num_unsent:
            self._num_unsent, self._unsent_since = num_unsent, now
        return num_unsent > 0 and now - self._unsent_since > limit

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = self._flow = _Flow(transport, self._resume)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone, or was sent away."""
        super().connection_lost(exc)
        if self._half_closed is not None:
            self._half_closed.close()
        if self.on_lost is not None and self.is_gone:
            self.on_lost()

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends nothing more. What it has asked for is answered if it still listens. HTTP/1.0 has no way to
        find that out, nor has an answer that has begun, and a router that has stopped sending is gone: it may bring the
        same call again at once. May be called again, as reading goes on."""
        if not self._owes_answer or self.is_lingering or self._is_of_old_or_router:
            return False
        if self._half_closed is None and (self._is_between_requests or not self.cycle.response_started):
            self._half_closed = HalfClosed(self.loop, self.transport, self._probe)
        return self._half_closed is not None

    def on_response_complete(self) -> None:
        """An answer is sent: behind the last that is due a connection ends on which nothing more comes."""
        super().on_response_complete()
        self._close_if_cut()

    def _close_if_cut(self) -> None:
        """Close if nothing more comes, and what has come is no whole request that has not been answered."""
        if self._half_closed is not None and not self._owes_answer:
            self.transport.close()

    @property
    def _owes_answer(self) -> bool:
        """A whole request has come that is not answered, or bytes wait to be parsed."""
        return bool(self._waiting) or (not self._is_between_requests and self.has_all)

    @property
    def _is_of_old_or_router(self) -> bool:
        scope = self.scope
        return scope is not None and (scope["http_version"] == "1.0" or CARRY_HEADER in dict(scope["headers"]))

    async def verdict(self) -> None:
        """Wait until `is_gone` is known of a client that sends nothing more."""
        if self._half_closed is not None:
            await self._half_closed.verdict()

    def _probe(self) -> None:
        if not (self._is_between_requests or self.cycle.response_started or self.transport.is_closing()):
            self.transport.write(INTERIM)

    def data_received(self, data: bytes) -> None:
        """Bytes of the client. What costs much to parse waits in line with that of all other connections."""
        self.used_at = self.loop.time()
        is_first = not (self._waiting or self._flow.is_full or self._parser.is_in_chunks)
        if is_first and self._parser.is_slice(data) and not self.transport.is_closing():
            self._parse(data)  # nearly always
            return
        self._waiting += data
        while self._can_parse and not self._parser.is_in_chunks:
            self._parse(self._next_slice())
        self._resume()

    def parse_some(self) -> bool:
        """Parse a little of what waits, when this connection's turn has come; False when there is nothing to do now."""
        if self._can_parse:
            self._parse(self._next_slice())
            self._close_if_cut()
        self._flow.set_backlog(len(self._waiting))
        return self._can_parse

    @property
    def _can_parse(self) -> bool:
        return bool(self._waiting) and not self._flow.is_full and not self.transport.is_closing()

    def _resume(self) -> None:
        if not (self._waiting or self._flow.read_paused):
            return
        self._flow.set_backlog(len(self._waiting))
        if self._can_parse:
            self._queue.add(self)

    def _next_slice(self) -> bytes:
        size = self._parser.size_of_slice(self._waiting)
        data = bytes(self._waiting[:size])
        del self._waiting[:size]
        return data

    def _parse(self, data: bytes) -> None:
        super().data_received(data)
        if self._parser.is_in_chunks and self._parser.is_wasteful and not self.transport.is_closing():
            self.send_400_response("The body's framing is out of all proportion to what is in it.")
        if not self._is_between_requests:
            self._headers_since = None
        elif self._headers_since is None or not self._has_begun:
            self._headers_since = self.used_at
        self._has_begun = True

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, or too much of it; in the middle of an answer there is nothing left to say."""
        text, status = msg.encode("ascii"), self._parser.refusal
        headers = [("content-type", "text/plain; charset=utf-8"), ("connection", "close")]
        reply = h11.Response(status_code=status, headers=headers, reason=http.HTTPStatus(status).phrase)
        try:
            for event in (reply, h11.Data(data=text), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()
        except h11.LocalProtocolError:
            self.transport.abort()

    async def send_part(self, data: bytes) -> None:
        """Send a further part of the answer that has begun and has more to come: as by the application's `send`, for
        less than half. Whoever stands between and sees what is sent sees `num_streamed`."""
        if self._flow.write_paused and not self.cycle.disconnected:
            await self._flow.drain()
        if not self.cycle.disconnected:
            self.transport.write(self._parser.part(data))
            self.num_streamed += len(data)

    @property
    def _is_between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete


class _Flow(FlowControl):
    """Reading goes on until a little waits that neither the application nor the parser takes: so much, because the end
    of a connection is only seen by reading. `on_wanted` hears that the application wants more."""

    def __init__(self, transport: asyncio.Transport, on_wanted: Callable[[], None]) -> None:
        super().__init__(transport)
        self.is_full = False
        """True while the application has enough."""
        self._on_wanted = on_wanted

    def pause_reading(self) -> None:
        self.is_full = True

    def resume_reading(self) -> None:
        self.is_full = False
        self._on_wanted()

    def set_backlog(self, num_bytes: int) -> None:
        """Say how much of what came is still to be parsed. Told to the transport even if nothing changes for us:
        uvicorn resumes it by itself at times."""
        self.read_paused = num_bytes > _MAX_BACKLOG_BYTES
        (self._transport.pause_reading if self.read_paused else self._transport.resume_reading)()


class _ClientFaults(logging.Logger):
    """uvicorn warns of every client that does something wrong: with that, anybody could fill the log."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.parent = logging.getLogger(name)

    def warning(self, msg: object, *args: object, **more: Any) -> None:
        self.debug(msg, *args, **more)


_CLIENT_FAULTS = _ClientFaults(__name__)
