"""What is told about a router's routes: what is told of a server's, and of its own."""

from __future__ import annotations

from typing import Any

from headrace.cluster.routes import ROUTES, VARYING_ROUTES, WORKERS_PATH
from headrace.server.described import RouteNote, rows
from headrace.server.openapi import RouteFacts, document

OWN_NOTES: dict[str, RouteNote] = {
    **rows(
        "Watching",
        WORKERS_PATH,
        "The replicas of a router; POST adds one: `url`.",
        dict,
        reply="`workers` and `total`, or the one that was added",
        remark="A `worker_type` other than regular, `bootstrap_port`, `api_key`.",
    ),
    **rows(
        "Watching",
        f"{WORKERS_PATH}/{{worker_id}}",
        "One of them; DELETE takes it away.",
        reply="the replica",
        remark="404 for one that is not there.",
    ),
    **rows(
        "Watching",
        f"{WORKERS_PATH}/{{worker_id}}/metrics",
        "What its `/metrics` says, asked with the router's key.",
        reply="text for Prometheus",
        remark="404 for one that is not there, 503 for one that does not answer.",
    ),
}


def router_document(title: str) -> dict[str, Any]:
    """OpenAPI 3.1 of a router."""
    known = {**ROUTES, **VARYING_ROUTES}
    facts = (RouteFacts(path, route.methods, route.access, route.advice) for path, route in known.items())
    return document(facts, title, OWN_NOTES)
