"""Serving: a socket, a uvicorn server on the engine's own loop, the order of shutdown. Installs no signal handlers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Generator
from typing import Any

import uvicorn

from headrace.engine import AsyncEngine
from headrace.server.app import create_app
from headrace.server.limits import MAX_HEADER_BYTES
from headrace.server.options import ServerOptions
from headrace.server.state import ServerState
from headrace.types.errors import ConfigError, InternalError

logger = logging.getLogger(__name__)

ABORT_SECONDS = 5.0
CLOSE_SECONDS = 2.0
_BACKLOG = 4096
_KEEP_ALIVE_SECONDS = 75


class _Server(uvicorn.Server):
    """A server inside somebody else's process: signals are not its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class RunningServer:
    """A server that accepts connections, on the engine's loop; `stop` may be awaited from any loop."""

    def __init__(
        self, server: uvicorn.Server, task: asyncio.Task[None], state: ServerState, address: tuple[str, int]
    ) -> None:
        self._server = server
        self._task = task
        self._state = state
        self.host, self.port = address

    @property
    def url(self) -> str:
        """The base of all routes."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    async def stop(self, timeout: float | None = None) -> None:
        """Take no new requests (503; `/ready` is 503), let those that run finish, then close. Idempotent.

        What still runs after `timeout` seconds (default `drain_timeout`) is aborted and answered with what there is.
        """
        await self._state.engine.runtime.run(self._stop(timeout))

    async def _stop(self, timeout: float | None) -> None:
        limit = self._state.options.drain_timeout if timeout is None else timeout
        self._state.stop_admitting()
        if not await self._state.wait_idle(limit):
            logger.warning("%d requests did not finish in %g s and are aborted", self._state.num_active, limit)
            self._state.abort_all("Aborted: the server is shutting down")
            await self._state.wait_idle(ABORT_SECONDS)
        self._server.should_exit = True
        await asyncio.shield(self._task)


async def serve(engine: AsyncEngine, host: str = "127.0.0.1", port: int = 0, **settings: Any) -> RunningServer:
    """Serve `engine` over HTTP; returns once connections are accepted. Port 0 takes a free one.

    `settings` are the fields of `ServerOptions`. To be awaited on the engine's loop. Raises `ConfigError` for a bad
    setting, an address that is taken, and an outside address without a key.
    """
    options = ServerOptions.from_dict(settings)
    options.check_address(host)
    listener = _listen(host, port)
    app = create_app(engine, options)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        proxy_headers=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(CLOSE_SECONDS),
        backlog=_BACKLOG,
    )
    server = _Server(config)
    task = asyncio.get_running_loop().create_task(server.serve(sockets=[listener]))
    while not server.started:
        if task.done():
            raise InternalError("the HTTP server ended while it started") from task.exception()
        await asyncio.sleep(0.005)
    address = listener.getsockname()
    return RunningServer(server, task, app.state.server, (host, int(address[1])))


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise ConfigError(f"port must be in [0, 65535], got {port}", field="port")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"host {host} cannot be used: {error}", field="host") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}", field="port") from None
    return listener
