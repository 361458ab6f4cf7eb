"""Writes docs/http.md, the list of HTTP routes, from what a server says of itself: `python tools/http_page.py`.

It starts `headrace.serve` over the demo's policy with an executor that computes nothing, reads `/openapi.json`, and
adds what becomes of each route at a router. `--check` writes nothing, and exits with 1 if the page is not current.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from headrace import Engine, serve
from headrace.cluster.described import router_document
from headrace.cluster.routes import RouterRoute, Treatment, route_of
from headrace.rl.demo import POLICY

PAGE = Path(__file__).resolve().parents[1] / "docs" / "http.md"
_HEAD = """# HTTP routes

Written by `tools/http_page.py` from `/openapi.json` of a server; a test holds that it is current. A running server
shows the same at `/docs`, with the type and default of every key, and `headrace router` its own.

**Keys.** A route that is *open* needs none; *key* is `--api-key`, *admin* the key of control calls (`--admin-api-key`,
else the same). They are sent as `Authorization: Bearer KEY`. Without keys no route needs one, and web pages of others
are kept out.

**Refusals.** Every refused call is answered by an object with `message`, `type`, `param` (the field at fault), `code`
(the status), `retryable` and `err_type`, and the same once more under `error`. Keys of other engines that this one
lacks are refused by name if they ask for something: null, false, 0, empty and defaults do not. Keys that nobody knows
are passed over, on generation routes with a warning.

**At a router**: *one* replica answers; *all* do, and each has to succeed; all healthy ones take new weights behind a
fence of versions ([router.md](router.md)); all *agree*, or it is 409; the *router* itself answers; or it is *refused*
there (501), with what to do instead.
"""
_KEYS = {"data": "key", "admin": "admin"}
_TREATMENTS: dict[Treatment, str] = {
    "generate": "one, by policy",
    "route": "one",
    "fan_out": "all",
    "agree": "agree",
    "update": "all, fenced",
    "group": "all, fenced",
    "session": "all, fenced",
    "own": "router",
    "refuse": "refused",
}


def read_document() -> dict[str, Any]:
    """`/openapi.json` of a server."""
    with Engine(str(POLICY), inprocess=True, executor="free", num_threads=1, context_length=64) as engine:
        served = serve(engine)
        document: dict[str, Any] = httpx.get(f"{served.url}/openapi.json", trust_env=False).raise_for_status().json()
        served.stop()
    return document


def page_of(document: Mapping[str, Any]) -> str:
    """The page, from a server's OpenAPI document and the router's table."""
    only_router = {
        path: operations
        for path, operations in router_document("")["paths"].items()
        if path not in document["paths"] and path != "/headrace/{method}"
    }
    paths = {**document["paths"], **only_router}
    parts = [_HEAD]
    for tag in document["tags"]:
        found = {path: each for path, each in paths.items() if _first(each)["tags"] == [tag["name"]]}
        parts += [f"## {tag['name']}\n", f"{tag['description']}\n", *_table(found), *_refused(found, document)]
    return "\n".join(parts)


def _first(operations: Mapping[str, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = next(iter(operations.values()))
    return operation


def _table(paths: Mapping[str, Any]) -> Iterator[str]:
    yield "| route | key | | answer | at a router |"
    yield "|---|---|---|---|---|"
    for path, operations in paths.items():
        operation = _first(operations)
        methods = ", ".join(map(str.upper, operations))
        key = "".join(_KEYS[name] for each in operation["security"] for name in each) or "open"
        reply = operation["responses"]["200"]["description"]
        told = operation["summary"], reply, _at_router(route_of(path.replace("{", "").replace("}", "")))
        yield f"| {methods} `{path}` | {key} | {' | '.join(told)} |"
    yield ""


def _at_router(route: RouterRoute | None) -> str:
    return "404" if route is None else _TREATMENTS[route.treatment]


def _refused(paths: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[str]:
    """What is refused, and which keys are taken, of routes that have either."""
    for path, operations in paths.items():
        operation = _first(operations) if "post" not in operations else operations["post"]
        keys, remark = _body_keys(operation, document), operation.get("description", "")
        refused = operation.get("x-headrace-refused", ())
        if not keys and not remark and not refused:
            continue
        yield f"**`{path}`**"
        if keys:
            yield f"takes {_names(keys)}."
        if remark:
            yield remark
        if refused:
            yield f"Keys refused: {_names(refused)}."
        yield ""


def _body_keys(operation: Mapping[str, Any], document: Mapping[str, Any]) -> list[str]:
    for content in operation.get("requestBody", {}).get("content", {}).values():
        name = content["schema"].get("$ref", "").rpartition("/")[2]
        return list(document["components"]["schemas"].get(name, {}).get("properties", ()))
    return []


def _names(keys: list[str]) -> str:
    return ", ".join(f"`{key}`" for key in keys)


def main(arguments: list[str]) -> int:
    page = page_of(read_document())
    if arguments == ["--check"]:
        return int(PAGE.read_text(encoding="utf-8") != page)
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
