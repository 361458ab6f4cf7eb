"""A replica over two nodes, process trees of one host of which each sees another device only."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from headrace import HeadraceError
from headrace.types.errors import DeviceLostError
from tests.engine.nodes import FIRST, SECRET, Node, node
from tests.free_ports import free_port
from tests.gpu.builders import Checkpoint, Checkpoints, Starter, check_greedy, greedy, random_ids

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device"),
]
SETTINGS: dict[str, Any] = {
    "tp_size": 2,
    "nnodes": 2,
    "dtype": "float32",
    "kv_pool_tokens": 1 << 15,
    "max_running_requests": 16,
    "max_num_batched_tokens": 1024,
    "max_graph_tokens": 64,
    "skip_tokenizer_init": True,
    "seed": 0,
    "start_timeout": 120,
}
PROMPTS = [random_ids(random.Random(number), 5 + 40 * number) for number in range(4)]


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_DIST_SECRET", SECRET)


@pytest.fixture
def address() -> str:
    return f"{FIRST}:{free_port()}"


@pytest.fixture
def other(checkpoints: Checkpoints, address: str) -> Iterator[Node]:
    """The second node, whose one device is the last of the host."""
    last = str(torch.cuda.device_count() - 1)
    with node(checkpoints.get().folder, address, devices=last, device="cuda", start_timeout=120) as started:
        yield started


def first_node(start: Starter, checkpoints: Checkpoints, address: str, **settings: Any) -> Any:
    return start(checkpoints.get(), dist_init_addr=address, inprocess=False, **SETTINGS, **settings)


def check(engine: Any, checkpoint: Checkpoint) -> None:
    pieces = engine.generate(input_ids=PROMPTS, sampling_params=greedy(24))
    for prompt, piece in zip(PROMPTS, pieces, strict=True):
        check_greedy(checkpoint, prompt, piece, 1e-3)


def test_two_nodes_compute_what_transformers_does(
    checkpoints: Checkpoints, start: Starter, address: str, other: Node
) -> None:
    """Also with the weights of updates from memory of the first node's device, of its host, and from a folder."""
    old, new = checkpoints.get(), checkpoints.get(seed=1)
    engine = first_node(start, checkpoints, address)
    check(engine, old)
    digests = [engine.digest()]
    for place, target in (("cuda", new), ("cpu", old)):
        tensors = [(name, tensor.to(place)) for name, tensor in target.named_tensors()]
        engine.update_weights_from_tensor(tensors, version=place)
        check(engine, target)
        digests.append(engine.digest())
    engine.update_weights_from_disk(new.folder, "folder")
    digests.append(engine.digest())
    assert digests[0] == digests[2] != digests[1] == digests[3]
    engine.shutdown()
    code, text = other.end()
    assert code == 0 and "rank 0 has ended" in text


def test_a_node_that_is_lost_ends_the_other_and_is_named(
    checkpoints: Checkpoints, start: Starter, address: str, other: Node
) -> None:
    engine = first_node(start, checkpoints, address, max_core_restarts=0)
    outcomes: list[HeadraceError] = []

    def generate() -> None:
        try:
            engine.generate(input_ids=PROMPTS, sampling_params=greedy(4000))
        except HeadraceError as error:
            outcomes.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    time.sleep(1.0)
    other.send(signal.SIGKILL)
    began = time.monotonic()
    thread.join(30.0)
    seconds = time.monotonic() - began
    (error,) = outcomes
    assert "rank 1 (node 1 at 127." in error.message, error
    assert isinstance(error, DeviceLostError) and seconds < 10.0
