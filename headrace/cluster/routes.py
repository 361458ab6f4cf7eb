"""What becomes of each call at a router, as one table: the routes of `headrace serve`, and the router's own.

`tests/cluster/test_routes.py` holds it against the server's table, so that no call of a replica is forgotten here.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from headrace.server.auth import Access
from headrace.types.http import PREFIX

Treatment = Literal["generate", "route", "fan_out", "agree", "update", "group", "session", "own", "refuse"]


class RouterRoute(msgspec.Struct, frozen=True):
    """`generate` and `route`: one replica answers it, the first kind by its prompt. `fan_out`: all do, and each has to
    succeed. `agree`: all do, and have to say the same. `update`, `group` and `session`: all do, and who fails leaves
    the rotation; the second kind is of a trainer's group, the third our own client's. `own`: the router. `refuse`:
    nobody; `advice`: what to do."""

    treatment: Treatment
    methods: tuple[str, ...] = ("POST",)
    access: Access = "data"
    advice: str = ""


WORKERS_PATH = "/workers"
_GET, _BOTH = ("GET",), ("GET", "POST")
_EACH = "send it to each replica (GET /workers lists them)"
_DRAFT = "there are no draft models behind it"
_CLIENT = "open a headrace.Client of each replica (GET /workers lists them; those of dp_size take none)"


def _routes(treatment: Treatment, paths: str, **more: object) -> dict[str, RouterRoute]:
    return {path: RouterRoute(treatment, **more) for path in paths.split()}  # type: ignore[arg-type]


def _own(treatment: Treatment, names: str) -> dict[str, RouterRoute]:
    """Calls of our own client."""
    return _routes(treatment, " ".join(f"{PREFIX}/{name}" for name in names.split()), access="admin")


ROUTES: dict[str, RouterRoute] = {
    "/generate": RouterRoute("generate", ("POST", "PUT")),
    **_routes("generate", "/v1/chat/completions /v1/completions /inference/v1/generate"),
    **_routes("generate", f"{PREFIX}/generate {PREFIX}/chat"),
    **_routes("route", "/tokenize /v1/tokenize /detokenize /v1/detokenize"),
    **_routes("route", "/v1/models /model_info /get_model_info /server_info /get_server_info", methods=_GET),
    **_routes("own", "/health /liveness /health_generate /ready", methods=_GET, access="open"),
    **_routes("own", "/dashboard /docs", methods=_GET, access="open"),
    **_routes("own", "/metrics /dashboard/state /openapi.json", methods=_GET),
    **_routes("fan_out", f"/rewards {PREFIX}/give_rewards"),
    WORKERS_PATH: RouterRoute("own", _BOTH, "admin"),
    **_routes("fan_out", "/abort_request /pause_generation /continue_generation", access="admin"),
    **_routes("fan_out", "/release_memory_occupation /resume_memory_occupation", access="admin"),
    **_routes("fan_out", "/flush_cache", methods=_BOTH, access="admin"),
    **_routes("fan_out", "/post_process_weights", access="admin"),
    **_routes("update", "/update_weights_from_disk /update_weights_from_tensor", access="admin"),
    **_routes("update", "/begin_weight_update /end_weight_update /abort_weight_update", access="admin"),
    **_routes("update", "/update_weight_version", access="admin"),
    **_routes("fan_out", "/pause /resume /abort_requests /sleep /wake_up /reset_prefix_cache", access="admin"),
    **_routes("fan_out", "/freeze_gc", access="admin"),
    **_routes("agree", "/weight_version /get_weight_version /is_paused /is_sleeping /weight_info", methods=_GET),
    **_routes("refuse", "/get_load /v1/loads", methods=_GET, advice=_EACH),
    **_routes("refuse", "/get_weights_by_name /weights_checker", methods=_BOTH, access="admin", advice=_EACH),
    **_routes("refuse", "/slow_down /start_profile /stop_profile /collective_rpc", access="admin", advice=_EACH),
    **_routes("group", "/init_weights_update_group /destroy_weights_update_group", access="admin"),
    **_routes("group", "/update_weights_from_distributed", access="admin"),
    **_routes("group", "/init_weight_transfer_engine /start_weight_update", access="admin"),
    **_routes("group", "/update_weights /finish_weight_update", access="admin"),
    **_routes("group", "/get_world_size", methods=_GET),
    **_routes("refuse", "/start_draft_weight_update", access="admin", advice=_DRAFT),
    **_own("session", "begin_update extend_update join_update settle_part stage lend stage_lent commit abort_update"),
    **_own("session", "update_weights_from_disk set_weight_version"),
    **_own("fan_out", "pause resume abort flush_cache release_memory_occupation resume_memory_occupation"),
    **_own("agree", "digest"),
}
"""By path; of those with a part that varies, `route_of` knows more."""

_MODEL = RouterRoute("route", _GET)
_WORKER = RouterRoute("own", ("GET", "DELETE"), "admin")
_WORKER_METRICS = RouterRoute("own", _GET)
_OTHER_CALL = RouterRoute("refuse", access="admin", advice=_CLIENT)
VARYING_ROUTES = {
    "/v1/models/{model}": _MODEL,
    f"{WORKERS_PATH}/{{worker_id}}": _WORKER,
    f"{WORKERS_PATH}/{{worker_id}}/metrics": _WORKER_METRICS,
    f"{PREFIX}/{{method}}": _OTHER_CALL,
}
"""By their form."""


def worker_of_metrics(path: str) -> str:
    """The replica whose metrics are at a path; "" of any other path."""
    worker = path.removeprefix(f"{WORKERS_PATH}/").removesuffix("/metrics")
    return worker if path == f"{WORKERS_PATH}/{worker}/metrics" else ""


def route_of(path: str) -> RouterRoute | None:
    """The route at a path; None where there is none."""
    found = ROUTES.get(path)
    if found is not None:
        return found
    if path.startswith("/v1/models/"):
        return _MODEL
    if path.startswith(f"{WORKERS_PATH}/"):
        return _WORKER_METRICS if worker_of_metrics(path) else _WORKER
    return _OTHER_CALL if path.startswith(f"{PREFIX}/") else None
