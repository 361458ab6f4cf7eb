"""Weights over NCCL of a trainer on another device that speaks vLLM's dialect and publishes the id as vLLM does."""

from __future__ import annotations

import base64
import ctypes
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch

from headrace import Engine, serve
from headrace.weights.nccl import nccl_library
from tests.gpu.builders import Checkpoints, Starter, greedy
from tests.server import test_vllm
from tests.server.test_vllm import FINISH, INIT, START_UPDATE, UPDATE, Trainer, publish_id
from tests.server.vllm_client import StatelessNccl
from tests.weights.test_unique_id import pickled

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")


trainers = test_vllm.trainers


def digests(start: Starter, checkpoints: Checkpoints) -> tuple[Engine, Any, Any]:
    """An engine with the old weights, whose digest is the first; the second is that of the new ones."""
    cold = start(checkpoints.get(seed=1), dtype="bfloat16")
    new = cold.digest()
    cold.shutdown()
    engine = start(checkpoints.get(), dtype="bfloat16", inprocess=False)
    return engine, engine.digest(), new


@pytest.mark.parametrize("packed_bytes", [0, 4000, 1 << 30])
def test_whole_updates_end_as_a_cold_load(
    checkpoints: Checkpoints, start: Starter, trainers: list[Trainer], packed_bytes: int
) -> None:
    """One tensor a broadcast; in buffers of tensors whose bytes may begin anywhere; all in one. The second trainer
    takes the place of the first."""
    engine, old, new = digests(start, checkpoints)
    handle = serve(engine)
    try:
        for _ in range(2):
            folders = checkpoints.get(seed=1).folder, checkpoints.get().folder
            trainers.append(Trainer(handle.url, packed_bytes, *folders))
            for expected in (new, old):
                found = trainers[-1].replies()
                assert found and all(status == 200 for _, status, _ in found), found
                assert [path for path, _, _ in found][-6:-1] == [START_UPDATE, UPDATE, UPDATE, UPDATE, FINISH]
                assert engine.digest() == expected
                trainers[-1].go_on()
            assert trainers[-1].process.wait(60) == 0
    finally:
        handle.stop()


@pytest.mark.parametrize("seconds", [60.0, 4.0])
def test_a_trainer_that_is_lost_is_named_and_another_one_takes_its_place(
    checkpoints: Checkpoints, start: Starter, trainers: list[Trainer], seconds: float
) -> None:
    """At once where it has ended, by the deadline where it says no more."""
    engine, _, new = digests(start, checkpoints)
    handle = serve(engine)
    http = httpx.Client(base_url=handle.url, timeout=60)
    try:
        trainers.append(Trainer(handle.url, 0, checkpoints.get().folder))
        assert trainers[0].replies()[-2][:2] == (FINISH, 200)
        tensors = checkpoints.get().named_tensors()
        info = {
            "names": [name for name, _ in tensors],
            "dtype_names": ["float32"] * len(tensors),
            "shapes": [list(tensor.shape) for _, tensor in tensors],
        }
        with ThreadPoolExecutor(1) as thread:
            asked = thread.submit(http.post, UPDATE, json={"update_info": info, "timeout_s": seconds})
            if seconds == 60.0:
                trainers[0].process.kill()
            reply = asked.result(20.0)
        assert reply.status_code >= 400, reply.text
        assert seconds != 60.0 or "weight group" in reply.json()["message"], reply.text
        trainers.append(Trainer(handle.url, 1 << 30, checkpoints.get(seed=1).folder))
        found = trainers[1].replies()
        assert found[-2][:2] == (FINISH, 200), found
        assert engine.digest() == new
    finally:
        http.close()
        handle.stop()


def test_a_trainer_that_publishes_an_id_and_never_comes_is_named_in_time(
    checkpoints: Checkpoints, start: Starter
) -> None:
    unique_id = (ctypes.c_ubyte * 128)()
    assert nccl_library().ncclGetUniqueId(unique_id) == 0
    store, port = publish_id(pickled(bytes(unique_id)))
    engine = start(checkpoints.get(), inprocess=False)
    handle = serve(engine)
    info = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2}
    try:
        reply = httpx.post(handle.url + INIT, json={"init_info": info, "timeout_s": 3.0}, timeout=20)
        assert reply.status_code >= 400, (reply.text, store)
        engine.generate(input_ids=[1], sampling_params=greedy(2))
    finally:
        handle.stop()


def test_a_trainer_that_gives_the_id_itself_needs_no_store(checkpoints: Checkpoints, start: Starter) -> None:
    engine, _, new = digests(start, checkpoints)
    handle, last = serve(engine), torch.device("cuda", torch.cuda.device_count() - 1)
    tensors = [(name, tensor.to(last, torch.bfloat16)) for name, tensor in checkpoints.get(seed=1).named_tensors()]
    update = {
        "names": [name for name, _ in tensors],
        "dtype_names": ["bfloat16"] * len(tensors),
        "shapes": [list(tensor.shape) for _, tensor in tensors],
    }
    replies: list[Any] = []
    try:
        with ThreadPoolExecutor(1) as thread, torch.cuda.device(last):

            def ask(path: str, body: dict[str, Any]) -> None:
                replies.append(thread.submit(httpx.post, handle.url + path, json=body, timeout=60))

            def publish(unique_id: bytes) -> None:
                encoded = base64.b64encode(unique_id).decode()
                ask(INIT, {"init_info": {"nccl_unique_id_b64": encoded, "rank_offset": 1, "world_size": 2}})

            group = StatelessNccl(publish, 2, last)
            ask(UPDATE, {"update_info": update})
            for _, tensor in tensors:
                group.broadcast(tensor)
            assert [reply.result(60).status_code for reply in replies] == [200, 200], replies[-1].result().text
        assert engine.digest() == new
        group.library.ncclCommAbort(group.communicator)
    finally:
        handle.stop()
