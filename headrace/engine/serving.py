"""The way from an engine to a server of it, which is a higher layer: opened when somebody serves, and nowhere else.

Owns this package's one import upward, and what an engine knows of a server.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from headrace.engine.runtime import EngineLoop
from headrace.types.errors import ShutdownError


class HttpServer(Protocol):
    """A server on the engine's loop. `url` is the base of all routes."""

    port: int
    url: str

    async def stop(self, timeout: float | None = None) -> None:
        """Take no new requests, let those that run finish for so long, then close. From any loop."""


class ServerHandle:
    """A running HTTP server of an engine."""

    def __init__(self, running: HttpServer, runtime: EngineLoop) -> None:
        self._running = running
        self._runtime = runtime
        self.port = running.port
        self.url = running.url

    def stop(self, timeout: float | None = None) -> None:
        """Stop serving; the engine runs on. Requests have `timeout` seconds (None: the server's own) to finish."""
        with contextlib.suppress(ShutdownError):  # the engine has ended, and its servers with it
            self._runtime.wait(self._running.stop(timeout))


def server_door() -> Callable[..., Coroutine[Any, Any, HttpServer]]:
    """`headrace.server.serve`. To load it is too slow for a loop with streams on it."""
    from headrace.server.run import serve

    return serve


async def stop_server(running: HttpServer) -> None:
    """Undo a `serve` of which nobody heard."""
    await running.stop(0.0)
