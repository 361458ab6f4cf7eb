"""A trainer that knows one address joins all replicas behind it in one process group, and broadcasts to all at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from safetensors import safe_open

from headrace import Engine, serve
from headrace.cluster import groups
from headrace.server import ServerHandle
from headrace.types.carried import CarriedPart
from tests.arch.source import ROOT, child_environment
from tests.cluster.test_weights import RouterThread
from tests.engine.group_trainer import TrainerProcess
from tests.engine.test_restart import pid_of
from tests.free_ports import free_port
from tests.server.builders import SETTINGS, save_random_model
from tests.server.test_carried import frames_of

GROUP = "slime-pp_0"
ASKED = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 3, "ignore_eos": True}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [save_random_model(tmp_path_factory.mktemp("model"), seed) for seed in range(2)]


@pytest.fixture(scope="module")
def trainer() -> Iterator[TrainerProcess]:
    process = TrainerProcess()
    yield process
    process.close()


class Slime:
    """What slime's updater does, to a router."""

    def __init__(self, url: str, trainer: TrainerProcess, folder: Path) -> None:
        self.http = httpx.Client(base_url=url, timeout=60, trust_env=False)
        self.trainer, self.folder = trainer, folder
        self.pool = ThreadPoolExecutor(4)
        with safe_open(folder / "model.safetensors", "pt") as file:
            self.shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        self.names = list(self.shapes)

    def post(self, path: str, **body: Any) -> Future[httpx.Response]:
        return self.pool.submit(self.http.post, path, json=body)

    def init(self, world_size: int = 3, **more: Any) -> httpx.Response:
        port = free_port()
        body = {"master_address": "127.0.0.1", "master_port": str(port), "rank_offset": 1, "world_size": world_size}
        reply = self.post("/init_weights_update_group", **body, group_name=GROUP, backend="gloo", **more)
        self.trainer.ask(do="init", port=port, name=GROUP, world_size=world_size)
        return reply.result(60)

    def announce(self, names: list[str], version: str, **more: Any) -> Future[httpx.Response]:
        shapes = [self.shapes[name] for name in names]
        body = {"names": names, "dtypes": ["float32"] * len(names), "shapes": shapes, "group_name": GROUP}
        return self.post("/update_weights_from_distributed", **{**body, "weight_version": version, **more})

    def bucket(self, names: list[str], version: str, **more: Any) -> httpx.Response:
        reply = self.announce(names, version, **more)
        self.trainer.ask(do="send", name=GROUP, folder=str(self.folder), names=names)
        return reply.result(60)

    def versions(self) -> set[str]:
        """Those that answer now."""
        replies = [self.http.post("/generate", json=ASKED).json() for _ in range(4)]
        return {each["meta_info"]["weight_version"] for each in replies}

    def close(self) -> None:
        self.http.close()
        self.pool.shutdown()


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def digest_of(folder: Path) -> dict[str, str]:
    with Engine(folder, inprocess=True, **SETTINGS) as cold:
        return cold.digest()


class Replicas:
    def __init__(self, folder: Path, num: int, shared: Path | None = None, **settings: Any) -> None:
        """`shared`: a folder by which one takes weights from another."""
        self.folder, self.shared = folder, shared
        self.engines: list[Engine] = []
        self.handles: list[ServerHandle] = []
        for _ in range(num):
            self.start(**settings)
        urls = [each.url for each in self.handles]
        self.router = RouterThread(urls, weights_folder=shared, policy="round_robin")

    def start(self, **settings: Any) -> str:
        roots = () if self.shared is None else (str(self.shared),)
        self.engines.append(Engine(self.folder, **{**SETTINGS, **settings}))
        self.handles.append(serve(self.engines[-1], weight_roots=roots, save_roots=roots))
        return self.handles[-1].url

    def close(self) -> None:
        self.router.close()
        for each in self.handles:
            each.stop()
        for engine in self.engines:
            engine.shutdown()


@pytest.fixture(scope="module")
def replicas(folders: list[Path]) -> Iterator[Replicas]:
    found = Replicas(folders[0], 2, inprocess=True)
    yield found
    found.close()


