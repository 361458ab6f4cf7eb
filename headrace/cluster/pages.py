"""A router's pages and what they read, and its replicas' metrics. Owns nothing: what is shown is the lookout's, and the
table of routes."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import parse_qsl

import msgspec

from headrace.cluster.exchange import Exchange
from headrace.cluster.http_parts import Head
from headrace.cluster.lookout import Lookout
from headrace.cluster.metrics import CONTENT_TYPE
from headrace.cluster.routes import worker_of_metrics
from headrace.server.dashboard_state import DASHBOARD_PATH, DOCS_PATH, OPENAPI_PATH, STATE_PATH, read_since
from headrace.server.web_pages import HTML_TYPE, WebPage, load_page

PAGE_PATHS = (DASHBOARD_PATH, STATE_PATH, DOCS_PATH, OPENAPI_PATH)
TITLE = "Headrace router"
_OK = 200
_JSON = (b"content-type", b"application/json")


class RouterPages:
    """Answers `PAGE_PATHS`, and for the metrics of a replica."""

    def __init__(self, lookout: Lookout) -> None:
        self._lookout = lookout
        self._pages = {DASHBOARD_PATH: load_page("dashboard", TITLE), DOCS_PATH: load_page("docs", f"{TITLE}: routes")}
        self._document = b""

    async def answer(self, head: Head, exchange: Exchange) -> None:
        """One of these calls. Raises `RequestError` for a number that is none, `NotFoundError` for a replica that is
        not there, `UnreachableError` or `DeadlineError` for one that does not answer."""
        if worker := worker_of_metrics(head.path):
            answer, body = await self._lookout.metrics(worker)
            kind = CONTENT_TYPE if answer.status == _OK else _JSON[1]
            exchange.reply(answer.status, [(b"content-type", kind)], body)
        elif head.path == STATE_PATH:
            query = dict(parse_qsl(head.target.partition(b"?")[2].decode("ascii"), keep_blank_values=True))
            _json(exchange, self._lookout.state(read_since(query.get("since", "0"))))
        elif head.path == OPENAPI_PATH:
            if not self._document:
                self._document = await asyncio.get_running_loop().run_in_executor(None, _document)
            exchange.reply(200, [_JSON], self._document)
        else:
            _page(exchange, self._pages[head.path])


def _document() -> bytes:
    """The list of routes. Loads all that a server has, half a second of work that few routers need."""
    from headrace.cluster.described import router_document

    return msgspec.json.encode(router_document(TITLE))


def _page(exchange: Exchange, page: WebPage) -> None:
    headers = [(name.encode(), value.encode()) for name, value in page.headers.items()]
    exchange.reply(200, [(b"content-type", HTML_TYPE.encode()), *headers], page.body)


def _json(exchange: Exchange, value: Any) -> None:
    exchange.reply(200, [_JSON], msgspec.json.encode(value))
