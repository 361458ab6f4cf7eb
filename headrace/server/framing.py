"""HTTP/1.1 as h11 parses it, within bounds: how much at once, of how many lines, and how much of it may be framing.

A body of one-byte chunks costs a hundred times what its bytes cost otherwise. So chunks are parsed a few at a time,
those of one connection after those of another, and whoever sends hardly anything but framing is refused. Knows no
application.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from typing import Any, Protocol

import h11

MAX_HEADERS = 200
"""Headers of a request, and trailers of a body."""
FREE_FRAMING_BYTES = 16 << 10
FRAMING_PER_BYTE = 4
"""So much framing may come for each byte of a chunked body, beside what is free."""
SLICE_LINES = 256
"""Ends of lines parsed at once: two for each chunk."""
_SLICE_BYTES = 64 << 10
_TURN_SECONDS = 0.002
_END_OF_HEADERS = re.compile(rb"\n\r?\n")
_CHUNKED = b"Transfer-Encoding: chunked\r\n"  # as h11 writes it
_BAD_REQUEST, _TOO_MANY_HEADERS = 400, 431


class Parser(h11.Connection):
    """The server's side of one connection."""

    def __init__(self, max_header_bytes: int | None) -> None:
        super().__init__(h11.SERVER, max_header_bytes or _SLICE_BYTES)
        self.num_received = 0
        """Bytes so far, of all requests."""
        self.refusal = _BAD_REQUEST
        """The status of what is refused for what it is."""
        self._head: list[bytes] = []
        self._answers_in_chunks = False
        self._max_lines = 0  # no more wait to be parsed
        self._is_chunked = False
        self._num_payload = 0
        self._begun_at = 0

    @property
    def is_in_chunks(self) -> bool:
        """True within a body whose parsing costs more than its bytes."""
        return self._is_chunked and self.their_state is h11.SEND_BODY

    @property
    def is_wasteful(self) -> bool:
        """True when too much of the body in chunks so far is framing, or it ends in too many trailers. To be asked when
        everything is parsed that can be."""
        num_framing = self.num_received - self._begun_at - self._num_payload
        is_over = num_framing > FREE_FRAMING_BYTES + FRAMING_PER_BYTE * self._num_payload
        return is_over or self.trailing_data[0].count(b"\n") > MAX_HEADERS

    def is_slice(self, waiting: bytes | bytearray) -> bool:
        """Whether what waits is so little that it is parsed as a whole."""
        return len(waiting) <= _SLICE_BYTES and waiting.count(b"\n") <= SLICE_LINES

    def size_of_slice(self, waiting: bytearray) -> int:
        """How much of what waits is to be parsed next: what little it is as a whole, as a body of known length; else
        headers to their end, of chunks a few."""
        if self.is_slice(waiting):
            return len(waiting)
        size = min(len(waiting), _SLICE_BYTES)
        if self.their_state is h11.SEND_BODY and not self._is_chunked:
            return len(waiting)
        end = _END_OF_HEADERS.search(waiting, 0, size) if self.their_state is h11.IDLE else None
        if end:
            return end.end()
        while waiting.count(b"\n", 0, size) > SLICE_LINES:
            size //= 2
        return size

    def receive_data(self, data: bytes) -> None:
        self.num_received += len(data)
        self._max_lines += data.count(b"\n")
        super().receive_data(data)

    def part(self, data: bytes) -> bytes:
        """What `send` makes of a part of a body that is not the first. One in chunks is framed here: to h11 it is four
        objects and a dozen looks at its state, a fifth of what a piece of a stream costs."""
        if self._answers_in_chunks and data and not self._head and self.our_state is h11.SEND_BODY:
            return b"%x\r\n%b\r\n" % (len(data), data)
        return super().send(h11.Data(data=data))

    def send_with_data_passthrough(self, event: h11.Event) -> list[bytes] | None:
        """As h11's, but the head of a reply goes with what comes next: one packet, and one wake-up of the client."""
        written = super().send_with_data_passthrough(event)
        if isinstance(event, h11.Response):
            self._head, written = written or [], []
            self._answers_in_chunks = _CHUNKED in self._head
        elif written is not None:
            self._head, written = [], self._head + written
        return written

    def next_event(self) -> Any:
        """As h11's; what is refused leaves its status in `refusal`."""
        try:
            if self._max_lines > MAX_HEADERS and self.their_state is h11.IDLE:
                self._check_headers()
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            self.refusal = error.error_status_hint
            raise
        if type(event) is h11.Data:
            self._num_payload += len(event.data)
        elif type(event) is h11.Request:
            self._is_chunked = b"transfer-encoding" in dict(event.headers)
            if self._is_chunked:
                self._num_payload, self._begun_at = 0, self.num_received - len(self.trailing_data[0])
        return event

    def _check_headers(self) -> None:
        """What is not parsed yet begins with headers."""
        waiting = self.trailing_data[0]
        self._max_lines = waiting.count(b"\n")
        if self._max_lines <= MAX_HEADERS:
            return
        end = _END_OF_HEADERS.search(waiting)
        if waiting.count(b"\n", 0, end.start() if end else len(waiting)) > MAX_HEADERS:
            raise h11.RemoteProtocolError("too many headers", error_status_hint=_TOO_MANY_HEADERS)


class Waiting(Protocol):
    """A connection with bytes to parse."""

    def parse_some(self) -> bool:
        """Parse a little; False when there is nothing to do now."""


class ParsingQueue:
    """The connections of a server that have more to parse, in line for a little of each turn of the loop."""

    def __init__(self) -> None:
        self._waiting: deque[Waiting] = deque()
        self._members: set[Waiting] = set()
        self._is_due = False

    def add(self, connection: Waiting) -> None:
        """Let a connection have its turn; once, however often it is said."""
        if connection not in self._members:
            self._waiting.append(connection)
            self._members.add(connection)
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        end = time.perf_counter() + _TURN_SECONDS
        while self._waiting and time.perf_counter() < end:
            connection = self._waiting.popleft()
            self._members.discard(connection)
            if connection.parse_some():
                self.add(connection)
        self._is_due = bool(self._waiting)
        if self._is_due:
            asyncio.get_running_loop().call_soon(self._turn)
