"""vLLM's routes for trainers: whole updates by a client in a process of its own, and each route by hand."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

from headrace import Engine
from tests.arch.source import ROOT
from tests.server.builders import SETTINGS, save_random_model
from tests.server.conftest import START, Served

INIT, START_UPDATE, UPDATE, FINISH = (
    *("/init_weight_transfer_engine", "/start_weight_update"),
    *("/update_weights", "/finish_weight_update"),
)
LONG: dict[str, Any] = {"max_new_tokens": 600, "ignore_eos": True}


@pytest.fixture(scope="module")
def new_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("new"), seed=1)


class Trainer:
    """A client's process, and the replies that it got."""

    def __init__(self, url: str, packed_bytes: int, *folders: Path) -> None:
        command = [sys.executable, "-m", "tests.server.vllm_client", url, str(packed_bytes), *map(str, folders)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def replies(self) -> list[tuple[str, int, Any]]:
        """Those up to the end of an update."""
        found: list[tuple[str, int, Any]] = []
        assert self.process.stdout is not None
        while (line := self.process.stdout.readline()) and (reply := json.loads(line))[0] != "done":
            found.append(tuple(reply))
        return found

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def trainers() -> Iterator[list[Trainer]]:
    made: list[Trainer] = []
    yield made
    for each in made:
        each.close()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    with Engine(folder, inprocess=True, **{**SETTINGS, "dtype": "bfloat16"}) as engine:
        names = load_file(folder / "model.safetensors")
        return {name: engine.get_weights_by_name(name).float() for name in names}


def check_live(served: Served, folder: Path) -> None:
    for name, tensor in weights_of(folder).items():
        assert torch.equal(served.engine.get_weights_by_name(name), tensor), name


@pytest.mark.parametrize(("packed_bytes", "tp_size"), [(0, 1), (1 << 30, 1), (4000, 1), (1, 1), (4000, 2)])
def test_updates_as_trl_makes_them(
    start: START, model_folder: Path, new_folder: Path, trainers: list[Trainer], packed_bytes: int, tp_size: int
) -> None:
    """One tensor a broadcast; packed as said at init; in buffers that several tensors fill, or each; to two ranks."""
    served = start(settings={"tp_size": tp_size, "inprocess": tp_size == 1})
    trainers.append(Trainer(served.url, packed_bytes, new_folder, model_folder))
    epoch = served.engine.status().epoch
    for number, folder in enumerate((new_folder, model_folder)):
        replies = trainers[0].replies()
        assert [status for _, status, _ in replies] == [200] * len(replies)
        last = [path for path, _, _ in replies][-6:]
        assert last == [START_UPDATE, UPDATE, UPDATE, UPDATE, FINISH, "/reset_prefix_cache"]
        assert "report" in replies[-2][2] and replies[-1][2] == {"success": True}
        assert not any("report" in reply[2] for reply in replies[-6:-2]), "live when it is finished"
        assert served.engine.status().epoch == epoch + 1 + number
        check_live(served, folder)
        trainers[0].go_on()
    assert trainers[0].process.wait(60) == 0
    served.generate(input_ids=[1, 2, 3], sampling_params={"max_new_tokens": 2})


def test_a_trainer_that_begins_anew_takes_the_place_of_the_one_before(
    start: START, new_folder: Path, trainers: list[Trainer]
) -> None:
    served = start()
    for _ in range(2):
        trainers.append(Trainer(served.url, 0, new_folder))
        assert trainers[-1].replies()[-2][0] == FINISH
        trainers[-1].process.kill()
    check_live(served, new_folder)


class Broadcaster:
    """A trainer in this process, whose steps a test decides."""

    def __init__(self, served: Served, folder: Path, **info: Any) -> None:
        from tests.free_ports import free_port
        from tests.server.vllm_client import stateless_group

        self.served = served
        self.tensors = load_file(folder / "model.safetensors")
        self.names = list(self.tensors)
        port = free_port()
        place = {"master_address": "127.0.0.1", "master_port": str(port), "rank_offset": "1", "world_size": 2}
        joining = self.ask(INIT, {"init_info": {**place, **info}})
        self.group = stateless_group(port, 2)
        assert joining() == (200, {"message": "Weight transfer initialized"})

    def ask(self, path: str, body: dict[str, Any]) -> Callable[[], tuple[int, Any]]:
        """Ask in the background; the result waits for the answer."""
        found: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: found.append(self.served.http.post(path, json=body)))
        thread.start()

        def answer() -> tuple[int, Any]:
            thread.join(60)
            return found[0].status_code, found[0].json()

        return answer

    def send(self, names: list[str], **wrong: Any) -> tuple[int, Any]:
        """A call that announces these tensors, and their broadcasts."""
        from tests.server.vllm_client import broadcast_root

        info = {
            "names": names,
            "dtype_names": ["float32"] * len(names),
            "shapes": [list(self.tensors[name].shape) for name in names],
        }
        asked = self.ask(UPDATE, {"update_info": {**info, **wrong}})
        for name in names:
            self.group.broadcast([self.tensors[name]], broadcast_root()).wait()
        return asked()


