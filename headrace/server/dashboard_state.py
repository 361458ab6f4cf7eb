"""What `/dashboard` shows, as a value: a server's answer and a router's. Owns its shape; reads nothing."""

from __future__ import annotations

import msgspec

from headrace.telemetry import HistoryPart, HistoryPoint
from headrace.types.errors import RequestError

DASHBOARD_PATH = "/dashboard"
STATE_PATH = "/dashboard/state"
REWARDS_PATH = "/rewards"
DOCS_PATH = "/docs"
OPENAPI_PATH = "/openapi.json"
LOOK_SECONDS = 1.0
"""How often a page asks a server, while it is seen."""


class ReplicaView(msgspec.Struct, frozen=True, kw_only=True):
    """One replica as its router sees it: `num_requests` are without an answer, `now` is what it said of itself last."""

    id: str
    url: str
    is_healthy: bool
    is_ready: bool
    ailment: str
    num_requests: int
    num_sent: int
    weight_version: str | None
    now: HistoryPoint | None = None


class DashboardState(msgspec.Struct, frozen=True, kw_only=True):
    """`look_seconds`: it says nothing new before. `replicas` is null where one engine answers."""

    kind: str
    version: str
    model: str
    is_ready: bool
    look_seconds: float
    history: HistoryPart
    replicas: list[ReplicaView] | None = None


def read_since(text: str) -> int:
    """The number behind which a page wants to know what is new. Raises `RequestError`."""
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise RequestError("since must be a number that an answer before had as `last`", field="since")
    return int(text)
