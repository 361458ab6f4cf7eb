"""What a web page of strangers, opened in a browser on this machine, can do to a server: nothing."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from headrace import ConfigError
from headrace.server import ServerOptions
from headrace.server.browsers import Hosts
from tests.server.conftest import START, Served

FOREIGN = (
    {"host": "evil.example"},
    {"host": "evil.example:80"},
    {"host": "127.0.0.1.evil.example"},
    {"host": "localhost.evil.example"},
    {"host": "10.0.0.1"},
    {"host": "0.0.0.0"},
    {"origin": "http://evil.example"},
    {"origin": "http://localhost:1"},
    {"origin": "null"},
    {"origin": ""},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
)
CALLS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("GET", "/weights_checker?action=checksum", {}),
    ("GET", "/get_weights_by_name?name=lm_head.weight", {}),
    ("GET", "/flush_cache", {}),
    ("GET", "/model_info", {}),
    ("GET", "/metrics", {}),
    ("GET", "/not/there", {}),
    ("POST", "/generate", {"json": {"input_ids": [1], "sampling_params": {"max_new_tokens": 1}}}),
    ("POST", "/abort_request", {"json": {}}),
    ("POST", "/pause_generation", {"json": {}}),
)


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_without_a_key_no_foreign_page_gets_in(served: Served, headers: dict[str, str]) -> None:
    for method, path, more in CALLS:
        reply = served.http.request(method, path, headers=headers, **more)
        assert reply.status_code == 403, (method, path)
        assert "lm_head" not in reply.text
    assert served.http.get("/health", headers=headers).status_code == 200  # probes come from anywhere
    assert served.http.get("/ready").status_code == 200


def test_own_names_and_pages_get_in(served: Served) -> None:
    port = served.handle.port
    for host in ("localhost", f"LOCALHOST:{port}", f"127.0.0.1:{port}", "127.1.2.3", f"[::1]:{port}", "a.localhost"):
        assert served.http.get("/model_info", headers={"host": host}).status_code == 200, host
    own = {"host": f"localhost:{port}", "origin": f"http://localhost:{port}", "sec-fetch-site": "same-origin"}
    assert served.http.get("/model_info", headers=own).status_code == 200
    assert served.http.get("/model_info", headers={"sec-fetch-site": "none"}).status_code == 200
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(b"GET /model_info HTTP/1.0\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200")


def test_with_a_key_the_key_is_enough(start: START) -> None:
    served = start(api_key="key")
    for headers in FOREIGN:
        refused = served.http.get("/model_info", headers=headers)
        assert (refused.status_code, refused.headers["connection"]) == (401, "close")
        keyed = {**headers, "authorization": "Bearer key"}
        assert served.http.get("/model_info", headers=keyed).status_code == 200
    partly = start(admin_api_key="admin")
    for headers in FOREIGN:
        assert partly.http.get("/model_info", headers=headers).status_code == 403
        keyed = {**headers, "authorization": "Bearer admin"}
        assert partly.http.post("/abort_request", json={}, headers=keyed).status_code == 200


def test_names_can_be_allowed(start: START) -> None:
    served = start(allowed_hosts=("node7.cluster",))
    assert served.http.get("/model_info", headers={"host": "Node7.cluster.:80"}).status_code == 200
    assert served.http.get("/model_info", headers={"host": "node8.cluster"}).status_code == 403
    assert start(allowed_hosts=("*",)).http.get("/model_info", headers={"host": "any"}).status_code == 200


def test_outside_addresses_are_no_names_of_pages() -> None:
    hosts = Hosts("0.0.0.0", ())
    assert all(
        hosts.know(host) for host in ("10.0.0.1:30000", "[fe80::1]:1", socket.gethostname().lower(), "localhost")
    )
    assert not hosts.know("evil.example") and not hosts.know("") and not hosts.know("10.0.0.1.evil.example")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("action", ["reset_tensors", "snapshot"])
def test_a_get_changes_nothing(served: Served, method: str, action: str) -> None:
    before = served.http.get("/weights_checker").json()["per_engine_checksum"]
    reply = served.http.request(method, f"/weights_checker?action={action}")
    by_body = served.http.request(method, "/weights_checker", json={"action": action})
    assert (reply.status_code, by_body.status_code) == (405, 405)
    assert reply.headers["allow"] == by_body.headers["allow"] == "POST"
    assert served.http.get("/weights_checker").json()["per_engine_checksum"] == before


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "a/json"]
)
def test_changes_need_json(served: Served, kind: str) -> None:
    """The kinds of body that a browser sends to a foreign site without asking it first."""
    calls = {
        "/pause_generation": b'{"mode": "keep"}',
        "/abort_request": b'{"abort_all": true}',
        "/update_weight_version": b'{"new_version": "x"}',
        "/weights_checker": b'{"action": "reset_tensors"}',
        "/release_memory_occupation": b"{}",
        "/sleep": b'{"level": 2}',
        "/start_weight_update": b"{}",
    }
    for path, body in calls.items():
        for content in (body, iter([body])):
            reply = served.http.post(path, content=content, headers={"content-type": kind})
            assert (reply.status_code, reply.json()["param"]) == (415, "content-type"), path
    assert served.http.get("/ready").json() == {"ready": True, "weight_version": "default"}


def test_json_is_taken_however_it_is_spelt(served: Served) -> None:
    for kind in ("application/json", "Application/JSON; charset=utf-8", "application/problem+json"):
        reply = served.http.post("/abort_request", content=b"{}", headers={"content-type": kind})
        assert reply.status_code == 200
    assert served.http.post("/flush_cache").status_code == 200
    assert served.http.post("/continue_generation").status_code == 400


def test_keys_come_from_files(start: START, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, admin = tmp_path / "data", tmp_path / "admin"
    data.write_text("data-key\n")
    admin.write_text("  admin key\r\n\n")
    data.chmod(0o600)
    admin.chmod(0o640)
    served = start(api_key_file=str(data), admin_api_key_file=str(admin))
    for key, statuses in {"data-key": (200, 401), "admin key": (200, 200), "x": (401, 401)}.items():
        headers = {"authorization": f"Bearer {key}"}
        found = (served.http.get("/model_info", headers=headers), served.http.get("/flush_cache", headers=headers))
        assert tuple(reply.status_code for reply in found) == statuses
    warned = [record.getMessage() for record in caplog.records if record.name == "headrace.server.options"]
    assert len(warned) == 1 and "admin_api_key_file" in warned[0]


@pytest.mark.parametrize("content", [b"", b" \n", "ключ".encode(), b"a\nb\n", b"x" * 5000, b"\xff"])
def test_a_bad_key_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        ServerOptions.from_dict({"api_key_file": str(path)})
    assert raised.value.field == "api_key_file"
    assert "bbb" not in raised.value.message


def test_key_settings_that_cannot_hold_are_named(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("key")
    for settings, field in (
        ({"api_key": " "}, "api_key"),
        ({"api_key": " key"}, "api_key"),
        ({"admin_api_key": "\t"}, "admin_api_key"),
        ({"admin_api_key": "schlüssel"}, "admin_api_key"),
        ({"api_key_file": str(tmp_path)}, "api_key_file"),
        ({"api_key_file": str(tmp_path / "none")}, "api_key_file"),
        ({"api_key": "a", "api_key_file": str(path)}, "api_key_file"),
    ):
        with pytest.raises(ConfigError) as raised:
            ServerOptions.from_dict(settings)
        assert raised.value.field == field, settings
    ServerOptions.from_dict({"api_key_file": str(path)}).check_address("0.0.0.0")


def test_a_browser_needs_no_body_to_be_refused(served: Served) -> None:
    """`fetch(url, {method: "POST"})` has no content type, but an origin."""
    for path in ("/flush_cache", "/continue_generation", "/generate"):
        reply = httpx.post(served.url + path, headers={"origin": "https://evil.example"})
        assert reply.status_code == 403
