"""A route as a value. The table of all routes is what the application, the key check and the tests read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from headrace.server.auth import Access

Handler = Callable[[Request], Awaitable[Response]]


class Endpoint(msgspec.Struct, frozen=True):
    """`access` is the key it needs. `generates`: it is counted, waited for on shutdown, and refused while draining."""

    path: str
    handler: Handler
    methods: tuple[str, ...] = ("GET",)
    access: Access = "data"
    generates: bool = False
