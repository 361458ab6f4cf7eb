"""Lets generation requests in, or not. An ASGI middleware, so that a stream counts until its last byte."""

from __future__ import annotations

from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from headrace.server.errors import body_of, respond
from headrace.server.state import ServerState
from headrace.types.errors import ShutdownError


class Gate:
    """Counts requests to `paths` in `state`; refuses them while the server drains."""

    def __init__(self, app: ASGIApp, state: ServerState, paths: Collection[str]) -> None:
        self._app = app
        self._state = state
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in self._paths:
            await self._app(scope, receive, send)
            return
        if self._state.is_draining:
            error = ShutdownError("the server is shutting down; try another replica")
            await respond(body_of(error))(scope, receive, send)
            return
        with self._state.active(scope["path"]):
            await self._app(scope, receive, send)
