"""Updates in buckets over HTTP, from trainers that are other processes."""

from __future__ import annotations

import base64
import gc
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headrace import Engine
from tests.arch.source import ROOT
from tests.engine.nodes import FIRST, SECRET, node
from tests.free_ports import free_port
from tests.server.bucket_client import bodies
from tests.server.builders import SETTINGS, save_random_model
from tests.server.conftest import START, Served
from tests.weights.foreign_payloads import flattened, local, patched_cuda, serialized

SHARED = Path("/dev/shm")
ROUTE = "/update_weights_from_tensor"


class Client:
    """A trainer's process, and its replies."""

    def __init__(
        self, url: str, style: str, updates: dict[str, Path], stop_before: int = -1, device: str = "cpu"
    ) -> None:
        command = [sys.executable, "-m", "tests.server.bucket_client", url, style, device, str(stop_before)]
        command += [f"{folder}={version}" for version, folder in updates.items()]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def replies(self) -> list[tuple[str, int, Any]]:
        """Those of one update, up to its end or the stop."""
        found = []
        assert self.process.stdout is not None and self.process.stdin is not None
        for line in self.process.stdout:
            path, status, reply = json.loads(line)
            if path in ("stopped", "done"):
                break
            found.append((path, status, reply))
        return found

    def go_on(self) -> None:
        """Begin the next update, or end."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")

    def end(self, *, kill: bool = False) -> None:
        """Wait until nothing is left of it."""
        if kill:
            self.process.kill()
        assert self.process.wait(60) == (-9 if kill else 0)
        assert self.process.stdout is not None and self.process.stdin is not None
        self.process.stdin.close()
        self.process.stdout.close()
        wait_for(lambda: not list(SHARED.glob(f"torch_{self.process.pid}_*")))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [save_random_model(tmp_path_factory.mktemp("cold"), seed) for seed in range(3)]


@pytest.fixture(scope="module")
def digests(folders: list[Path]) -> list[dict[str, str]]:
    found = []
    for folder in folders:
        with Engine(folder, inprocess=True, **SETTINGS) as engine:
            found.append(engine.digest())
    return found


@pytest.fixture(scope="module")
def tensors(folders: list[Path]) -> dict[str, torch.Tensor]:
    return load_file(folders[1] / "model.safetensors")


@pytest.fixture
def launch() -> Iterator[Callable[..., Client]]:
    """Start trainers that end with the test."""
    started: list[Client] = []

    def launch_client(*arguments: Any, **options: Any) -> Client:
        started.append(Client(*arguments, **options))
        return started[-1]

    yield launch_client
    for client in started:
        client.process.kill()
        client.process.wait()


@pytest.fixture(scope="module")
def apart(model_folder: Path) -> Iterator[Served]:
    """A server whose core is a process of its own: tests leave what weights they like."""
    with Engine(model_folder, **SETTINGS) as engine:
        shared = Served(engine)
        yield shared
        shared.close()


@pytest.mark.parametrize("style", ["slime", "verl", "nemo"])
def test_a_trainer_of_another_process_updates_again_and_again(
    apart: Served, launch: Callable[..., Client], folders: list[Path], digests: list[dict[str, str]], style: str
) -> None:
    served = apart
    served.engine.update_weights_from_disk(folders[0], "before")
    steps = dict(zip(("a", "b", "c"), (1, 2, 1), strict=True))
    client = launch(served.url, style, {version: folders[seed] for version, seed in steps.items()})
    for version, seed in steps.items():
        before = served.engine.digest()
        found = client.replies()
        assert [status for _, status, _ in found] == [200] * len(found)
        assert found[-1][0] == "/continue_generation"
        replies = [reply for path, _, reply in found if path == ROUTE]
        assert all(reply["success"] is True and isinstance(reply["message"], str) for reply in replies)
        reports = [reply["report"] for reply in replies if "report" in reply]
        assert [report["num_tensors"] for report in reports] == [len(digests[0])]
        assert style == "nemo" or served.engine.digest() == digests[seed]  # which rounds
        assert served.engine.digest() != before
        label = "before" if style == "verl" else version
        info = served.generate(input_ids=[1, 2], sampling_params={"max_new_tokens": 3})["meta_info"]
        assert info["weight_version"] == label and served.http.get("/model_info").json()["weight_version"] == label
        client.go_on()
    client.end()


def test_generation_does_not_continue_before_the_last_bucket_and_a_killed_trainer_leaves_nothing(
    apart: Served, launch: Callable[..., Client], folders: list[Path], digests: list[dict[str, str]]
) -> None:
    served, version_before = apart, apart.engine.version
    client = launch(served.url, "slime", {"half": folders[1]}, stop_before=2)
    found = client.replies()
    assert found[-1][:2] == ("/continue_generation", 409) and "not staged yet: " in found[-1][2]["message"]
    assert served.engine.status().paused == "abort" and served.engine.version == version_before
    client.end(kill=True)
    again = launch(served.url, "slime", {"whole": folders[2]})
    replies = again.replies()
    assert [status for _, status, _ in replies] == [200] * len(replies)
    assert served.engine.digest() == digests[2]
    assert (served.engine.version, served.engine.status().paused) == ("whole", "")
    again.go_on()
    again.end()
    names = [path.name for path in SHARED.glob("*headrace*")]
    assert not [name for name in names if not name.startswith("headrace-weights-")], "those are a router's"


def encoded(data: bytes) -> list[str]:
    return [base64.b64encode(data).decode()]


def test_what_is_wrong_with_a_bucket_is_named_and_ends_the_update(
    start: START, tensors: dict[str, torch.Tensor], digests: list[dict[str, str]]
) -> None:
    served = start()
    (name, tensor), other = list(tensors.items())[:2]
    fine = {"serialized_named_tensors": encoded(serialized([(name, tensor)]))}
    bucket = encoded(flattened({name: tensor}))
    wrong: list[tuple[dict[str, Any], str, str]] = [
        ({}, "body", "serialized_named_tensors"),
        ({"serialized_named_tensors": "x"}, "serialized_named_tensors", ""),
        ({"serialized_named_tensors": []}, "serialized_named_tensors", "0 entries"),
        ({"serialized_named_tensors": bucket * 2}, "serialized_named_tensors", "2 entries"),
        ({"serialized_named_tensors": ["%%"]}, "serialized_named_tensors", "not base64"),
        ({"serialized_named_tensors": encoded(b"cos\nsystem\n.")}, "serialized_named_tensors", "not understood"),
        ({"serialized_named_tensors": encoded(patched_cuda(tensor))}, "serialized_named_tensors", "on a CPU"),
        ({"serialized_named_tensors": bucket}, "load_format", "named tensors"),
        (fine | {"load_format": "flattened_bucket"}, "load_format", "a flattened bucket"),
        (fine | {"load_format": "direct"}, "load_format", "'direct' is not supported"),
        (fine | {"load_format": "my.loader"}, "load_format", "not supported"),
        (fine | {"mode": "magic"}, "mode", ""),
        (fine | {"selector": "draft"}, "selector", "no draft model"),
        (fine | {"weight_version": ""}, "weight_version", ""),
        (fine | {"timeout_s": -1}, "timeout_s", ""),
        (
            {"serialized_named_tensors": encoded(serialized([("nobody", tensor)]))},
            "nobody",
            "not a tensor of this model",
        ),
        ({"serialized_named_tensors": encoded(serialized([(name, tensor[:1])]))}, name, "has shape"),
        ({"serialized_named_tensors": encoded(serialized([(name, tensor.double())]))}, name, "has dtype"),
        ({"serialized_named_tensors": encoded(serialized([(name, tensor * torch.nan)]))}, name, "NaN"),
    ]
    for body, field, words in wrong:
        begun = {"serialized_named_tensors": encoded(serialized([other]))}
        assert served.http.post(ROUTE, json=begun).json()["success"] and served.engine.status().updating
        reply = served.http.post(ROUTE, json=body)
        assert reply.status_code == 400, (body.keys(), reply.text)
        assert reply.json()["param"] == field and words in reply.json()["message"], (words, reply.text)
        assert not served.engine.status().updating
    taken = {"serialized_named_tensors": encoded(flattened({name: tensor})), "load_format": "flattened_bucket"}
    found = served.http.post(ROUTE, json=taken).json()
    assert found == {"success": True, "message": "Bucket taken; weights change with the one that completes them."}
    assert served.engine.status().updating
    with socket.create_connection(("127.0.0.1", served.handle.port)) as client:  # and goes away in the middle of a body
        client.sendall(f"POST {ROUTE} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 9\r\n".encode())
        client.sendall(b"content-type: application/json\r\n\r\n{")
    wait_for(lambda: not served.engine.status().updating)
    for body in bodies("verl", tensors, ""):
        served.http.post(ROUTE, json=body).raise_for_status()
    assert served.engine.digest() == digests[1]


@pytest.fixture
def other_node(request: pytest.FixtureRequest, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the nodes meet; "" where there is one only."""
    if not request.param:
        yield ""
        return
    monkeypatch.setenv("HEADRACE_DIST_SECRET", SECRET)
    address = f"{FIRST}:{free_port()}"
    with node(model_folder, address):
        yield address