def told(answer: tuple[int, Any]) -> tuple[int, str]:
    return answer[0], answer[1]["error"]["param"] or ""


def post(served: Served, path: str, body: Any = None, **query: Any) -> tuple[int, Any]:
    reply = served.http.post(path, params=query) if body is None else served.http.post(path, json=body, params=query)
    return reply.status_code, reply.json() if reply.content else None


def test_a_label_comes_with_the_end_and_an_end_may_be_repeated(start: START, new_folder: Path) -> None:
    served = start()
    trainer = Broadcaster(served, new_folder)
    assert post(served, START_UPDATE)[0] == 200, "without a body"
    status, reply = trainer.send(trainer.names)
    assert status == 200 and "report" not in reply and served.engine.version == "default"
    status, reply = post(served, FINISH, {"weight_version": 7})
    assert status == 200 and reply["report"]["version"] == "7"
    epoch = served.engine.status().epoch
    assert post(served, FINISH, {"weight_version": "7"}) == post(served, FINISH) == (200, reply)
    assert told(post(served, FINISH, {"weight_version": "8"})) == (409, "weight_version")
    assert (served.engine.version, served.engine.status().epoch) == ("7", epoch)
    assert served.http.get("/weight_info").json() == {"weight_version": "7"}


def test_an_end_that_has_failed_fails_again_and_labels_nothing(start: START, new_folder: Path) -> None:
    """In both dialects, which finish the same update, and whether or not it was begun by name."""
    served = start()
    before, relabel = served.engine.digest(), {"new_version": "7", "abort_all_requests": False}
    trainer = Broadcaster(served, new_folder)
    turned = [list(trainer.tensors[name].shape)[::-1] for name in trainer.names[2:4]]
    cases: list[tuple[bool, list[str], dict[str, Any], tuple[int, str]]] = [
        (True, trainer.names[:-1], {}, (400, trainer.names[-1])),
        (False, trainer.names[:-1], {}, (400, trainer.names[-1])),
        (False, trainer.names[2:4], {"shapes": turned}, (409, "session_id")),
    ]
    for begins, names, wrong, expected in cases:
        if begins:
            post(served, START_UPDATE)
        assert trainer.send(names, **wrong)[0] == (400 if wrong else 200)
        first = post(served, FINISH, {"weight_version": "7"})
        assert told(first) == expected
        assert post(served, FINISH, {"weight_version": "7"}) == post(served, FINISH) == first
        for path, body in (("/end_weight_update", {}), ("/update_weight_version", relabel)):
            for _ in range(2):
                status, reply = post(served, path, body)
                assert (status, reply["param"], reply["success"]) == (*expected, False)
        assert (served.engine.version, served.engine.digest()) == ("default", before)
    assert "report" in trainer.send(trainer.names)[1]
    assert post(served, "/update_weight_version", relabel)[0] == 200
    assert post(served, FINISH, {"weight_version": "8"})[0] == 200 and served.engine.version == "8"


