"""`/openapi.json`, the list of all routes, and `/docs`, a page that shows it. Owns when the list is made."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from headrace.server.dashboard_state import DOCS_PATH, OPENAPI_PATH
from headrace.server.openapi import RouteFacts, document
from headrace.server.routes import Endpoint
from headrace.server.web_pages import HTML_TYPE, load_page
from headrace.server.wire import JSON_TYPE, encode_json

TITLE = "Headrace"


class DocsFace:
    """Both routes. `others` are those of all other faces."""

    def __init__(self, others: Sequence[Endpoint]) -> None:
        self._others = others
        self._page = load_page("docs", f"{TITLE}: routes")

    def endpoints(self) -> list[Endpoint]:
        return [Endpoint(DOCS_PATH, self.page, access="open"), Endpoint(OPENAPI_PATH, self.openapi)]

    async def page(self, request: Request) -> Response:
        """GET /docs: the page, which reads `/openapi.json`."""
        return Response(self._page.body, headers=dict(self._page.headers), media_type=HTML_TYPE)

    async def openapi(self, request: Request) -> Response:
        """GET /openapi.json"""
        return Response(self._document, media_type=JSON_TYPE)

    @functools.cached_property
    def _document(self) -> bytes:
        endpoints = (*self._others, *self.endpoints())
        return encode_json(document((RouteFacts(each.path, each.methods, each.access) for each in endpoints), TITLE))
