"""The HTTP application of one engine: faces, error handlers and middleware put together. Decides nothing else."""

from __future__ import annotations

import re

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from headrace.engine import AsyncEngine
from headrace.server import errors
from headrace.server.admin import AdminFace
from headrace.server.auth import Access, Auth, keys_of
from headrace.server.browsers import Hosts
from headrace.server.carrying import Carrier
from headrace.server.dashboard import DashboardFace
from headrace.server.docs import DocsFace
from headrace.server.folders import Folders
from headrace.server.gate import Gate
from headrace.server.info import InfoFace
from headrace.server.limits import Limits
from headrace.server.native import NativeFace
from headrace.server.native_weights import WeightsFace
from headrace.server.openai_chat import ChatFace
from headrace.server.openai_completions import CompletionsFace
from headrace.server.openai_models import ModelsFace
from headrace.server.options import ServerOptions
from headrace.server.probing import ProbeFace
from headrace.server.routes import Endpoint, Handler
from headrace.server.saving import SaveFace
from headrace.server.state import ServerState
from headrace.server.surface import SurfaceFace
from headrace.server.vllm import VllmFace
from headrace.server.vllm_generate import VllmGenerateFace
from headrace.server.weight_groups import GroupFace
from headrace.server.weights import BucketFace
from headrace.types.errors import HeadraceError


def create_app(engine: AsyncEngine, options: ServerOptions, host: str = "127.0.0.1") -> Starlette:
    """The application, to be served on `host`. It must run on `engine.loop`; `app.state.server` is its `ServerState`.

    Bodies are decoded and checked by the faces, so that a request costs microseconds and errors read the same
    everywhere: the routes are plain ones, without generated schemas.
    """
    state = ServerState(engine, options)
    endpoints = all_endpoints(state)
    generating = [endpoint.path for endpoint in endpoints if endpoint.generates]
    access: dict[str, Access] = {endpoint.path: endpoint.access for endpoint in endpoints}
    keys = keys_of(options.api_key, options.admin_api_key)
    app = Starlette(
        routes=[_route(endpoint) for endpoint in endpoints],
        middleware=[
            Middleware(
                Limits,
                max_body_bytes=options.max_body_bytes,
                body_timeout=options.body_timeout,
                open_paths=[path for path, needed in access.items() if needed == "open"],
            ),
            Middleware(Auth, access=access, keys=keys, hosts=Hosts(host, options.allowed_hosts)),
            Middleware(Gate, state=state, paths=generating),
            Middleware(Carrier, paths=generating),
        ],
        exception_handlers={
            HeadraceError: errors.on_headrace_error,
            HTTPException: errors.on_http_exception,
            ClientDisconnect: errors.on_disconnect,
            Exception: errors.on_unexpected,
        },
    )
    app.router.redirect_slashes = False
    app.state.server = state
    return app


def _route(endpoint: Endpoint) -> Route:
    """A route that matches to the last character: Starlette's pattern ends in `$`, which also matches before a final
    line feed, and `Auth` and `Gate` know paths by equality."""
    route = Route(endpoint.path, _Handled(endpoint.handler), methods=list(endpoint.methods))
    route.path_regex = re.compile(route.path_regex.pattern.removesuffix("$") + r"\Z")
    return route


class _Handled:
    """A handler as an ASGI application. Its errors are answered by the application's handlers, which stand around all
    routes; Starlette would put them around each route once more."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._handler(Request(scope, receive, send))
        await response(scope, receive, send)


def all_endpoints(state: ServerState) -> list[Endpoint]:
    """Every route of every face; the busiest first, since they are matched in order."""
    options = state.options
    folders = Folders(state.engine.resolved.folder, options.weight_roots, options.save_roots)
    faces = (
        NativeFace(state),
        ChatFace(state),
        CompletionsFace(state),
        ModelsFace(state),
        InfoFace(state),
        AdminFace(state, folders),
        BucketFace(state),
        GroupFace(state),
        VllmFace(state, folders),
        VllmGenerateFace(state),
        ProbeFace(state, folders),
        SurfaceFace(state, folders),
        WeightsFace(state, folders),
        SaveFace(state, folders),
        DashboardFace(state),
    )
    endpoints = [endpoint for face in faces for endpoint in face.endpoints()]
    return [*endpoints, *DocsFace(endpoints).endpoints()]
