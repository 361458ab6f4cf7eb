"""Serving: a socket, a uvicorn server on the engine's own loop, the order of shutdown. Installs no signal handlers."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

from headrace.engine import AsyncEngine
from headrace.server.access_log import AccessLog
from headrace.server.app import create_app
from headrace.server.listening import EmbeddedServer, listen, url_of
from headrace.server.options import ServerOptions
from headrace.server.state import ServerState
from headrace.types.errors import ConfigError, InternalError, RequestError
from headrace.types.plain_values import MAX_SECONDS, as_number

logger = logging.getLogger(__name__)

ABORT_SECONDS = 2.0
UNDO_SECONDS = 2.0
UNREAD_SECONDS = 1.0


class RunningServer:
    """A server that accepts connections, on the engine's loop; `stop` may be awaited from any loop."""

    def __init__(
        self, server: EmbeddedServer, task: asyncio.Task[None], state: ServerState, listener: socket.socket, host: str
    ) -> None:
        self._server = server
        self._task = task
        self._state = state
        self.host, self.port = host, int(listener.getsockname()[1])
        self.url = url_of(listener, host)
        """The base of all routes."""

    async def stop(self, timeout: float | None = None) -> None:
        """Take no new requests (503; `/ready` is 503), let those that run finish, then close. Idempotent.

        What still runs after `timeout` seconds (default `drain_timeout`) is aborted and answered with what there is.
        Control calls that wait when no request runs any more, or after those seconds, are given up and get a
        `ShutdownError` (503), or what they have come to; an update that was begun here and is not complete is dropped.
        """
        limit = self._state.options.drain_timeout if timeout is None else as_number(timeout, "timeout")
        if not 0 <= limit <= MAX_SECONDS:
            raise RequestError(f"timeout must be in [0, {MAX_SECONDS:g}] seconds, not {limit:g}", field="timeout")
        await self._state.engine.runtime.run(self._stop(limit))

    async def stop_now(self) -> None:
        """`stop` that lets nothing finish."""
        await self.stop(0.0)

    async def _stop(self, limit: float) -> None:
        self._state.is_draining = True
        is_idle = await self._state.wait_idle(limit)
        self._state.calls.end()
        if not is_idle:
            if self._state.num_active:
                logger.warning("%d requests did not finish in %g s and are aborted", self._state.num_active, limit)
            self._state.abort_all("Aborted: the server is shutting down")
            self._server.cut_unread(UNREAD_SECONDS)
            await self._state.wait_idle(ABORT_SECONDS)
        self._server.should_exit = True
        await asyncio.shield(self._task)
        await self._state.close(UNDO_SECONDS)


async def serve(
    engine: AsyncEngine,
    port: int = 0,
    host: str = "127.0.0.1",
    *,
    listener: socket.socket | None = None,
    **options: Any,
) -> RunningServer:
    """Serve `engine` over HTTP on its own loop, until it ends or the server is stopped. May be awaited from any loop;
    returns once connections are accepted. Port 0 takes a free one. For an `Engine` there is `headrace.serve`.

    `options` are the fields of `ServerOptions`. A `listener` that already listens on `host` is taken over, and closed
    in the end. Raises `ConfigError` for a bad option, an address that is taken, and an outside address without a key.
    """
    if not isinstance(engine, AsyncEngine):
        raise ConfigError("engine must be an AsyncEngine: an Engine is served by headrace.serve", field="engine")
    await engine.start()
    engine.runtime.check_open()
    return await engine.runtime.run(_open(engine, port, host, listener, options), RunningServer.stop_now)


async def _open(
    engine: AsyncEngine, port: int, host: str, listener: socket.socket | None, settings: dict[str, Any]
) -> RunningServer:
    """A server that accepts connections, on the engine's loop, and that ends with the engine."""
    options = ServerOptions.from_dict(settings)
    options.check_address(host)
    app = create_app(engine, options, host)
    server = EmbeddedServer(AccessLog(app) if options.access_log else app, options.write_timeout)
    if listener is None:
        listener = listen(host, port)
    task = asyncio.get_running_loop().create_task(server.serve(sockets=[listener]))
    try:
        while not server.started:
            if task.done():
                raise InternalError("the HTTP server ended while it started") from task.exception()
            await asyncio.sleep(0.005)
    except asyncio.CancelledError:
        server.should_exit = True  # nobody would hear of it
        raise
    running = RunningServer(server, task, app.state.server, listener, host)
    engine.runtime.add_closer(running.stop_now)
    return running
