"""SGLang's routes of weight groups, called as slime and AReaL call them, by a trainer in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors import safe_open

from headrace import Engine
from tests.engine.group_trainer import TrainerProcess
from tests.free_ports import free_port
from tests.server.builders import SETTINGS, save_random_model
from tests.server.conftest import START, Served


@pytest.fixture(scope="module")
def new_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("new"), seed=1)


@pytest.fixture(scope="module")
def trainer() -> Iterator[TrainerProcess]:
    process = TrainerProcess()
    yield process
    process.close()


class Slime:
    """What slime's updater does: requests in the background, broadcasts meanwhile."""

    def __init__(self, served: Served, trainer: TrainerProcess, folder: Path) -> None:
        self.served = served
        self.trainer = trainer
        self.folder = folder
        self.pool = ThreadPoolExecutor(4)
        with safe_open(folder / "model.safetensors", "pt") as file:
            self.shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        self.names = list(self.shapes)

    def post(self, path: str, **body: Any) -> Future[httpx.Response]:
        return self.pool.submit(self.served.http.post, path, json=body)

    def init(self, **more: Any) -> httpx.Response:
        port = free_port()
        body = {
            "master_address": "127.0.0.1",
            "master_port": str(port),
            "rank_offset": 1,
            "world_size": 2,
            "pp_rank": 0,
        }
        reply = self.post("/init_weights_update_group", **body, group_name="slime-pp_0", backend="gloo", **more)
        assert self.served.http.get("/health").status_code == 200, "it answers while it waits for the trainer"
        assert not reply.done()
        self.trainer.ask(do="init", port=port, name="slime-pp_0")
        return reply.result(60)

    def bucket(self, names: list[str], *, is_bucket: bool = False, **more: Any) -> httpx.Response:
        body = {
            "names": names,
            "dtypes": ["bfloat16"] * len(names),
            "shapes": [self.shapes[name] for name in names],
            "group_name": "slime-pp_0",
            "flush_cache": False,
            "weight_version": "7",
            **({"load_format": "flattened_bucket"} if is_bucket else {}),
            **more,
        }
        reply = self.post("/update_weights_from_distributed", **body)
        order = {"names": names, "dtype": "bfloat16", "bucket": is_bucket}
        self.trainer.ask(do="send", name="slime-pp_0", folder=str(self.folder), **order)
        return reply.result(60)


@pytest.fixture
def slime(start: START, trainer: TrainerProcess, new_folder: Path) -> Slime:
    return Slime(start(), trainer, new_folder)


@pytest.mark.parametrize("is_bucket", [False, True])
def test_an_update_as_slime_makes_it(slime: Slime, new_folder: Path, is_bucket: bool) -> None:
    http = slime.served.http
    joined = slime.init()
    assert joined.status_code == 200 and joined.json()["success"] is True and joined.json()["message"]
    for version in ("7", "8"):
        assert http.post("/pause_generation", json={}).status_code == 200
        assert http.get("/flush_cache").status_code == 200
        half = len(slime.names) // 2
        first = slime.bucket(slime.names[:half], is_bucket=is_bucket, weight_version=version)
        assert first.status_code == 200 and first.json()["success"] is True
        incomplete = http.post("/continue_generation", json={})
        assert incomplete.status_code == 409 and slime.names[half] in incomplete.text
        last = slime.bucket(slime.names[half:], is_bucket=is_bucket, weight_version=version)
        assert last.status_code == 200 and last.json()["report"]["version"] == version
        assert http.post("/continue_generation", json={}).status_code == 200
        reply = slime.served.generate(input_ids=[1, 2, 3], sampling_params={"max_new_tokens": 4, "ignore_eos": True})
        assert reply["meta_info"]["weight_version"] == version
    with Engine(new_folder, inprocess=True, **{**SETTINGS, "dtype": "bfloat16"}) as cold:
        expected = {name: cold.get_weights_by_name(name).float() for name in slime.names}
    for name in slime.names:
        assert bool((slime.served.engine.get_weights_by_name(name) == expected[name]).all()), name
    left = http.post("/destroy_weights_update_group", json={"group_name": "slime-pp_0"})
    assert left.status_code == 200 and left.json()["success"] is True
    assert slime.init().status_code == 200, "as when the trainer connects again"


def test_a_refused_bucket_is_a_400_and_the_group_goes_on(slime: Slime) -> None:
    slime.init()
    shapes = [[1] for _ in slime.names[:2]]
    names = slime.names[:2]
    wrong = [[*slime.shapes[name][::-1], 1] for name in names]
    refused = slime.bucket(names, shapes=wrong)
    assert refused.status_code == 400 and refused.json()["success"] is False and names[0] in refused.text, shapes
    assert slime.bucket(slime.names).json()["report"]["num_tensors"] == len(slime.names)


def test_what_goes_wrong_has_a_status_and_a_reason(slime: Slime) -> None:
    http = slime.served.http
    unknown = http.post("/destroy_weights_update_group", json={"group_name": "nobody's"})
    assert unknown.status_code == 400 and unknown.json()["success"] is False and "nobody's" in unknown.text
    body = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2}
    nccl = http.post("/init_weights_update_group", json=body)
    assert nccl.status_code == 400 and nccl.json()["error"]["param"] == "backend"
    late = http.post("/init_weights_update_group", json={**body, "backend": "gloo", "timeout_s": 0.5})
    assert late.status_code == 504 and "weight_update_group" in late.text
    update = {"names": ["a"], "dtypes": ["float32"], "shapes": [[1]], "group_name": "nobody's"}
    assert http.post("/update_weights_from_distributed", json=update).status_code == 400
    for field in ("names", "dtypes", "shapes"):
        reply = http.post("/update_weights_from_distributed", json={**update, field: None})
        assert reply.status_code == 400 and reply.json()["error"]["param"] == field
    slime.init()
    again = http.post("/init_weights_update_group", json={**body, "backend": "gloo", "group_name": "slime-pp_0"})
    assert again.status_code == 409 and again.json()["success"] is False
