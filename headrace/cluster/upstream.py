"""Connections to one replica: a request goes out, its answer comes back part by part. Owns which connections are idle,
how long they may be silent, and that none waits for ever. Knows no route, and does not decide what is tried again.

HTTP/1.1 by hand: a library's client costs several times what the router may add to a request (docs/benchmarks.md).
"""

from __future__ import annotations

import asyncio
from typing import cast

from headrace.cluster.eager import News
from headrace.cluster.http_parts import (
    MAX_CHUNK_BYTES,
    MAX_HEAD_BYTES,
    ChunkReader,
    FramingError,
    Head,
    HeadReader,
    parse_answer,
)
from headrace.types.errors import DeadlineError, HeadraceError, UnreachableError

MAX_ANSWER_BYTES = 4 << 30
MAX_UNREAD_BYTES = 1 << 20
IDLE_SECONDS = 20.0
"""Well below what servers keep an idle connection for, so that few are closed under a request."""
_END_OF_HEAD = b"\r\n\r\n"
_FIRST_FINAL = 200
"""The least status that is no interim one."""


class BrokenAnswerError(UnreachableError):
    """A replica's connection ended before its answer did, or never came about. `had_begun` tells whether a byte of the
    answer came; `was_idle` that the connection had been used before: the replica may only have closed it meanwhile."""

    def __init__(self, message: str, *, had_begun: bool = False, was_idle: bool = False) -> None:
        super().__init__(message)
        self.had_begun = had_begun
        self.was_idle = was_idle


class LeftRotationError(BrokenAnswerError):
    """The replica's weights are not current any more: what it was asked is given up by the router, whatever its health
    is."""


class Upstream:
    """The connections to a replica at (host, port). Lives on one event loop."""

    def __init__(self, host: str, port: int, connect_timeout: float, answer_timeout: float) -> None:
        self._address = host, port
        self._connect_timeout = connect_timeout
        self._answer_timeout = answer_timeout
        self._idle: list[UpstreamConnection] = []
        self._busy: set[UpstreamConnection] = set()
        self._is_closed = False

    async def lend(self, *, fresh: bool = False, is_data: bool = True) -> UpstreamConnection:
        """A connection for one request and its answer, to be given back; idle ones first unless a `fresh` one is
        wanted; `is_data` if `cut_data` is to end it. Raises `BrokenAnswerError` when none can be had."""
        while self._idle and not fresh:
            connection = self._idle.pop()
            if connection.may_be_used_again:
                break
        else:
            connection = await self._connect()
        self._busy.add(connection)
        connection.is_data = is_data
        return connection

    async def _connect(self) -> UpstreamConnection:
        """A new connection. It is made in a task of its own, since who asks may be none."""
        connecting = asyncio.get_running_loop().create_task(self._new_connection())
        try:
            return await connecting
        except asyncio.CancelledError:
            connecting.add_done_callback(_drop)
            raise

    async def _new_connection(self) -> UpstreamConnection:
        try:
            async with asyncio.timeout(self._connect_timeout):
                _, connection = await asyncio.get_running_loop().create_connection(UpstreamConnection, *self._address)
        except TimeoutError:
            raise BrokenAnswerError(f"no connection within {self._connect_timeout:g} s") from None
        except (OSError, UnicodeError) as error:  # the latter of a name that cannot be one
            raise BrokenAnswerError(f"no connection: {getattr(error, 'strerror', None) or error}") from None
        return connection

    def give_back(self, connection: UpstreamConnection) -> None:
        """It is used no more, and stays if it may be used again; else, as before its answer is complete, it is
        closed."""
        self._busy.discard(connection)
        if connection.may_be_used_again and not self._is_closed:
            connection.is_reused = True
            self._idle.append(connection)
        else:
            connection.abort()

    def look(self, now: float) -> None:
        """End the waits that are too long, and connections that nobody needs. To be called about every second."""
        for connection in list(self._busy):
            if connection.is_silent_since(now - self._answer_timeout):
                connection.fail(DeadlineError(f"the replica sent nothing for {self._answer_timeout:g} s"))
        while self._idle and self._idle[0].used_at < now - IDLE_SECONDS:
            self._idle.pop(0).abort()

    def cut(self, reason: str) -> None:
        """Give up all answers that have not come."""
        for connection in list(self._busy):
            connection.fail(BrokenAnswerError(reason, had_begun=connection.has_begun))
        self._drop_idle()

    def cut_data(self, reason: str) -> None:
        """Give up the answers of data calls that have not come; control calls go on."""
        for connection in [each for each in self._busy if each.is_data]:
            connection.fail(LeftRotationError(reason, had_begun=connection.has_begun))

    def close(self) -> None:
        """Close the idle connections, and those in use after their answer."""
        self._is_closed = True
        self._drop_idle()

    def _drop_idle(self) -> None:
        while self._idle:
            self._idle.pop().abort()


def _drop(connecting: asyncio.Task[UpstreamConnection]) -> None:
    """Nobody wants that connection any more."""
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result().abort()


