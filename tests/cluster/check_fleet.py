"""`headrace serve --dp-size` with real engines; minutes on a busy machine, so it is not collected by itself:
`pytest tests/cluster/check_fleet.py`. One replica is killed, and replaced by one that has its weights from a peer."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from safetensors.torch import load_file

from headrace import Runtime
from headrace.engine.seeds import sample_seed
from tests.client.test_runtime import wait_gone
from tests.processes import children_of
from tests.server.builders import SETTINGS, save_random_model

SHARED = Path("/dev/shm")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def servers_of(pid: int) -> dict[int, int]:
    """The process of each replica, by its number."""
    found = {}
    for child in children_of(pid, everything_below=True):
        words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
        if b"--log-role" in words:
            found[int(words[words.index(b"--log-role") + 1].split()[-1])] = child
    return found


def test_one_that_is_killed_is_replaced_with_weights_from_a_peer_and_all_end_together(tmp_path: Path) -> None:
    folder, newer = save_random_model(tmp_path / "old"), save_random_model(tmp_path / "new", 1)
    settings: dict[str, Any] = {**SETTINGS, "dp_size": 2, "policy": "round_robin", "seed": 7}
    with Runtime(folder, **settings) as runtime:
        http = httpx.Client(base_url=runtime.url, headers={"authorization": f"Bearer {runtime.api_key}"}, timeout=60)

        def ready() -> dict[str, Any]:
            return http.get("/ready").json()  # type: ignore[no-any-return]

        until(lambda: ready().get("num_ready") == 2)
        seeds = {http.get("/server_info").json()["random_seed"] for _ in range(4)}
        assert seeds == {7, sample_seed(7, 1)}
        first = runtime.digest()
        runtime.update_weights_from_tensor(load_file(newer / "model.safetensors"), "new")
        digest = runtime.digest()
        assert digest != first
        servers = servers_of(runtime.pid)
        os.kill(servers[1], signal.SIGKILL)
        until(lambda: ready().get("num_ready") != 2)
        spans = set()
        while ready().get("num_ready") != 2:  # meanwhile, and later, the old weights answer nothing
            (sample,) = runtime.generate(input_ids=[[1, 2, 3]], sampling_params={"max_new_tokens": 1})
            spans |= {version for version, _ in sample.version_spans}
        assert spans <= {"new"} and runtime.digest() == digest and ready()["weight_version"] == "new"
        again = servers_of(runtime.pid)
        assert again[0] == servers[0] and again[1] != servers[1]
        workers = http.get("/workers").json()["workers"]
        assert [each["id"] for each in workers] == ["replica-0", "replica-1"]
        for worker in workers:
            assert httpx.get(f"{worker['url']}/server_info").status_code == 401  # the key is the front's
        http.close()
        pids = [runtime.pid, *children_of(runtime.pid, everything_below=True)]
        assert len(list(SHARED.glob(f"headrace-weights-{runtime.pid}-*"))) == 1
    wait_gone(pids)
    assert not list(SHARED.glob(f"headrace-weights-{pids[0]}-*"))
