"""A link over one connected AF_UNIX stream socketpair. Owns buffering, its bounds, and the discovery of peer death.

The core's end is a non-blocking socket polled between steps; the front's end is an asyncio transport.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import logging
import select
import socket
import termios
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from typing import cast

from headrace.ipc.codec import (
    DECODE_ERRORS,
    CommandCodec,
    FrameError,
    FrameReader,
    OutputCodec,
    pack_frame,
    refuse_command,
)
from headrace.ipc.links import PeerClosed
from headrace.types.errors import EngineDeadError, InternalError, RequestError, UnavailableError
from headrace.types.messages import Command, Deltas, Output, Reply
from headrace.types.request import Delta

logger = logging.getLogger(__name__)

READ_BYTES = 1 << 18
MAX_READ_BYTES_PER_POLL = 1 << 22
MAX_BACKLOG_BYTES = 1 << 28
MAX_UNREAD_BYTES = 1 << 17
STALL_TIMEOUT = 60.0
CLOSE_TIMEOUT = 2.0
DELIVER_SECONDS = 0.002
"""At once: about what the pieces take that go out in the same turn, or tokens crowd them out."""
SLICE_DELTAS = 64
_POLL_STEP_S = 0.001  # `poll` counts in these, and rounds up


class SocketCoreLink:
    """The core's end; see `CoreLink`. `stall_timeout`: seconds a full backlog may make no progress."""

    def __init__(
        self,
        connection: socket.socket,
        *,
        max_backlog_bytes: int = MAX_BACKLOG_BYTES,
        stall_timeout: float = STALL_TIMEOUT,
    ) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._commands = CommandCodec()
        self._outputs = OutputCodec()
        self._reader = FrameReader()
        self._read_buffer = bytearray(READ_BYTES)
        self._frames: list[bytes] = []
        self._backlog = bytearray()
        self._max_backlog_bytes = max_backlog_bytes
        self._stall_timeout = stall_timeout
        self._closed_reason = ""

    @property
    def is_behind(self) -> bool:
        return bool(self._backlog) or self._num_unread() > MAX_UNREAD_BYTES

    def poll(self, timeout: float) -> list[Command]:
        if self._backlog and not self._closed_reason:
            self._flush()
        commands = self._decode(self._receive())
        if commands or timeout <= 0:
            return commands
        self._wait(timeout)
        return self._decode(self._receive())

    def receive_frame(self, timeout: float) -> bytes:
        """The next raw frame: the configuration, which comes before any command. Raises `PeerClosed`."""
        deadline = time.monotonic() + timeout
        while not self._frames:
            self._frames = self._receive()
            if not self._frames:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise PeerClosed("the front sent no configuration in time")
                self._wait(remaining)
        return self._frames.pop(0)

    def send(self, output: Output) -> None:
        try:
            frame = pack_frame(self._outputs.encode(output))
        except (FrameError, TypeError, ValueError, OverflowError) as error:
            for smaller in _in_parts(output, error):
                self.send(smaller)
            return
        if not self._backlog:
            sent = self._write(frame)
            if sent < len(frame):
                self._backlog += memoryview(frame)[sent:]
            return
        self._backlog += frame
        self._flush()
        if len(self._backlog) > self._max_backlog_bytes:
            self._drain(self._max_backlog_bytes, self._stall_timeout)

    def close(self) -> None:
        if self._socket.fileno() < 0:
            return
        try:
            self._drain(0, CLOSE_TIMEOUT)
        except PeerClosed as reason:
            logger.debug("link closed with output unsent: %s", reason)
        self._socket.close()
        self._closed_reason = self._closed_reason or "the link is closed"

    def _num_unread(self) -> int:
        """Bytes that the kernel holds for the front, which may be many megabytes."""
        held = array.array("i", [0])
        with contextlib.suppress(OSError):  # closed: sending says so
            fcntl.ioctl(self._socket, termios.TIOCOUTQ, held)
        return held[0]

    def _receive(self) -> list[bytes]:
        """Frames that have arrived. Raises `PeerClosed` when there are none and never will be."""
        frames, self._frames = self._frames, []
        num_bytes = 0
        while not self._closed_reason and num_bytes < MAX_READ_BYTES_PER_POLL:
            try:
                received = self._socket.recv_into(self._read_buffer)
                frames += self._reader.feed(memoryview(self._read_buffer)[:received])
            except (BlockingIOError, InterruptedError):
                break
            except (OSError, FrameError) as error:
                self._closed_reason = f"the link broke: {error}"
                break
            if received == 0:
                self._closed_reason = "the front closed the link"
            num_bytes += received
            if received < READ_BYTES:
                break
        if self._closed_reason and not frames:
            raise PeerClosed(self._closed_reason)
        return frames

    def _decode(self, frames: list[bytes]) -> list[Command]:
        commands: list[Command] = []
        for frame in frames:
            try:
                commands.append(self._commands.decode(frame))
            except DECODE_ERRORS as error:
                logger.error("undecodable command of %d bytes: %s", len(frame), error)
                for output in refuse_command(frame, error):
                    self.send(output)
        return commands

    def _wait(self, timeout: float) -> bool:
        """Wait until there is something to read, sending backlog meanwhile. Returns whether the backlog moved."""
        if timeout < _POLL_STEP_S:
            time.sleep(timeout)
            return False
        poller = select.poll()
        poller.register(self._socket, select.POLLIN | (select.POLLOUT if self._backlog else 0))
        events = poller.poll(timeout * 1000.0)
        return any(event & select.POLLOUT for _, event in events) and self._flush()

    def _write(self, data: bytes | bytearray | memoryview) -> int:
        if self._closed_reason:
            raise PeerClosed(self._closed_reason)
        try:
            return self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            self._closed_reason = f"the front closed the link: {error}"
            raise PeerClosed(self._closed_reason) from None

    def _flush(self) -> bool:
        """Send what the kernel takes of the backlog. Returns whether it took any."""
        sent = self._write(self._backlog) if self._backlog else 0
        del self._backlog[:sent]
        return sent > 0

    def _drain(self, target_bytes: int, stall_timeout: float) -> None:
        """Wait until the backlog is down to `target_bytes`."""
        poller = select.poll()
        poller.register(self._socket, select.POLLOUT)
        while len(self._backlog) > target_bytes:
            if not poller.poll(stall_timeout * 1000.0):
                self._closed_reason = f"the front has read nothing for {stall_timeout:g} s"
                raise PeerClosed(self._closed_reason)
            self._flush()


