"""Sockets and HTTP servers inside somebody else's process. Owns how uvicorn is set up, and how many connections there
may be; knows nothing of engines."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import secrets
import socket
from collections.abc import Generator
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from headrace.server.connections import Connection
from headrace.server.framing import ParsingQueue
from headrace.server.limits import MAX_HEADER_BYTES
from headrace.server.options import addresses_of
from headrace.types.errors import ConfigError

CLOSE_SECONDS = 1.0
MAX_DESCRIPTORS = 1 << 20
SPARE_DESCRIPTORS = 128
"""Left for the engine: buffers of weight uploads, files of a checkpoint."""
CROWDED_CONNECTIONS = 64
"""So many connections over the limit still get a short answer: health, or that the server is full."""
INSTANCE_HEADER = "x-headrace-instance"
"""Of every answer: which server gave it. Whoever finds another value than before speaks to a new one at an old address,
which has lost what the old one was told."""
_BACKLOG = 4096
_BATCH = 64
_KEEP_ALIVE_SECONDS = 75
_RETRY_SECONDS = 0.2
_TICKS_PER_LOOK = 10
_LOG_SECONDS = 60.0
_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

logger = logging.getLogger(__name__)


class EmbeddedServer(uvicorn.Server):
    """A server of one application whose process's signals are not its own.

    It accepts connections itself: as many as descriptors allow, idle ones giving way to new ones, so that the process
    never runs out and somebody who opens thousands keeps nobody else out.
    """

    def __init__(self, app: ASGIApp, write_timeout: float) -> None:
        config = uvicorn.Config(
            app,
            http=Connection,
            log_config=None,
            access_log=False,
            server_header=False,
            headers=[(INSTANCE_HEADER, secrets.token_hex(8))],
            lifespan="off",
            ws="none",
            proxy_headers=False,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=int(4 * CLOSE_SECONDS),
            backlog=_BACKLOG,
        )
        super().__init__(config)
        self.max_connections = 0
        self._parsing = ParsingQueue()
        self._write_timeout = write_timeout
        self._accepting: dict[asyncio.Task[Any], Connection] = {}
        self._listeners: list[socket.socket] = []
        self._next_log = 0.0

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop. However it ends, cancelled too, no socket of it stays open."""
        try:
            await super().serve(sockets)
        finally:
            self.stop_listening()
            for listener in sockets or ():
                listener.close()
            self._cut()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()
        self.servers = []
        self.max_connections = _max_connections()
        for listener in sockets or ():
            listener.setblocking(False)
            self._listeners.append(listener)
            self._listen_to(listener)
        self.started = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second; at one of them, cut off those who do not send their headers, or do not take their
        answers."""
        if counter % _TICKS_PER_LOOK == 0:
            now = asyncio.get_running_loop().time()
            for connection in self._connections():
                if connection.is_late(now):
                    connection.transport.abort()
            self.cut_unread(self._write_timeout)
        return await super().on_tick(counter)

    def cut_unread(self, seconds: float) -> None:
        """Cut off the clients that have taken nothing of their answers for so long."""
        now = asyncio.get_running_loop().time()
        stuck = [each for each in self._connections() if each.is_stuck(now, seconds)]
        for connection in stuck:
            connection.transport.abort()
        if stuck:
            logger.info("%d clients left their answers unread for %g s: cut off", len(stuck), seconds)

    def stop_listening(self) -> None:
        """Leave whoever connects from now on to the socket's backlog."""
        loop = asyncio.get_running_loop()
        while self._listeners:
            loop.remove_reader(self._listeners.pop())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close; who does not take its answer within `CLOSE_SECONDS` is cut off."""
        self.stop_listening()
        asyncio.get_running_loop().call_later(CLOSE_SECONDS, self._cut)
        await super().shutdown(sockets)

    def _connections(self) -> list[Connection]:
        return [each for each in self.server_state.connections if isinstance(each, Connection)]

    def _cut(self) -> None:
        for connection in self._connections():
            connection.transport.abort()

    def _listen_to(self, listener: socket.socket) -> None:
        if listener in self._listeners:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        """Take in what waits, a batch at a time: the loop has other things to do."""
        for number in range(_BATCH):
            # A connection is known to uvicorn shortly before its task has ended.
            num_over = len(self.server_state.connections.union(self._accepting.values())) - self.max_connections
            if num_over >= 0 and (number > 0 or self._evict()):
                return  # who is evicted is gone at the next turn, and only for somebody who waits: known for the first
            try:
                client, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _OUT_OF_RESOURCES:
                    raise
                self._rest(listener, error)
                return
            if num_over >= CROWDED_CONNECTIONS:
                client.close()
                continue
            self._serve_client(client, is_crowded=num_over >= 0)

    def _serve_client(self, client: socket.socket, *, is_crowded: bool) -> None:
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        if is_crowded:
            self._warn(f"{self.max_connections} connections are busy: more get 503")

        connection = Connection(self.config, self.server_state, self.lifespan.state, self._parsing, is_crowded)
        task = loop.create_task(loop.connect_accepted_socket(lambda: connection, client))
        self._accepting[task] = connection
        task.add_done_callback(self._accepting.pop)

    def _evict(self) -> bool:
        """Close the longest unused of those connections that nobody would miss; False when there is none."""
        idle = [each for each in self._connections() if each.is_idle and not each.transport.is_closing()]
        oldest = sorted(idle, key=lambda each: each.used_at)[:_BATCH]
        for connection in oldest:
            connection.transport.abort()
        return bool(oldest)

    def _rest(self, listener: socket.socket, error: OSError) -> None:
        """No descriptor is left, although connections are counted: try again later, or the loop would only spin."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(listener)
        loop.call_later(_RETRY_SECONDS, self._listen_to, listener)
        self._warn(f"no connection can be accepted: {error.strerror}")

    def _warn(self, message: str) -> None:
        """Say it, but not a thousand times."""
        now = asyncio.get_running_loop().time()
        if now >= self._next_log:
            self._next_log = now + _LOG_SECONDS
            logger.warning("%s (said at most once in %g s)", message, _LOG_SECONDS)


def raise_descriptor_limit() -> int:
    """Let this process have as many descriptors as it may; returns how many. Each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as error:
        logger.warning("the limit of %d descriptors cannot be raised: %s", soft, error)
        return soft
    return wanted


def _max_connections() -> int:
    num_open = len(os.listdir("/proc/self/fd"))
    return max(16, raise_descriptor_limit() - num_open - SPARE_DESCRIPTORS - CROWDED_CONNECTIONS)


def listen(host: str, port: int) -> socket.socket:
    """A socket to which clients can connect from now on; port 0 takes a free one.

    Raises `ConfigError` naming `host` or `port` for an address that does not exist or is taken.
    """
    family, kind, protocol, _, address = addresses_of(host, port)[0]
    try:
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"host {host} cannot be used: {error}", field="host") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}", field="port") from None
    return listener


def url_of(listener: socket.socket, host: str) -> str:
    """The base of all routes, with `host` as the user wrote it."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}"