@pytest.fixture
def slime(replicas: Replicas, trainer: TrainerProcess, folders: list[Path]) -> Iterator[Slime]:
    found = Slime(replicas.router.url, trainer, folders[1])
    yield found
    found.close()


def test_an_update_as_slime_makes_it(slime: Slime, replicas: Replicas, folders: list[Path]) -> None:
    assert slime.http.get("/get_world_size").json()["world_size"] == 2
    small = slime.http.post(
        "/init_weights_update_group",
        json={"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2, "backend": "gloo"},
    )
    assert small.status_code == 409 and small.json()["param"] == "world_size" and small.json()["success"] is False
    joined = slime.init().json()
    assert joined["success"] is True and joined["world_size"] == 2 and joined["message"]
    assert joined["replicas"] == ["replica-0", "replica-1"] and joined["replicas_not_in_group"] == []
    body = {"master_address": "127.0.0.1", "master_port": free_port(), "rank_offset": 1, "world_size": 3}
    again = slime.post("/init_weights_update_group", **body, group_name=GROUP, backend="gloo").result(60)
    assert again.status_code == 409 and "joined; destroy it first" in again.text, "and it is as it was"
    half = len(slime.names) // 2
    for version, in_calls in (("7", False), ("8", True)):
        if in_calls:
            assert slime.http.post("/begin_weight_update", json={}).status_code == 200
        first = slime.bucket(slime.names[:half], version).json()
        assert first["success"] is True and "report" not in first and slime.versions() != {version}
        last = slime.bucket(slime.names[half:], version).json()
        assert in_calls or last["report"]["version"] == version
        if in_calls:
            last = slime.http.post("/end_weight_update", json={}).json()
        assert last["success"] is True and last["failed_replicas"] == []
        assert slime.versions() == {version}
    expected = digest_of(folders[1])
    assert [each.digest() for each in replicas.engines] == [expected] * 2
    refused = slime.bucket(slime.names[:1], "9", shapes=[[1, 1, 1]])
    assert refused.status_code == 400 and refused.json()["success"] is False
    assert slime.init().json()["success"] is True, "one that failed gives way"
    assert slime.bucket(slime.names, "9").json()["report"]["version"] == "9"
    left = slime.http.post("/destroy_weights_update_group", json={"group_name": GROUP})
    assert left.status_code == 200 and left.json()["success"] is True
    again = slime.http.post("/destroy_weights_update_group", json={"group_name": GROUP})
    assert again.status_code == 400 and again.json()["success"] is False


def test_what_one_refuses_ends_the_wait_of_all(slime: Slime, replicas: Replicas) -> None:
    """One is in a group of that name already: the other would wait for it for ever."""
    direct = Slime(replicas.handles[1].url, slime.trainer, slime.folder)
    try:
        assert direct.init(2).status_code == 200
        body = {"master_address": "127.0.0.1", "master_port": free_port(), "rank_offset": 1, "world_size": 3}
        reply = slime.post("/init_weights_update_group", **body, group_name=GROUP, backend="gloo").result(60)
        assert reply.status_code == 409 and reply.json()["success"] is False and "joined" in reply.text
        assert direct.http.post("/destroy_weights_update_group", json={"group_name": GROUP}).status_code == 200
        assert slime.init().status_code == 200
        assert slime.http.post("/destroy_weights_update_group", json={"group_name": GROUP}).status_code == 200
    finally:
        direct.close()


def test_one_that_is_being_joined_is_not_harmed_by_another(slime: Slime) -> None:
    body = {"master_address": "127.0.0.1", "master_port": free_port(), "rank_offset": 1, "world_size": 3}
    body |= {"group_name": GROUP, "backend": "gloo"}
    joining = [slime.post("/init_weights_update_group", **body)]  # whose trainer is late
    other = {**body, "world_size": 2}  # which is too small, should it be the first

    def is_other_refused() -> bool:
        if joining[-1].done():  # the other one was there before it
            assert "being joined" in joining[-1].result().text
            joining.append(slime.post("/init_weights_update_group", **body))
        return "being joined" in slime.post("/init_weights_update_group", **other).result(60).text

    until(is_other_refused)
    first = joining[-1]
    assert not first.done()
    slime.trainer.ask(do="init", port=body["master_port"], name=GROUP, world_size=3)
    assert first.result(60).json()["success"] is True
    assert slime.http.post("/destroy_weights_update_group", json={"group_name": GROUP}).status_code == 200


def test_a_trainer_of_vllms_dialect(replicas: Replicas, folders: list[Path]) -> None:
    command = [sys.executable, "-m", "tests.server.vllm_client", replicas.router.url, "0", str(folders[0])]
    trainer = subprocess.run(
        command, cwd=ROOT, env=child_environment(), input=b"\n" * 4, capture_output=True, timeout=120, check=False
    )
    assert trainer.returncode == 0, trainer.stderr[-3000:].decode()
    expected = digest_of_bfloat16(folders[0])
    assert replicas.engines[0].digest() == replicas.engines[1].digest() == expected


def digest_of_bfloat16(folder: Path) -> dict[str, str]:
    """What is there behind a broadcast of bfloat16 to engines of float32."""
    from safetensors.torch import load_file

    with Engine(folder, inprocess=True, **SETTINGS) as cold:
        tensors = load_file(folder / "model.safetensors")
        cold.update_weights_from_tensor({name: each.bfloat16() for name, each in tensors.items()}, "x")
        return cold.digest()


def check_that_a_stream_says_it(url: str, pid: int) -> None:
    """Kill the process of an engine in the middle of a stream: a router hears that it may go on elsewhere."""
    body = {"prompt": "a", "max_tokens": 900, "stream": True, "ignore_eos": True}
    headers = {"x-headrace-carry": "streams"}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=60) as reply:
        chunks = reply.iter_raw()
        raw = next(chunks)
        os.kill(pid, signal.SIGKILL)
        raw += b"".join(chunks)
    parts = [msgspec.msgpack.decode(each, type=CarriedPart) for each in frames_of(raw)]
    is_lost = [each.is_lost for each in parts]
    assert parts[0].num_pieces and is_lost.index(True) == len(parts) - 2 and b"EngineDeadError" in parts[-2].told