@pytest.mark.parametrize("other_node", [False, True], ids=["one node", "two nodes"], indirect=True)
@pytest.mark.parametrize("style", ["sglang", "verl"])
def test_an_engine_of_two_ranks_has_a_payload_for_each(
    start: START, folders: list[Path], digests: list[dict[str, str]], style: str, other_node: str
) -> None:
    """One entry for each rank; of each tensor verl has bytes for each rank in all of them. All are given back."""
    nodes = {"nnodes": 2, "dist_init_addr": other_node} if other_node else {}
    served = start(settings={"tp_size": 2, "device": "cpu", **nodes})
    before = set(SHARED.glob(f"torch_{os.getpid()}_*"))  # of tensors that other tests share
    for seed in (1, 2):
        tensors = load_file(folders[seed] / "model.safetensors")
        if style == "sglang":
            payloads = [base64.b64encode(flattened(tensors)).decode() for _ in range(2)]
        else:
            values: dict[str, list[bytes | None]]
            values = {name: [serialized(tensor.clone()) for _ in range(2)] for name, tensor in tensors.items()}
            payloads = [base64.b64encode(local(values)).decode()] * 2
        load_format = "flattened_bucket" if style == "sglang" else None
        body = {"serialized_named_tensors": payloads[:1], "load_format": load_format, "weight_version": f"v{seed}"}
        reply = served.http.post(ROUTE, json=body)
        assert reply.status_code == 400 and "tp_size 2" in reply.json()["message"]
        reply = served.http.post(ROUTE, json=body | {"serialized_named_tensors": payloads})
        assert reply.status_code == 200 and reply.json()["report"]["num_tensors"] == len(tensors), reply.text
        assert served.engine.digest() == digests[seed]
        tensors.clear()
        gc.collect()
        assert set(SHARED.glob(f"torch_{os.getpid()}_*")) <= before


