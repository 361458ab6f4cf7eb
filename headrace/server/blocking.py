"""Serving for callers without an event loop. Owns nothing: it waits for `headrace.server.serve` and for its end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from headrace.engine import Engine
from headrace.engine.runtime import EngineLoop
from headrace.server.run import RunningServer
from headrace.server.run import serve as serve_async
from headrace.types.errors import ConfigError, ShutdownError


class ServerHandle:
    """A running HTTP server of an engine. `url` is the base of all routes."""

    def __init__(self, running: RunningServer, runtime: EngineLoop) -> None:
        self._running = running
        self._runtime = runtime
        self.port = running.port
        self.url = running.url

    def stop(self, timeout: float | None = None) -> None:
        """Stop serving; the engine runs on. Requests have `timeout` seconds (None: the server's own) to finish."""
        with contextlib.suppress(ShutdownError):  # the engine has ended, and its servers with it
            self._runtime.wait(self._running.stop(timeout))


def serve(
    engine: Engine,
    port: int = 0,
    host: str = "127.0.0.1",
    *,
    launch_callback: Callable[[], object] | None = None,
    **options: Any,
) -> ServerHandle:
    """Serve `engine` over HTTP while it goes on being used here, until it ends or the server is stopped. Port 0 takes a
    free one. `options` are the fields of `headrace.server.ServerOptions`. `launch_callback` is called here once
    connections are accepted; what it raises ends the server.

    Raises `ConfigError` for a bad option, an address that is taken, and an outside address without a key. For an
    `AsyncEngine`: `await headrace.server.serve(...)`.
    """
    if not isinstance(engine, Engine):
        raise ConfigError("engine must be an Engine: an AsyncEngine is served by headrace.server.serve", field="engine")
    runtime = engine.asynchronous.runtime
    opening = serve_async(engine.asynchronous, port, host, **options)
    handle = ServerHandle(runtime.wait(opening, RunningServer.stop_now), runtime)
    try:
        if launch_callback is not None:
            launch_callback()
    except BaseException:  # whatever it is: nobody has this server, to stop it
        handle.stop(0.0)
        raise
    return handle