def test_one_that_is_killed_in_an_update(
    trainer: TrainerProcess, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer hears of it, nobody answers with weights that are not whole, and the next group has who is there."""
    monkeypatch.setattr(groups, "GRACE_SECONDS", 0.2)
    found = Replicas(folders[0], 2, tmp_path, inprocess=False)
    slime = Slime(found.router.url, trainer, folders[1])
    try:
        assert slime.init().status_code == 200
        half = len(slime.names) // 2
        assert slime.bucket(slime.names[:half], "7").json()["success"] is True
        check_that_a_stream_says_it(found.handles[1].url, pid_of(found.engines[1]))
        failed = slime.announce(slime.names[half:], "7").result(60)
        assert failed.json()["success"] is False and "replica-1" in failed.text
        assert slime.versions() == {"default"}
        joined = slime.init(2).json()
        assert joined["success"] is True and joined["replicas"] == ["replica-0"]
        assert joined["replicas_not_in_group"] == ["replica-1"]
        updated = slime.bucket(slime.names, "8").json()
        assert updated["report"]["version"] == "8" and updated["replicas_not_in_group"] == ["replica-1"]
        assert slime.versions() == {"8"} and found.engines[0].digest() == digest_of(folders[1])
        late = found.start(inprocess=True)
        assert slime.http.post("/workers", json={"url": late}).status_code == 202
        until(lambda: slime.http.get("/workers").json()["workers"][-1]["is_current"])
        assert found.engines[2].digest() == found.engines[0].digest(), "from its peer"
        updated = slime.bucket(slime.names, "9").json()
        assert updated["replicas_not_in_group"] == ["replica-1", "replica-2"] and slime.versions() == {"9"}
        assert slime.http.post("/destroy_weights_update_group", json={"group_name": GROUP}).status_code == 200
        assert slime.init(3).json()["replicas"] == ["replica-0", "replica-2"]
        assert slime.bucket(slime.names, "10").json()["failed_replicas"] == []
        assert slime.versions() == {"10"} and found.engines[2].version == "10"
    finally:
        slime.close()
        found.close()