def test_memory_is_given_back_that_nothing_comes_of(start: START, tensors: dict[str, torch.Tensor]) -> None:
    """Of refused buckets, and of one without tensors: their sender counts on it."""
    served = start()
    name, tensor = next(iter(tensors.items()))

    def shared() -> int:
        gc.collect()
        return len(list(SHARED.glob(f"torch_{os.getpid()}_*")))

    before = shared()
    for made, load_format in (
        (lambda: serialized([("nobody", tensor.clone())]), None),
        (lambda: serialized([(name, tensor[:1].clone())]), None),
        (lambda: serialized([(name, tensor.clone())]), "flattened_bucket"),
        (lambda: flattened({}), "flattened_bucket"),
        (lambda: flattened({"model.rotary_emb.inv_freq": tensor}), "flattened_bucket"),
    ):
        body = {"serialized_named_tensors": encoded(made()), "load_format": load_format}
        assert served.http.post(ROUTE, json=body).status_code in (200, 400)
        assert shared() == before


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("style", ["slime", "verl"])
def test_half_an_update_of_a_trainer_that_died_is_not_completed_by_the_next(
    apart: Served,
    launch: Callable[..., Client],
    folders: list[Path],
    digests: list[dict[str, str]],
    style: str,
    order: int,
) -> None:
    """Whatever that sends first, with the label of the first or none."""
    served = apart
    client = launch(served.url, style, {"7": folders[1]}, stop_before=2)
    assert client.replies()[-1][:2] == ("/continue_generation", 409)
    client.end(kill=True)
    parts = [body for body in bodies(style, load_file(folders[2] / "model.safetensors"), "7")]
    parts = [part for part in parts if style == "verl" or part is not parts[-1]][::order]
    replies = [served.http.post(ROUTE, json=body).json() for body in parts]
    assert ["report" in reply for reply in replies] == [False] * (len(parts) - 1) + [True], replies
    assert served.engine.digest() == digests[2]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/release_memory_occupation", {}),
        ("/update_weights_from_disk", {"model_path": "model"}),
        ("/update_weights", {"weight_dir": "model"}),
        ("/sleep", {"level": 2}),
    ],
)
def test_half_an_update_makes_way(
    start: START, tensors: dict[str, torch.Tensor], model_folder: Path, path: str, body: dict[str, Any]
) -> None:
    served = start()
    served.http.post(ROUTE, json=next(bodies("slime", tensors, "1"))).raise_for_status()
    assert served.http.post("/continue_generation", json={}).status_code == 409, "its sender takes it for done"
    filled = {name: str(model_folder) if value == "model" else value for name, value in body.items()}
    assert served.http.post(path, json=filled).status_code == 200
    assert not served.engine.status().updating
    assert served.http.post("/continue_generation", json={}).status_code == 200


