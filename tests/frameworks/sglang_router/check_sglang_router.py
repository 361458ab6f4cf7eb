"""sglang-router in front of two servers: what its users ask through it, a replica that dies, and slime's calls."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from headrace import Runtime
from tests.free_ports import free_port
from tests.server.builders import SETTINGS, save_random_model

pytestmark = pytest.mark.timeout(600)
WAIT_SECONDS = 120.0
SLIME = json.loads((Path(__file__).parents[2] / "server" / "framework_bodies.json").read_text())["slime"]
BODY = {"sampling_params": {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}, "return_logprob": True}


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Runtime]]:
    folder = save_random_model(tmp_path_factory.mktemp("model"))
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Runtime(folder, api_key=None, **SETTINGS)) for _ in range(2)]


@pytest.fixture(scope="module")
def router(replicas: list[Runtime]) -> Iterator[httpx.Client]:
    """A router of no replicas yet: they are added as slime adds them."""
    port = free_port()
    words = ["--host", "127.0.0.1", "--port", str(port), "--policy", "round_robin", "--log-level", "warn"]
    words += ["--prometheus-port", str(free_port()), "--health-check-interval-secs", "2"]
    command = [sys.executable, "-m", "sglang_router.launch_router", *words]
    process = subprocess.Popen(command, start_new_session=True)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        until(lambda: _is_up(http))
        for each in replicas:
            answer = http.post("/workers", json={"url": each.url, "worker_type": "regular"})
            assert answer.status_code in (200, 202), answer.text
        until(lambda: len(workers(http)) == 2 and all(each["is_healthy"] for each in workers(http)))
        yield http
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(30)


def _is_up(http: httpx.Client) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return http.get("/liveness").status_code == 200
    return False


def workers(http: httpx.Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = http.get("/workers").json()["workers"]
    return found


def num_served(replicas: list[Runtime]) -> list[float]:
    return [each.metrics()["num_requests"] for each in replicas]


def test_answers_are_those_of_a_replica(router: httpx.Client, replicas: list[Runtime]) -> None:
    direct = httpx.post(f"{replicas[0].url}/generate", json={**BODY, "input_ids": [1, 2, 3]}, timeout=60).json()
    through = [router.post("/generate", json={**BODY, "input_ids": [1, 2, 3]}).json() for _ in range(4)]
    assert [each["output_ids"] for each in through] == [direct["output_ids"]] * 4
    assert through[0]["meta_info"]["output_token_logprobs"] == direct["meta_info"]["output_token_logprobs"]
    assert through[0]["meta_info"]["weight_versions"] == [{"version": "default", "start": 0, "end": 6}]
    batch = router.post("/generate", json={**BODY, "input_ids": [[1], [2]]}).json()
    assert len(batch) == 2
    chat = {"model": "default", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    reply = router.post("/v1/chat/completions", json=chat)
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["completion_tokens"] <= 4
    with router.stream("POST", "/generate", json={**BODY, "input_ids": [1, 2, 3], "stream": True}) as reply:
        lines = [line for line in reply.iter_lines() if line.startswith("data: ")]
    assert json.loads(lines[-2][6:])["output_ids"] == direct["output_ids"] and lines[-1] == "data: [DONE]"


def test_slime_generates_and_aborts_through_it(router: httpx.Client) -> None:
    reply = router.post("/generate", json=SLIME["generate"], headers={"X-SMG-Routing-Key": "sample-7"})
    assert len(reply.json()["meta_info"]["output_token_logprobs"]) <= 8
    for each in workers(router):
        httpx.post(f"{each['url']}/abort_request", json={"abort_all": True}).raise_for_status()
        loads = httpx.get(f"{each['url']}/v1/loads", params={"include": "core"}).json()["loads"]
        assert sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads) == 0


def test_a_replica_that_dies_costs_no_request(router: httpx.Client, replicas: list[Runtime]) -> None:
    os.kill(replicas[1].pid, signal.SIGKILL)
    answers = [router.post("/generate", json={**BODY, "input_ids": [1, 2, number]}) for number in range(12)]
    assert [answer.status_code for answer in answers] == [200] * 12
    until(lambda: sum(each["is_healthy"] for each in workers(router)) == 1)
    dead = next(each for each in workers(router) if not each["is_healthy"])
    assert router.delete(f"/workers/{dead['id']}").status_code in (200, 202)
    until(lambda: len(workers(router)) == 1)
