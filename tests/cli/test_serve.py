"""`headrace serve` as a process: 503 while it loads, 200 once it is ready, a drain on SIGTERM, one line on failure."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from headrace import ConfigError
from headrace.cli.flags import with_keys
from headrace.parallel.rendezvous import kept_store
from headrace.server import ServerOptions
from tests.arch.source import ROOT, child_environment
from tests.engine.group_trainer import TrainerProcess
from tests.free_ports import free_port
from tests.processes import children_of

POLICY = ROOT / "headrace" / "rl" / "policy"
OPEN_PATHS = ("/health", "/health_generate", "/ready")
LONG = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 100, "ignore_eos": True}, "stream": True}


@pytest.fixture(scope="module", autouse=True)
def warm(warm_processes: None) -> None:
    """Where a start is what is tested, it is cold."""


def serve(folder: Path, *words: str) -> subprocess.Popen[str]:
    small = ["--num-threads", "1", "--kv-pool-tokens", "4096", "--port", "0", *words]
    return subprocess.Popen(
        [sys.executable, "-m", "headrace", "serve", str(folder), *small],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=child_environment(),
    )


def read_event(process: subprocess.Popen[str], message: str) -> dict[str, Any]:
    """The log's next line with this message."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("{") and (event := json.loads(line))["message"] == message:
            return dict(event)
    raise AssertionError(f"the process ended without {message!r}")


@pytest.fixture
def process(cold_processes: None) -> Iterator[subprocess.Popen[str]]:
    with serve(POLICY, "--log-json", "--log-level", "debug", "--api-key", "secret") as started:
        yield started
        started.kill()


def raw_exchange(url: str, request: bytes) -> bytes:
    """What the server answers until it closes the connection."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(4096), b""))


def test_a_server_that_loads_answers_503_and_then_serves(process: subprocess.Popen[str]) -> None:
    url = read_event(process, "starting")["url"]
    for path in OPEN_PATHS:
        assert httpx.get(url + path, timeout=60).status_code == 503
    refused = httpx.post(f"{url}/generate", json=LONG, timeout=60)
    assert refused.status_code == 503 and refused.headers["retry-after"]
    assert refused.json()["retryable"] is True and "starting" in refused.json()["message"]
    head = b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000000000\r\n\r\n"
    assert raw_exchange(url, head).startswith(b"HTTP/1.1 503")  # and it waits for no byte of that body
    statuses: list[int] = []
    while not statuses or statuses[-1] != 200:  # every one of them is answered, also while the servers change
        statuses.append(httpx.get(f"{url}/health", timeout=60).status_code)
        time.sleep(0.01)
    assert set(statuses) <= {200, 503}
    assert read_event(process, "serving")["url"] == url
    assert [httpx.get(url + path, timeout=60).status_code for path in OPEN_PATHS] == [200, 200, 200]
    assert httpx.post(f"{url}/generate", json=LONG, timeout=60).status_code == 401
    headers = {"authorization": "Bearer secret"}
    with httpx.stream("POST", f"{url}/generate", json=LONG, headers=headers, timeout=60) as reply:
        lines = reply.iter_lines()
        assert next(lines).startswith("data: ")
        process.send_signal(signal.SIGTERM)
        events = [line for line in lines if line]
    assert json.loads(events[-2][6:])["meta_info"]["finish_reason"]["type"] == "length"
    assert process.stderr is not None
    rest = process.stderr.read()
    assert process.wait(60) == 0
    assert "did not finish" not in rest and "Traceback" not in rest


def test_a_start_that_fails_ends_with_one_line(tmp_path: Path) -> None:
    shutil.copytree(POLICY, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with serve(tmp_path) as process:
        assert process.stderr is not None
        lines = process.stderr.read().splitlines()
    assert process.returncode == 2
    errors = [line for line in lines if line.startswith("headrace serve: ")]
    assert errors == lines[-1:] and "model.safetensors" in errors[0]
    assert not any("Traceback" in line for line in lines)


def test_keys_come_from_the_environment_and_flags_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, expected in (
        ({}, {"api_key": "one", "admin_api_key": "two"}),
        ({"api_key": "flag"}, {"api_key": "flag", "admin_api_key": "two"}),
        ({"api_key_file": "path"}, {"api_key_file": "path", "admin_api_key": "two"}),
    ):
        monkeypatch.setenv("HEADRACE_API_KEY", "one\n")
        monkeypatch.setenv("HEADRACE_ADMIN_API_KEY", "two")
        assert with_keys(dict(options)) == expected
        assert "HEADRACE_API_KEY" not in os.environ  # the core and the templates' process need not know it
    monkeypatch.setenv("HEADRACE_API_KEY", " ")
    with pytest.raises(ConfigError):
        ServerOptions.from_dict(with_keys({}))


def core_of(process: subprocess.Popen[str]) -> int:
    """The process id of the server's core, once there is one."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for child in children_of(process.pid, word="headrace.core.process"):
            return child
        time.sleep(0.01)
    raise AssertionError("the server has no core")