def test_an_end_whose_client_went_away_fails_for_its_retry(start: START, new_folder: Path) -> None:
    served = start()
    trainer = Broadcaster(served, new_folder)
    post(served, START_UPDATE)
    assert trainer.send(trainer.names)[0] == 200

    async def hang(*_: Any) -> None:
        await asyncio.sleep(60)

    updater = served.engine.asynchronous.runtime.updater
    commit, updater.commit = updater.commit, hang  # type: ignore[method-assign, assignment]
    with pytest.raises(httpx.ReadTimeout):
        served.http.post(FINISH, json={"weight_version": "7"}, timeout=0.3)
    updater.commit = commit  # type: ignore[method-assign]
    first = post(served, FINISH, {"weight_version": "7"})
    assert told(first) == (409, "session_id") and post(served, FINISH, {"weight_version": "7"}) == first
    assert served.engine.version == "default"


def test_an_older_client_sends_no_begin_and_no_end(start: START, new_folder: Path) -> None:
    served = start()
    trainer = Broadcaster(served, new_folder)
    half = len(trainer.names) // 2
    assert "report" not in trainer.send(trainer.names[:half])[1]
    assert "report" in trainer.send(trainer.names[half:])[1]
    assert post(served, FINISH)[0] == 200
    for name in trainer.names:
        assert torch.equal(served.engine.get_weights_by_name(name), trainer.tensors[name])


def test_half_an_update_is_not_completed_by_a_trainer_that_begins_anew(
    start: START, model_folder: Path, new_folder: Path
) -> None:
    """Though it sends the other half first, and says no begin and no end."""
    served = start()
    first = Broadcaster(served, model_folder)
    half = len(first.names) // 2
    assert first.send(first.names[:half])[0] == 200
    second = Broadcaster(served, new_folder)
    assert not served.engine.status().updating
    status, reply = second.send(second.names[half:])
    assert status == 200 and "report" not in reply, "it lacks what the first has brought"
    assert "report" in second.send(second.names[:half])[1]
    for name in second.names:
        assert torch.equal(served.engine.get_weights_by_name(name), second.tensors[name])


def test_a_trainer_puts_an_engine_to_sleep_in_which_the_one_before_left_half_an_update(
    start: START, new_folder: Path
) -> None:
    served = start(weight_roots=[str(new_folder)])
    for path, query in (("/sleep", {"level": 2}), (UPDATE, {})):
        assert post(served, "/wake_up") == (200, None)
        post(served, START_UPDATE, {})
        trainer = Broadcaster(served, new_folder)
        assert trainer.send(trainer.names[:3])[0] == 200 and served.engine.status().updating
        assert post(served, path, {"weight_dir": str(new_folder)} if path == UPDATE else None, **query)[0] == 200
        assert not served.engine.status().updating
        assert told(post(served, FINISH)) == (409, "session_id"), "of the first, which is told"


def test_no_names_are_no_requests(start: START) -> None:
    served = start()
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(served.generate(input_ids=[1], sampling_params=LONG)))
    thread.start()
    while not served.engine.metrics()["num_running"]:
        pass
    assert post(served, "/abort_requests", {"request_ids": []}) == (200, {"status": "aborted", "aborted": 0})
    assert post(served, "/abort_requests", {"request_ids": ["nobody's"]})[1]["aborted"] == 0
    assert post(served, "/abort_requests") == (200, {"status": "aborted", "aborted": 1})
    thread.join(60)
    assert found[0]["meta_info"]["finish_reason"]["type"] == "abort"