def _in_parts(output: Output, error: Exception) -> list[Output]:
    """A message that cannot be sent, being over the frame bound or holding what cannot be encoded: the deltas of many
    sequences in two; what is one answer becomes an error that its receiver can place."""
    problem = InternalError(f"the answer cannot be sent: {error}").info()
    if isinstance(output, Deltas) and len(output.deltas) > 1:
        half = len(output.deltas) // 2
        return [Deltas(output.deltas[:half]), Deltas(output.deltas[half:])]
    if isinstance(output, Deltas):
        return [Deltas((Delta.failed(output.deltas[0].handle, problem),))]
    assert isinstance(output, Reply), f"{type(output).__name__}: {error}"
    return [Reply(output.call_id, error=problem)]


class SocketFrontLink:
    """The front's end; see `FrontLink`. Commands of one loop turn leave in one write.

    `describe_exit` says why the core is gone, for the reason given to `on_close`.
    """

    def __init__(
        self,
        connection: socket.socket,
        *,
        max_backlog_bytes: int = MAX_BACKLOG_BYTES,
        describe_exit: Callable[[], Awaitable[str]] | None = None,
    ) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._codec = CommandCodec()
        self._max_backlog_bytes = max_backlog_bytes
        self._describe_exit = describe_exit
        self._queued: list[bytes] = []
        self._num_queued_bytes = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._transport: asyncio.Transport | None = None
        self._protocol: _FrontProtocol | None = None
        self._on_close: Callable[[str], None] | None = None
        self._report: asyncio.Task[None] | None = None
        self._is_closed = False

    async def start(self, on_output: Callable[[Output], None], on_close: Callable[[str], None]) -> None:
        if self._socket.fileno() < 0:
            raise EngineDeadError("the engine core is gone")
        self._loop = asyncio.get_running_loop()
        self._on_close = on_close
        self._protocol = protocol = _FrontProtocol(on_output, self._lost)
        try:
            self._transport, _ = await self._loop.create_unix_connection(lambda: protocol, sock=self._socket)
        except BaseException:  # cancelled: not every loop tells a protocol that it has never begun
            self._socket.close()
            protocol.has_ended.set()
            raise
        if self._is_closed:  # by `close`, which knew no transport yet
            _shut_down(self._socket)
            self._transport.abort()
            return
        self._flush()

    def send(self, command: Command) -> None:
        if self._is_closed:
            raise EngineDeadError("the engine core is gone")
        try:
            frame = pack_frame(self._codec.encode(command))
        except FrameError as error:
            raise UnavailableError(str(error)) from None
        except (TypeError, ValueError, OverflowError) as error:  # a subclass of str or int, a surrogate, 10**30
            raise RequestError(f"{type(command).__name__} holds a value that cannot be sent: {error}") from None
        unsent = self._num_queued_bytes + (self._transport.get_write_buffer_size() if self._transport else 0)
        if unsent and unsent + len(frame) > self._max_backlog_bytes:
            raise UnavailableError("the engine core does not take commands fast enough")
        if not self._queued and self._loop is not None and self._transport is not None:
            self._loop.call_soon(self._flush)
        self._queued.append(frame)
        self._num_queued_bytes += len(frame)

    async def close(self) -> None:
        was_closed, self._is_closed = self._is_closed, True
        if self._protocol is None:
            self._socket.close()
            return
        if self._transport is not None:
            if not was_closed:
                await self._send_rest(self._transport)
                # Closing is not enough: a process that was forked off this one may still hold the descriptor.
                _shut_down(self._socket)
            self._transport.abort()
        await self._protocol.has_ended.wait()
        if self._report is not None:
            await asyncio.wait([self._report])

    async def _send_rest(self, transport: asyncio.Transport) -> None:
        self._flush()
        deadline = time.monotonic() + CLOSE_TIMEOUT
        while transport.get_write_buffer_size() and time.monotonic() < deadline:
            await asyncio.sleep(0.005)

    def _flush(self) -> None:
        if self._queued and self._transport is not None:
            self._transport.write(b"".join(self._queued))
        self._queued.clear()
        self._num_queued_bytes = 0

    def _lost(self, reason: str) -> None:
        """The connection ended. The reason is completed by how the process ended before the owner hears of it."""
        if self._is_closed or self._loop is None:
            return
        self._is_closed = True
        self._report = self._loop.create_task(self._report_close(reason))

    async def _report_close(self, reason: str) -> None:
        described = await self._describe_exit() if self._describe_exit is not None else ""
        assert self._on_close is not None
        self._on_close(described or reason)