def wait_until(url: str, status: int, path: str = "/ready") -> None:
    deadline = time.monotonic() + 60
    while (found := httpx.get(url + path, timeout=60).status_code) != status:
        assert time.monotonic() < deadline, f"{path} answers {found}"
        time.sleep(0.02)


def test_a_core_that_is_killed_comes_back_until_the_budget_is_spent() -> None:
    words = ["--log-json", "--max-core-restarts", "1", "--skip-tokenizer-init"]
    short = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 4, "ignore_eos": True, "temperature": 0}}
    with serve(POLICY, *words) as process:
        url = read_event(process, "serving")["url"]
        expected = httpx.post(f"{url}/generate", json=short, timeout=60).json()["output_ids"]
        first = core_of(process)
        with httpx.stream("POST", f"{url}/generate", json=LONG, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            os.kill(first, signal.SIGKILL)
            error = json.loads([line for line in lines if line][-2][6:])["error"]
        assert (error["code"], error["retryable"]) == (503, True)
        assert httpx.get(f"{url}/health", timeout=60).status_code == 200
        wait_until(url, 200)
        assert core_of(process) != first and not Path(f"/proc/{first}").exists()
        assert httpx.post(f"{url}/generate", json=short, timeout=60).json()["output_ids"] == expected
        os.kill(core_of(process), signal.SIGKILL)
        assert process.stderr is not None
        last = process.stderr.read().splitlines()[-1]
        assert process.wait(60) == 3
    assert last.startswith("headrace serve: ") and "signal 9" in last and "max_core_restarts 1" in last


def test_a_restarted_server_with_an_update_needs_weights_and_a_signal_ends_it_even_while_it_starts() -> None:
    with serve(POLICY, "--log-json", "--skip-tokenizer-init") as process:
        url = read_event(process, "serving")["url"]
        body = {"model_path": str(POLICY), "weight_version": "v1"}
        assert httpx.post(f"{url}/update_weights_from_disk", json=body, timeout=60).json()["success"]
        os.kill(core_of(process), signal.SIGKILL)
        wait_until(url, 503)
        assert read_event(process, "the core has been started again")["weights"] == "needs_weights"
        refused = httpx.post(f"{url}/generate", json={"input_ids": [1]}, timeout=60)
        assert (refused.status_code, refused.json()["retryable"]) == (503, True)
        assert "complete update" in refused.json()["message"] and refused.headers["retry-after"]
        assert httpx.get(f"{url}/health", timeout=60).status_code == 200
        assert httpx.get(f"{url}/ready", timeout=60).status_code == 503
        assert httpx.get(f"{url}/weight_version", timeout=60).json()["weight_version"] == ""
        assert httpx.post(f"{url}/update_weights_from_disk", json=body, timeout=60).json()["success"]
        assert httpx.post(f"{url}/generate", json={"input_ids": [1]}, timeout=60).status_code == 200
        core = core_of(process)
        os.kill(core, signal.SIGKILL)
        wait_until(url, 503)
        process.terminate()
        assert process.stderr is not None
        process.stderr.read()
        assert process.wait(60) == 0


@pytest.mark.usefixtures("cold_processes")
def test_a_core_killed_in_the_first_start_ends_the_server() -> None:
    with serve(POLICY) as process:
        os.kill(core_of(process), signal.SIGKILL)
        assert process.stderr is not None
        last = process.stderr.read().splitlines()[-1]
        assert process.wait(60) == 3
    assert last.startswith("headrace serve: ") and "signal 9" in last


def test_control_calls_that_wait_are_answered_when_a_signal_ends_the_server() -> None:
    """A group that nobody makes, one of which a rank does not come, and tensors that no trainer sends."""
    store = kept_store(socket.create_server(("127.0.0.1", 0)), "127.0.0.1", 60.0)
    with serve(POLICY, "--log-json", "--device", "cpu") as process, ThreadPoolExecutor(8) as pool:
        client, trainer = httpx.Client(base_url=read_event(process, "serving")["url"], timeout=60), TrainerProcess()

        def post(path: str, **body: Any) -> Future[httpx.Response]:
            return pool.submit(client.post, path, json=body)

        def init(name: str, port: int, world_size: int = 2) -> Future[httpx.Response]:
            place = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": world_size}
            return post("/init_weights_update_group", group_name=name, backend="gloo", **place)

        made = init("made", port := free_port())
        trainer.ask(do="init", port=port, name="made")
        assert made.result(60).status_code == 200
        tensors = {"names": ["model.norm.weight"], "dtypes": ["float32"], "shapes": [[64]]}
        waiting = [
            init("of nobody", free_port()),
            init("of too few", store.port, 3),
            post("/update_weights_from_distributed", group_name="made", **tensors),
        ]
        time.sleep(1.0)
        assert not any(each.done() for each in waiting)
        process.send_signal(signal.SIGTERM)
        for reply in [each.result(30) for each in waiting]:
            assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
            assert (reply.json()["err_type"], reply.json()["retryable"]) == ("ShutdownError", True)
        assert process.wait(30) == 0
        assert process.stderr is not None and "Traceback" not in process.stderr.read()
        trainer.close()
        client.close()