def test_an_update_that_is_wrong_is_over_and_the_next_one_lands(start: START, new_folder: Path) -> None:
    served = start()
    before = served.engine.digest()
    trainer = Broadcaster(served, new_folder)
    names = trainer.names
    post(served, START_UPDATE, {})
    assert trainer.send(names[:2])[0] == 200
    turned = [list(trainer.tensors[name].shape)[::-1] for name in names[2:4]]
    assert trainer.send(names[2:4], shapes=turned)[0] == 400
    assert not served.engine.status().updating
    assert told(post(served, FINISH)) == (409, "session_id")
    post(served, START_UPDATE, {})
    assert trainer.send(names[:-1])[0] == 200
    assert told(post(served, FINISH)) == (400, names[-1]), "what is missing is named"
    assert served.engine.digest() == before and not served.engine.status().updating
    post(served, START_UPDATE, {})
    assert trainer.send(names[:3])[0] == 200, "given up for"
    post(served, START_UPDATE, {})
    assert trainer.send(names)[0] == 200
    assert post(served, FINISH)[0] == 200
    assert served.engine.digest() != before


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "update_info"),
        ({"update_info": {"names": ["a"], "dtype_names": ["float32"]}}, "update_info.shapes"),
        ({"update_info": {"names": ["a"], "dtype_names": ["float9"], "shapes": [[1]]}}, "update_info.dtype_names"),
        ({"update_info": {"names": 5, "dtype_names": [], "shapes": []}}, "update_info.names"),
        (
            {"update_info": {"names": [], "packed": True, "packed_buffer_size_bytes": -5}},
            "update_info.packed_buffer_size_bytes",
        ),
        ({"update_info": {"ipc_handles_pickled": "x"}}, "update_info.ipc_handles_pickled"),
        ({"update_info": [1]}, "update_info"),
        ({"weight_dir": None}, "update_info"),
        ({"update_info": {"names": []}, "mode": "sideways"}, "mode"),
        ({"update_info": {"names": []}, "timeout_s": -1}, "timeout_s"),
    ],
)
def test_what_is_wrong_with_an_update_is_named(start: START, new_folder: Path, body: Any, field: str) -> None:
    served = start()
    trainer = Broadcaster(served, new_folder)
    trainer.send(trainer.names[:1])
    assert served.engine.status().updating
    assert told(post(served, UPDATE, body)) == (400, field)
    assert not served.engine.status().updating


def test_nothing_is_taken_from_a_trainer_that_has_not_joined(served: Served) -> None:
    info = {"names": ["a"], "dtype_names": ["float32"], "shapes": [[1]]}
    assert told(post(served, UPDATE, {"update_info": info})) == (409, "init_info")
    assert told(post(served, "/start_draft_weight_update", {})) == (400, "selector")
    assert told(post(served, START_UPDATE, {"is_checkpoint_format": False})) == (400, "is_checkpoint_format")


def test_a_folder_as_prime_rl_names_it(start: START, new_folder: Path) -> None:
    served = start(weight_roots=[str(new_folder)])
    assert told(post(served, UPDATE, {"weight_dir": "/etc"})) == (400, "weight_dir")
    assert post(served, "/pause", mode="keep", clear_cache="false") == (200, {"status": "paused"})
    assert post(served, UPDATE, {"weight_dir": str(new_folder)})[0] == 200
    assert post(served, "/resume", {}) == (200, {"status": "resumed"})
    for name, tensor in load_file(new_folder / "model.safetensors").items():
        assert torch.equal(served.engine.get_weights_by_name(name), tensor)
    assert served.http.get("/liveness").status_code == 200