def test_a_session_of_another_kind_is_a_conflict(start: START, tensors: dict[str, torch.Tensor]) -> None:
    served = start()
    rest = list(bodies("slime", tensors, "1"))
    name, tensor = next(iter(tensors.items()))
    session = served.engine.begin_update("x", [(name, tuple(tensor.shape), "float32")], partial=True)
    reply = served.http.post(ROUTE, json=rest[0])
    assert reply.status_code == 409 and reply.json()["success"] is False
    served.engine.abort_update(session)
    served.http.post("/continue_generation", json={}).raise_for_status()


def test_views_and_other_strides_arrive_as_they_are(
    start: START, tensors: dict[str, torch.Tensor], digests: list[dict[str, str]]
) -> None:
    served = start()
    sent = {}
    for name, tensor in tensors.items():
        turned = tensor.t().contiguous().t() if tensor.dim() == 2 else torch.stack([tensor, tensor], 1)[:, 1]
        sent[name] = turned
    sent["model.rotary_emb.inv_freq"] = torch.zeros(4)
    (body,) = [{"serialized_named_tensors": encoded(serialized(list(sent.items()))), "weight_version": 3}]
    assert served.http.post(ROUTE, json=body).json()["report"]["version"] == "3"
    assert served.engine.digest() == digests[1]


def test_requests_are_aborted_or_kept_as_asked(start: START, tensors: dict[str, torch.Tensor]) -> None:
    for flag, finish in ((True, "abort"), (False, "length")):
        served = start()
        params = {"max_new_tokens": 200, "ignore_eos": True}
        *first, last = list(bodies("verl", tensors, ""))
        for body in first:
            served.http.post(ROUTE, json=body | {"abort_all_requests": flag}).raise_for_status()
        thread_reply: list[Any] = []

        def generate(served: Served = served, found: list[Any] = thread_reply, params: Any = params) -> None:
            found.append(served.generate(input_ids=[1], sampling_params=params))

        thread = threading.Thread(target=generate)
        thread.start()
        wait_for(lambda served=served: served.engine.metrics()["num_running"] > 0)  # type: ignore[misc]
        served.http.post(ROUTE, json=last | {"abort_all_requests": flag}).raise_for_status()
        thread.join(60)
        assert thread_reply[0]["meta_info"]["finish_reason"]["type"] == finish


@pytest.mark.parametrize("path", [ROUTE, "/update_weights_from_distributed"])
@pytest.mark.parametrize("is_announced", [True, False])
def test_a_bucket_over_the_limit_ends_the_update(
    start: START, tensors: dict[str, torch.Tensor], path: str, is_announced: bool
) -> None:
    served = start(max_body_bytes=1 << 20, api_key="key")
    key = {"authorization": "Bearer key", "content-type": "application/json"}
    first = next(bodies("verl", tensors, ""))

    def send_huge(headers: dict[str, str]) -> tuple[int, bool]:
        body = b"x" * (1 << 21) if is_announced else iter([b"x" * (1 << 20)] * 2)
        return served.http.post(path, content=body, headers=headers).status_code, served.engine.status().updating

    assert served.http.post(ROUTE, json=first, headers=key).status_code == 200
    assert send_huge({"content-type": "application/json"}) == (401, True), "of a stranger"
    assert send_huge(key) == (413, False)


def test_the_calls_of_newer_releases_around_an_update(
    start: START, tensors: dict[str, torch.Tensor], digests: list[dict[str, str]]
) -> None:
    served = start()

    def call(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        reply = served.http.post(path, json=body)
        return reply.status_code, reply.json()

    assert call("/begin_weight_update", {"selector": "draft"})[0] == 400
    first, *rest = bodies("verl", tensors, "")
    assert call(ROUTE, first)[0] == 200  # of a trainer that is gone
    assert call("/begin_weight_update", {"selector": "target"}) == (
        200,
        {"success": True, "message": "An update may begin."},
    )
    assert not served.engine.status().updating
    for body in rest:
        assert call(ROUTE, body)[0] == 200
    status, reply = call("/end_weight_update", {})
    assert status == 400 and reply["success"] is False and reply["param"] in tensors
    assert not served.engine.status().updating
    assert call("/end_weight_update", {}) == (status, reply)
    relabelling = call("/update_weight_version", {"new_version": "7"})
    assert relabelling == (status, {**reply, "new_version": "7"}) and served.engine.version == "default"
    assert call("/begin_weight_update", {})[0] == 200
    for body in bodies("slime", tensors, "7"):
        assert call(ROUTE, body)[0] == 200
    for _ in range(2):
        assert call("/end_weight_update", {}) == (200, {"success": True, "message": "The update is complete."})
    assert served.engine.digest() == digests[1] and served.engine.version == "7"
