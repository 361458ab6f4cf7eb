"""What clients are told while the engine loads: 503, on the socket that the real server takes over.

Owns a thread with a small HTTP server of its own. It looks at nothing that is sent, so it needs no key.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from types import TracebackType

from starlette.types import Receive, Scope, Send

from headrace.server.errors import error_body, respond
from headrace.server.limits import Limits
from headrace.server.listening import EmbeddedServer
from headrace.server.options import ServerOptions

_HAND_OVER_SECONDS = 0.5
_STEP_SECONDS = 0.005


class Starting:
    """Answers on `listener` inside a `with` block; after it the socket is as before, and no connection was refused.

    The thread accepts on a duplicate of the socket: those who connect between the two servers wait in its backlog.
    """

    def __init__(self, listener: socket.socket, options: ServerOptions) -> None:
        app = Limits(_answer, max_body_bytes=options.max_body_bytes, body_timeout=options.body_timeout)
        self._server = _StartingServer(app, options.write_timeout)
        self._thread = threading.Thread(target=self._run, args=(listener.dup(),), name="headrace-starting", daemon=True)

    def __enter__(self) -> Starting:
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(_STEP_SECONDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join()

    def _run(self, listener: socket.socket) -> None:
        with listener:
            asyncio.run(self._server.serve(sockets=[listener]))


class _StartingServer(EmbeddedServer):
    """Ends without leaving anybody unanswered whose connection it has accepted."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        self.stop_listening()
        deadline = loop.time() + _HAND_OVER_SECONDS
        await asyncio.sleep(_STEP_SECONDS)  # those just accepted are not counted yet
        while self.server_state.connections and loop.time() < deadline:
            await asyncio.sleep(_STEP_SECONDS)
        await super().shutdown(sockets)


async def _answer(scope: Scope, receive: Receive, send: Send) -> None:
    """The ASGI application. Every connection ends with its reply, so that the next one meets the real server."""
    if scope["type"] != "http":
        return
    response = respond(error_body(503, "the engine is starting", retryable=True))
    response.headers["connection"] = "close"
    await response(scope, receive, send)