@pytest.mark.parametrize(
    ("info", "field"),
    [
        ({}, "init_info.master_address"),
        ({"master_address": "127.0.0.1"}, "init_info.master_port"),
        ({"master_address": "127.0.0.1", "master_port": "x"}, "init_info.master_port"),
        ({"master_address": "127.0.0.1", "master_port": 1, "world_size": 1}, "init_info.world_size"),
        ({"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 0}, "init_info.rank_offset"),
        ({"master_address": "127.0.0.1", "master_port": 1, "backend": "mpi"}, "init_info.backend"),
        ({"master_address": "127.0.0.1", "packed_buffer_size_bytes": -1}, "init_info.packed_buffer_size_bytes"),
        ({"nccl_unique_id_b64": "AAAA"}, "init_info.nccl_unique_id_b64"),
        ({"nccl_unique_id_b64": base64.b64encode(bytes(128)).decode()}, "init_info.nccl_unique_id_b64"),
    ],
)
def test_what_is_wrong_with_an_init_is_named(served: Served, info: Any, field: str) -> None:
    assert told(post(served, INIT, {"init_info": info})) == (400, field)


def test_nobody_to_join_has_a_deadline(served: Served) -> None:
    info = {"master_address": "127.0.0.1", "master_port": 1}
    status, reply = post(served, INIT, {"init_info": info, "timeout_s": 0.5})
    assert status == 504 and "vllm_weight_transfer" in reply["message"]
    for body in ({}, {"init_info": None}, {"init_info": 5}):
        status, reply = post(served, INIT, body)
        assert status == 400 and "init_info" in reply["message"]


def publish_id(message: bytes) -> tuple[Any, int]:
    """A trainer's store with this message, and its port."""
    from datetime import timedelta

    from torch._C._distributed_c10d import TCPStore

    store = TCPStore("127.0.0.1", 0, 2, True, timedelta(seconds=30), wait_for_workers=False, use_libuv=False)
    store.set("broadcast_from/0/0", message)  # type: ignore[arg-type]
    return store, store.port


@pytest.mark.parametrize(("is_an_id", "field"), [(True, "init_info.backend"), (False, "init_info.master_address")])
def test_a_trainer_of_nccl_is_understood_and_refused_by_name(served: Served, is_an_id: bool, field: str) -> None:
    from tests.weights.test_unique_id import pickled

    store, port = publish_id(pickled(bytes(range(128))) if is_an_id else b"\x80\x04N.")
    info = {"master_address": "127.0.0.1", "master_port": port, "backend": "nccl"}
    status, reply = post(served, INIT, {"init_info": info})
    assert (status, reply["error"]["param"]) == (400, field)
    assert ("nccl" in reply["message"]) == is_an_id, store


def test_sleep_and_wake_up_in_the_order_of_trainers(start: START, model_folder: Path) -> None:
    """As TRL and SkyRL do it: the weights that come back are those of an update."""
    served = start()
    before = served.generate(input_ids=[1, 2, 3], sampling_params={"max_new_tokens": 4, "temperature": 0})
    assert served.http.get("/is_sleeping").json() == {"is_sleeping": False}
    for _ in range(2):  # which changes nothing
        assert post(served, "/sleep", level=2) == (200, None)
        assert served.http.get("/is_sleeping").json() == {"is_sleeping": True}
    assert post(served, "/wake_up", tags="weights") == (200, None)
    assert served.http.get("/is_sleeping").json() == {"is_sleeping": True}
    assert post(served, UPDATE, {"weight_dir": str(model_folder)})[0] == 200
    reset = served.http.post("/reset_prefix_cache", json={"reset_running_requests": True})
    assert reply_of(reset) == (200, {"success": True})
    assert post(served, "/wake_up", {"tags": ["kv_cache"]}) == (200, None)
    assert served.engine.status().released == (), "a client of vLLM's knows no graphs to wake"
    assert post(served, "/wake_up") == (200, None), "both may be repeated"
    assert served.http.get("/is_sleeping").json() == {"is_sleeping": False}
    after = served.generate(input_ids=[1, 2, 3], sampling_params={"max_new_tokens": 4, "temperature": 0})
    assert after["output_ids"] == before["output_ids"]


def reply_of(reply: httpx.Response) -> tuple[int, Any]:
    return reply.status_code, reply.json()


def test_level_1_keeps_the_weights_where_the_engine_does(start: START) -> None:
    served = start()
    assert told(post(served, "/sleep")) == (400, "level")
    assert told(post(served, "/sleep", level=1, tags="weights")) == (400, "level")
    assert post(served, "/sleep", level=1, tags="kv_cache") == (200, None)
    assert post(served, "/wake_up")[0] == 200
    keeping = start(settings={"keep_weights_copy": True})
    digest = keeping.engine.digest()
    assert post(keeping, "/sleep") == (200, None) and post(keeping, "/wake_up") == (200, None)
    assert keeping.engine.digest() == digest


class Generating:
    """A long request in the background."""

    def __init__(self, served: Served, num_tokens: int = 600) -> None:
        self.replies: list[Any] = []
        self.params = {**LONG, "max_new_tokens": num_tokens}
        self.thread = threading.Thread(target=self._run, args=(served,))
        self.thread.start()
        while served.engine.metrics()["num_running"] < 1:
            pass

    def _run(self, served: Served) -> None:
        self.replies.append(served.generate(rid="long", input_ids=[1, 2], sampling_params=self.params))

    def finish(self) -> str:
        self.thread.join(60)
        kind: str = self.replies[0]["meta_info"]["finish_reason"]["type"]
        return kind


@pytest.mark.parametrize(
    ("mode", "finish"), [("abort", "abort"), ("wait", "length"), ("keep", "length"), (None, "abort")]
)
@pytest.mark.parametrize("way", ["/pause", "/sleep"])
def test_what_becomes_of_requests_in_flight(start: START, way: str, mode: str | None, finish: str) -> None:
    served = start()
    request = Generating(served, 250 if finish == "length" else 600)
    query: dict[str, Any] = {} if mode is None else {"mode": mode}
    if way == "/pause":
        assert post(served, way, **query) == (200, {"status": "paused"})
        assert served.http.get("/is_paused").json() == {"is_paused": True}
        assert post(served, "/resume") == (200, {"status": "resumed"})
    else:
        assert post(served, way, tags="kv_cache", **query) == (200, None)
        assert served.engine.status().paused == ""
        assert mode == "keep" or request.finish() == finish, "it has ended before"
        assert mode != "keep" or not request.replies
        assert post(served, "/wake_up") == (200, None)
    assert served.http.get("/is_paused").json() == {"is_paused": False}
    assert request.finish() == finish


def test_a_reset_of_running_requests_ends_no_pause_and_makes_none(start: START) -> None:
    served = start()
    request = Generating(served, 250)
    assert post(served, "/reset_prefix_cache", reset_running_requests=True) == (200, {"success": True})
    assert served.http.get("/is_paused").json() == {"is_paused": False}
    assert post(served, "/pause", mode="keep", clear_cache=False)[0] == 200
    assert post(served, "/reset_prefix_cache", reset_running_requests="true") == (200, {"success": True})
    assert served.engine.status().paused == "keep"
    assert post(served, "/resume")[0] == 200
    assert request.finish() == "length"


def test_aborts_by_name_or_all(start: START) -> None:
    served = start()
    for body, num_aborted in (({"request_ids": ["nobody", "long"]}, 1), ({}, 1)):
        request = Generating(served)
        assert post(served, "/abort_requests", body) == (200, {"status": "aborted", "aborted": num_aborted})
        assert request.finish() == "abort"
    assert post(served, "/abort_requests") == (200, {"status": "aborted", "aborted": 0})


@pytest.mark.parametrize(
    ("path", "query", "field"),
    [
        ("/pause", {"mode": "sideways"}, "mode"),
        ("/pause", {"timeout_s": "-1"}, "timeout_s"),
        ("/pause", {"clear_cache": "perhaps"}, "clear_cache"),
        ("/sleep", {"level": "3"}, "level"),
        ("/sleep", {"level": "x"}, "level"),
        ("/sleep", {"level": 2, "mode": "drain"}, "mode"),
        ("/sleep", {"level": 2, "tags": "nothing"}, "tags"),
        ("/wake_up", {"tags": "nothing"}, "tags"),
        ("/reset_prefix_cache", {"reset_running_requests": "x"}, "reset_running_requests"),
        ("/finish_weight_update", {"weight_version": ""}, "weight_version"),
    ],
)
def test_a_wrong_query_is_named(served: Served, path: str, query: dict[str, Any], field: str) -> None:
    assert told(post(served, path, **query)) == (400, field)
    assert served.engine.status().paused == "" and served.engine.status().released == ()


def test_a_get_changes_nothing_and_a_body_is_json(served: Served) -> None:
    for path in ("/pause", "/sleep", "/update_weights", "/reset_prefix_cache"):
        assert served.http.get(path).status_code == 405
        assert served.http.post(path, content=b"level=2", headers={"content-type": "text/plain"}).status_code == 415
        assert served.http.post(path, content=b"{", headers={"content-type": "application/json"}).status_code == 400
    assert served.http.request("GET", "/get_world_size", json={}).json() == {"world_size": 1}