class UpstreamConnection(asyncio.Protocol):
    """One connection; one request at a time. `send`, then `read_head`, then `read_part` until it gives nothing."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._parts: list[bytes] = []
        self._num_unread = 0
        self._heads = HeadReader(parse_answer)
        self._head: Head | None = None
        self._chunks: ChunkReader | None = None
        self._num_left = 0
        self._is_complete = True
        self._error: HeadraceError | None = None
        self._news = News(self._loop)
        self._is_paused = False
        self.is_reused = False
        self.used_at = self._loop.time()
        """When something came or was sent last."""
        self.has_begun = False
        self.is_data = True

    @property
    def may_be_used_again(self) -> bool:
        """True when nothing is left of an answer, read or not, and the replica keeps the connection."""
        is_kept = self._head is None or self._head.keeps_alive
        if self._parts or self._is_paused:
            return False  # whoever asked went away, and the next one must not get it
        is_still = self._error is None and not self._buffer and not self._transport.get_write_buffer_size()
        return self._is_complete and is_kept and is_still

    def is_silent_since(self, moment: float) -> bool:
        """True when nothing came since then of an answer that is waited for; what we leave unread is no silence."""
        return not self._is_complete and not self._is_paused and self.used_at < moment

    def send(self, head: bytes, body: bytes) -> None:
        """Begin a request."""
        self._head, self._chunks, self._is_complete, self.has_begun = None, None, False, False
        self._parts, self._num_unread = [], 0
        self.used_at = self._loop.time()
        self._transport.writelines((head, body))

    async def read_head(self) -> Head:
        """The head of the answer. Raises `BrokenAnswerError` or `DeadlineError`."""
        while self._head is None:
            await self._next()
        return self._head

    async def read_part(self) -> bytes:
        """What came of the body since the last call, in whole chunks; b"" at its end. Raises as `read_head`."""
        while not self._parts:
            if self._is_complete:
                return b""
            await self._next()
        part = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts, self._num_unread = [], 0
        if self._is_paused:
            self._is_paused = False
            self.used_at = self._loop.time()
            self._transport.resume_reading()
        return part

    async def read_whole(self) -> bytes:
        """All of the body that has not been read. Raises as `read_head`."""
        whole = await self.read_part()
        if not self._is_complete or self._parts:
            held = [whole]
            while part := await self.read_part():
                held.append(part)
            whole = b"".join(held)
        return whole

    def fail(self, error: HeadraceError) -> None:
        """Have whoever waits for the answer see `error`."""
        if self._error is None:
            self._error = error
        self._transport.abort()
        self._news.come_soon()

    def abort(self) -> None:
        """Close it now; the replica sees that its client has gone."""
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.used_at = self._loop.time()
        self.has_begun = True
        try:
            if self._buffer or not self._take_at_once(data):
                self._buffer += data
                self._parse()
        except FramingError as error:
            self.fail(BrokenAnswerError(f"the replica's answer is no HTTP: {error}", had_begun=True))
            return
        if self._num_unread > MAX_UNREAD_BYTES and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()
        self._news.come()

    def connection_lost(self, exc: Exception | None) -> None:
        is_cut = exc is not None or self._error is not None  # by us, if there is an error already
        ends_well = self._head is not None and self._head.ends_with_connection and not is_cut
        self._is_complete = self._is_complete or ends_well
        if self._error is None:
            message = "the connection to the replica broke" if self.has_begun else "the replica closed the connection"
            self._error = BrokenAnswerError(message, had_begun=self.has_begun, was_idle=self.is_reused)
        self._news.come()

    async def _next(self) -> None:
        """Wait until something comes."""
        if self._error is not None and not self._is_complete:
            raise self._error
        await self._news
        if self._error is not None and not self._is_complete and not self._parts:
            raise self._error

    def _take_at_once(self, data: bytes) -> bool:
        """Take the whole answer that `data` is, or chunks of one, without a copy in the buffer; False if it is
        anything else."""
        if self._chunks is not None and not self._is_complete:
            chunks, num_read = self._chunks.scan(data)
            self._buffer += data[num_read:]
            self._take(*chunks)
            self._is_complete = self._chunks.is_complete
            return True
        end = data.find(_END_OF_HEAD)
        if end < 0 or self._head is not None or self._is_complete:
            return False
        head = self._heads.read(data[:end])
        start = end + len(_END_OF_HEAD)
        size = len(data) - start
        if head.status < _FIRST_FINAL or head.body_size != size:
            return False
        self._head, self._is_complete = head, True
        if size:
            self._parts, self._num_unread = [data[start:]], size
        return True

    def _parse(self) -> None:
        if self._is_complete:
            raise FramingError("it sends without being asked")
        if self._head is None and not self._parse_head():
            return
        if self._chunks is not None:
            self._take(*self._chunks.read(self._buffer))
            self._is_complete = self._chunks.is_complete
            return
        size = len(self._buffer) if self._num_left < 0 else min(len(self._buffer), self._num_left)
        if size:
            self._take(bytes(self._buffer[:size]))
            del self._buffer[:size]
            if self._num_left > 0:
                self._num_left -= size
        self._is_complete = self._num_left == 0

    def _parse_head(self) -> bool:
        """Whether a head has come whole; interim ones are passed over."""
        while (end := self._buffer.find(_END_OF_HEAD)) >= 0:
            head = self._heads.read(bytes(self._buffer[:end]))
            del self._buffer[: end + len(_END_OF_HEAD)]
            if head.status >= _FIRST_FINAL:
                self._head = head
                is_open = head.body_size is None
                self._num_left = -1 if is_open else head.body_size or 0
                is_chunked = is_open and not head.ends_with_connection
                self._chunks = ChunkReader(MAX_ANSWER_BYTES, MAX_CHUNK_BYTES) if is_chunked else None
                return True
        if len(self._buffer) > MAX_HEAD_BYTES:
            raise FramingError("its head has no end")
        return False

    def _take(self, *parts: bytes) -> None:
        self._parts += parts
        self._num_unread += sum(map(len, parts))
