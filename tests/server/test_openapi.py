"""`/openapi.json` against the routes that are really there, and what is told of each against its handler."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from starlette.routing import Route

from headrace.engine import AsyncEngine
from headrace.server import ServerOptions, create_app
from headrace.server.app import all_endpoints
from headrace.server.described import NOTES, RouteNote, note_of
from headrace.server.openapi import ErrorReply
from headrace.server.routes import Endpoint
from headrace.server.state import ServerState
from headrace.types.http import PREFIX
from tests.server.conftest import Served
from tools.http_page import PAGE, page_of


@pytest.fixture(scope="module")
def listing(served: Served) -> Any:
    reply = served.http.get("/openapi.json")
    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/json")
    return reply.json()


@pytest.fixture(scope="module")
def endpoints(served: Served) -> list[Endpoint]:
    return all_endpoints(ServerState(served.engine.asynchronous, ServerOptions()))


def plain(path: str) -> str:
    return path.replace("{model:path}", "{model}")


def test_the_list_is_that_of_the_routes(served: Served, listing: Any, endpoints: list[Endpoint]) -> None:
    app = create_app(served.engine.asynchronous, ServerOptions())
    real = {}
    for route in app.router.routes:
        assert isinstance(route, Route)
        real[plain(route.path)] = {method.lower() for method in route.methods or () if method != "HEAD"}
    assert {path: set(operations) for path, operations in listing["paths"].items()} == real
    keys = {plain(each.path): each.access for each in endpoints}
    for path, operations in listing["paths"].items():
        for operation in operations.values():
            assert operation["security"] == ([] if keys[path] == "open" else [{keys[path]: []}]), path


def test_every_route_is_described_and_every_description_is_of_a_route(endpoints: list[Endpoint]) -> None:
    paths = {plain(each.path) for each in endpoints}
    lacking = [path for path in paths if note_of(path) is None]
    assert not lacking, f"headrace/server/described.py says nothing of {lacking}"
    assert NOTES.keys() <= paths
    for path in paths - NOTES.keys():
        method = path.removeprefix(f"{PREFIX}/")
        assert inspect.iscoroutinefunction(getattr(AsyncEngine, method)), f"{path} is described as a method"


def referred(node: Any, schemas: Any) -> Iterator[str]:
    """The names of schemas that something speaks of."""
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"].removeprefix("#/components/schemas/")
        for value in node.values():
            yield from referred(value, schemas)
    elif isinstance(node, list):
        for value in node:
            yield from referred(value, schemas)


def test_the_document_is_whole(listing: Any) -> None:
    schemas = listing["components"]["schemas"]
    assert set(referred(listing, schemas)) <= schemas.keys()
    operations = [each for operations in listing["paths"].values() for each in operations.values()]
    identities = [each["operationId"] for each in operations]
    assert len(set(identities)) == len(identities)
    assert {tag for each in operations for tag in each["tags"]} == {tag["name"] for tag in listing["tags"]}
    assert all(each["summary"] and "200" in each["responses"] for each in operations)
    assert listing["openapi"].startswith("3.1.")
    chat = schemas["ChatBody"]["properties"]
    assert chat["temperature"]["type"] == "number" and chat["stop"]["anyOf"][0] == {"type": "string"}


def test_a_refusal_is_as_described(served: Served) -> None:
    for path, body in (
        ("/generate", {"text": 5}),
        ("/rewards", {"rewards": 1}),
        ("/generate", {"text": "x", "lora_path": "y"}),
    ):
        reply = served.http.post(path, json=body)
        told = msgspec.json.decode(reply.content, type=ErrorReply)
        assert reply.json().keys() <= {*ErrorReply.__struct_fields__}
        assert reply.json()["error"].keys() <= {*ErrorReply.__struct_fields__} - {"object", "error"}
        assert (told.code, told.error.code, told.err_type) == (400, 400, "RequestError")


def names_read(handler: Any) -> set[str]:
    """The names in a handler's code, and in what of its module it calls."""
    function: Any = handler.func if isinstance(handler, functools.partial) else handler
    module, face = inspect.getmodule(function), type(function.__self__)
    found: set[str] = set()
    waiting = [function.__func__]
    while waiting:
        tree = ast.parse(textwrap.dedent(inspect.getsource(waiting.pop())))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        for name in names - found:
            called = vars(face).get(name) or vars(module).get(name)
            is_of_the_face = inspect.isfunction(called) and called.__module__ == function.__module__
            if is_of_the_face or name == "Draft":  # with which `/generate` reads its body
                waiting.append(called)
        found |= names
    return found


def test_bodies_are_those_that_the_handlers_read(endpoints: list[Endpoint]) -> None:
    for endpoint in endpoints:
        note = NOTES.get(plain(endpoint.path))
        if note is not None and isinstance(note.body, type) and issubclass(note.body, msgspec.Struct):
            assert note.body.__name__ in names_read(endpoint.handler), endpoint.path


def test_handlers_that_read_a_body_are_described_with_one(endpoints: list[Endpoint]) -> None:
    readers = {"read_control", "read_ask", "read_body"}
    for endpoint in endpoints:
        note = note_of(plain(endpoint.path))
        assert note is not None
        if note.body is None:
            assert not names_read(endpoint.handler) & readers, endpoint.path


REFUSING: dict[str, dict[str, Any]] = {
    "/generate": {"text": "x"},
    "/v1/completions": {"prompt": "x", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/inference/v1/generate": {"token_ids": [5], "sampling_params": {"max_tokens": 1}},
    "/start_profile": {},
    "/update_weights": {"update_info": {}},
}


def body_with(body: dict[str, Any], key: str) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    if rest:
        return {**body, first: {**body.get(first, {}), rest: "asked"}}
    value: Any = (
        True
        if key in ("stream", "profile_by_stage", "merge_profiles")
        else ["asked"]
        if key.endswith("stages")
        else "5"
    )
    return {**body, key: value}


@pytest.mark.parametrize("path", sorted(path for path, note in NOTES.items() if note.refused))
def test_keys_that_are_said_to_be_refused_are(served: Served, path: str) -> None:
    note: RouteNote = NOTES[path]
    for key in note.refused:
        reply = served.http.post(path, json=body_with(REFUSING[path], key))
        told = reply.json()
        assert reply.status_code == 400 and told["param"] == key, (key, reply.text)


def test_the_page_in_the_docs_is_current(listing: Any) -> None:
    assert PAGE.read_text(encoding="utf-8") == page_of(listing), "run: python tools/http_page.py"
