"""Keys: every route of the table needs one, unless it says otherwise."""

from __future__ import annotations

import pytest
from starlette.routing import Route

from headrace import ConfigError
from headrace.server import ServerOptions, create_app
from headrace.server.app import all_endpoints
from headrace.server.state import ServerState
from tests.arch.source import ROOT
from tests.server.conftest import START, Served

OPEN = {"/health", "/liveness", "/health_generate", "/ready", "/dashboard", "/docs"}
ADMIN = {
    *("/abort_request", "/pause_generation", "/continue_generation", "/flush_cache", "/update_weights_from_disk"),
    *(f"/headrace/{name}" for name in ("abort", "resume", "pause", "flush_cache", "set_weight_version", "digest")),
    *(
        f"/headrace/{name}"
        for name in (
            "weights_checker",
            "begin_update",
            "extend_update",
            "join_update",
            "settle_part",
            "stage",
            "lend",
            "stage_lent",
            "stage_from_group",
            "commit",
        )
    ),
    *(f"/headrace/{name}" for name in ("abort_update", "update_weights_from_disk", "get_weights_by_name")),
    *("/headrace/release_memory_occupation", "/headrace/resume_memory_occupation"),
    *("/headrace/init_weights_update_group", "/headrace/destroy_weights_update_group"),
    "/headrace/update_weights_from_distributed",
    *("/headrace/save_model", "/headrace/save_sharded_model", "/headrace/save_remote_model"),
    *("/update_weight_version", "/get_weights_by_name", "/weights_checker", "/abort_weight_update"),
    *("/release_memory_occupation", "/resume_memory_occupation"),
    *("/update_weights_from_tensor", "/begin_weight_update", "/end_weight_update"),
    *("/pause", "/resume", "/abort_requests", "/sleep", "/wake_up", "/reset_prefix_cache", "/update_weights"),
    *("/init_weight_transfer_engine", "/start_weight_update", "/start_draft_weight_update", "/finish_weight_update"),
    *("/slow_down", "/freeze_gc", "/start_profile", "/stop_profile", "/collective_rpc", "/post_process_weights"),
    *(f"/headrace/{name}" for name in ("slow_down", "freeze_gc", "start_profile", "stop_profile", "collective_rpc")),
    *("/init_weights_update_group", "/update_weights_from_distributed", "/destroy_weights_update_group"),
}


def routes(served: Served) -> list[tuple[str, str]]:
    """(path, method) of every route of the application itself."""
    app = create_app(served.engine.asynchronous, ServerOptions())
    found = []
    for route in app.router.routes:
        assert isinstance(route, Route), "a route of another kind needs a look here"
        found += [(route.path.replace("{model:path}", "x"), method) for method in route.methods or ()]
    return found


def test_every_route_is_in_the_table_and_refuses_strangers(start: START) -> None:
    served = start(api_key="secret")
    table = routes(served)
    assert {path for path, _ in table} >= OPEN | ADMIN | {"/generate", "/metrics", "/v1/models", "/server_info"}
    strange: list[dict[str, str]] = [{}, {"authorization": "Bearer wrong"}]
    more: list[dict[str, str]] = [{"authorization": "Basic secret"}, {"authorization": "secret"}]
    for path, method in table:
        for headers in strange + (more if path in OPEN or path in ("/pause", "/generate") else []):
            status = served.http.request(method, path, headers=headers).status_code
            assert (status != 401) == (path in OPEN), (method, path, status)
    assert served.http.get("/not/there").status_code == 401
    assert served.http.get("/generate/").status_code == 401
    assert served.http.get("//health").status_code == 401


def test_the_data_key_opens_everything_when_there_is_no_admin_key(start: START) -> None:
    served = start(api_key="secret")
    for path, method in routes(served):
        reply = served.http.request(method, path, headers={"authorization": "bearer secret"})
        assert reply.status_code != 401, (method, path)


def test_control_routes_need_the_admin_key_when_there_is_one(start: START) -> None:
    served = start(api_key="data", admin_api_key="admin")
    for path, method in routes(served):
        by_data = served.http.request(method, path, headers={"authorization": "Bearer data"}).status_code
        by_admin = served.http.request(method, path, headers={"authorization": "Bearer admin"}).status_code
        assert (by_data == 401) == (path in ADMIN), (method, path)
        assert by_admin != 401, (method, path)


@pytest.mark.parametrize("suffix", ["%0A", "%0D", "%00", "%20", "/", "%2F", "%0A%0A"])
def test_a_path_that_is_nearly_a_route_is_none(start: START, suffix: str) -> None:
    """Keys are looked up by path: what the router takes for a route must be the very path of the table, for whoever may
    use the least."""
    served = start(api_key="data", admin_api_key="admin")
    for path, method in routes(served):
        if path.startswith("/v1/models"):
            continue  # what follows is any name
        reply = served.http.request(method, path + suffix, headers={"authorization": "Bearer data"})
        assert reply.status_code == 404, (method, path)
        if path in OPEN or path in ("/pause", "/generate"):  # to the table the others are a path that it does not have
            assert served.http.request(method, path + suffix).status_code == 401, (method, path)
            reply = served.http.request(method, path + suffix, headers={"authorization": "Bearer admin"})
            assert reply.status_code == 404, (method, path)


def test_without_keys_any_bearer_passes(served: Served) -> None:
    for value in ("Bearer None", "Bearer x", "nonsense"):
        assert served.http.get("/model_info", headers={"authorization": value}).status_code == 200


def test_admin_routes_are_those_that_change_things(served: Served) -> None:
    state = ServerState(served.engine.asynchronous, ServerOptions())
    access = {endpoint.path: endpoint.access for endpoint in all_endpoints(state)}
    assert {path for path, kind in access.items() if kind == "admin"} == ADMIN
    assert {path for path, kind in access.items() if kind == "open"} == OPEN
    (told,) = [line for line in (ROOT / "SECURITY.md").read_text().splitlines() if "where `--api-key` is set |" in line]
    assert {word for word in told.split("`") if word.startswith("/")} == OPEN


def test_keys_do_not_leak(start: START) -> None:
    served = start(api_key="sesame-1", admin_api_key="sesame-2")
    for path in ("/server_info", "/metrics", "/v1/loads", "/model_info"):
        assert "sesame" not in served.http.get(path, headers={"authorization": "Bearer sesame-1"}).text


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org"])
def test_an_outside_address_needs_a_key(host: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ServerOptions().check_address(host)
    assert raised.value.field == "host"
    ServerOptions(api_key="k").check_address(host)
    ServerOptions(insecure=True).check_address(host)


def test_a_key_is_not_in_its_refusal() -> None:
    for key in ("sesame\ud800", "sesame ", "sésame"):
        with pytest.raises(ConfigError) as raised:
            ServerOptions.from_dict({"api_key": key})
        assert raised.value.field == "api_key" and "same" not in raised.value.message


def test_a_host_that_is_none_is_told_so() -> None:
    with pytest.raises(ConfigError, match=r"host no\.such\.host\.invalid cannot be resolved") as raised:
        ServerOptions().check_address("no.such.host.invalid")
    assert raised.value.field == "host"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    ServerOptions().check_address(host)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"api_key": ""}, "api_key"),
        ({"admin_api_key": "two\nlines"}, "admin_api_key"),
        ({"max_body_bytes": 1}, "max_body_bytes"),
        ({"drain_timeout": -1}, "drain_timeout"),
        ({"max_body_bytes": "big"}, "max_body_bytes"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ServerOptions.from_dict(settings)
    assert raised.value.field == field
