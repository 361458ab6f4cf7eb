"""The router's table against the server's: no call of a replica is forgotten, none is easier to make."""

from __future__ import annotations

from unittest.mock import MagicMock

import pytest

from headrace.cluster.routes import ROUTES, route_of
from headrace.server.app import all_endpoints
from headrace.server.options import ServerOptions
from headrace.server.routes import Endpoint


def endpoints() -> list[Endpoint]:
    state = MagicMock()
    state.options = ServerOptions()
    return all_endpoints(state)


def test_every_route_of_a_server_is_one_of_the_router_with_the_same_methods_and_key() -> None:
    known = {endpoint.path: endpoint for endpoint in endpoints()}
    for path, endpoint in known.items():
        route = route_of(path.replace("{model:path}", "a/b"))
        assert route is not None, path
        if not path.startswith("/headrace/") or route.treatment != "refuse":
            assert set(route.methods) == set(endpoint.methods), path
        assert route.access == endpoint.access or route.treatment == "refuse", path
        assert (route.treatment == "generate") == endpoint.generates, path
        assert (route.treatment == "refuse") == bool(route.advice), path


def test_the_router_knows_no_route_that_neither_it_nor_a_server_has() -> None:
    known = {endpoint.path for endpoint in endpoints()}
    assert {path for path in ROUTES if path not in known} == {"/workers"}


@pytest.mark.parametrize("path", ["/", "/generate/", "/workersx", "/%67enerate", "/v1", "/headrace"])
def test_other_paths_are_no_routes(path: str) -> None:
    assert route_of(path) is None