class _FrontProtocol(asyncio.Protocol):
    def __init__(self, on_output: Callable[[Output], None], on_lost: Callable[[str], None]) -> None:
        self._on_output = on_output
        self._on_lost = on_lost
        self._reader = FrameReader()
        self._codec = OutputCodec()
        self._transport: asyncio.Transport | None = None
        self._waiting: deque[Output] = deque()
        self.has_ended = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclasses

    def data_received(self, data: bytes) -> None:
        # A lost output could be somebody's only answer: an unreadable one ends the link, which answers everybody.
        try:
            outputs = [self._codec.decode(frame) for frame in self._reader.feed(data)]
        except (FrameError, *DECODE_ERRORS) as error:
            self._end(f"the core sent what cannot be decoded: {error}")
            return
        for output in outputs:
            self._waiting.extend(_in_slices(output))
        self._deliver()

    def _deliver(self) -> None:
        """Hand on for a moment; then, before the rest, the loop's other work has its turn, and nothing more is read."""
        until = time.perf_counter() + DELIVER_SECONDS
        while self._waiting and time.perf_counter() < until:
            self._hand_on()
        if self._transport is None or self._transport.is_closing():
            return
        if self._waiting:
            self._transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._deliver)
        else:
            self._transport.resume_reading()

    def _hand_on(self) -> None:
        """Give the owner the next output. One that it breaks over ends the link too: somebody would wait for ever."""
        is_taken = False
        try:
            self._on_output(self._waiting.popleft())
            is_taken = True
        finally:
            if not is_taken:
                self._end("the front broke over what the core sent")

    def _end(self, reason: str) -> None:
        self._waiting.clear()
        self._on_lost(reason)
        assert self._transport is not None
        self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        while self._waiting:
            self._hand_on()
        self.has_ended.set()
        self._on_lost(f"the link to the core broke: {error}" if error else "the core closed the link")


def _in_slices(output: Output) -> Iterator[Output]:
    """The deltas of one step of many sequences, a few at a time."""
    if not isinstance(output, Deltas) or len(output.deltas) <= SLICE_DELTAS:
        yield output
        return
    for start in range(0, len(output.deltas), SLICE_DELTAS):
        yield Deltas(output.deltas[start : start + SLICE_DELTAS])


def _shut_down(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        logger.debug("link was already down: %s", error)
