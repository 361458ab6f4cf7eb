"""An engine in the processes of a trainer that has a device each and a group over NCCL of his own."""

from __future__ import annotations

import os
import random
import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.gpu import rank_group_bodies as bodies
from tests.gpu.builders import Checkpoints, check_greedy, random_ids
from tests.rl.trainer_ranks import run_ranks, start_ranks

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device"),
]
SECONDS = 150.0


@pytest.mark.parametrize(("backend", "num_engines", "has_mesh"), [("nccl", 2, False), ("cpu:gloo,cuda:nccl", 1, True)])
def test_it_computes_what_transformers_does_beside_the_trainers_group(
    checkpoints: Checkpoints, backend: str, num_engines: int, has_mesh: bool
) -> None:
    old, new = checkpoints.get(), checkpoints.get(seed=1)
    prompts = [random_ids(random.Random(number), 5 + 40 * number) for number in range(4)]
    given = str(old.folder), str(new.folder / "model.safetensors"), prompts, num_engines, has_mesh
    leading, following = run_ranks(2, bodies.whole_life, *given, seconds=SECONDS, backend=backend)
    assert following == []
    for checkpoint, (pieces, _) in zip([old, new] * num_engines, leading, strict=True):
        for prompt, (token_ids, logprobs) in zip(prompts, pieces, strict=True):
            piece: Any = SimpleNamespace(token_ids=token_ids, logprobs=logprobs)
            check_greedy(checkpoint, prompt, piece, 1e-3)
    digests = [digest for _, digest in leading]
    assert digests == digests[:2] * num_engines and digests[0] != digests[1]


@pytest.mark.parametrize("how", [bodies.KILL, bodies.STOP], ids=["killed", "stopped"])
def test_a_rank_that_is_lost_is_named_and_the_first_lives(checkpoints: Checkpoints, how: int) -> None:
    started = start_ranks(2, bodies.lost, str(checkpoints.get().folder), how, backend="nccl")
    try:
        kind, message, seconds, total = started.result(0, SECONDS)
    finally:
        if started.processes[1].is_alive():
            os.kill(started.processes[1].pid, signal.SIGKILL)
        started.end()
    assert kind == "DeviceLostError" and f"rank 1 (process {started.processes[1].pid} of the trainer" in message
    assert seconds < 10.0 and total == 1000.0
