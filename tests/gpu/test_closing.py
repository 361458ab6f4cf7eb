"""What an engine in a trainer's processes held on devices is gone when its `shutdown` returns, whoever is lost."""

from __future__ import annotations

import pytest
import torch

from tests.gpu import closing_bodies as bodies
from tests.gpu.builders import Checkpoints
from tests.rl.trainer_ranks import run_ranks, start_ranks

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device"),
]
SECONDS = 150.0
BACKEND = "cpu:gloo,cuda:nccl"
SLACK_BYTES = 8 << 20


def test_an_engine_that_was_shut_down_holds_nothing_on_either_rank(checkpoints: Checkpoints) -> None:
    """What the first one leaves, libraries and contexts, is there for good; no later one leaves more."""
    folder = str(checkpoints.get().folder)
    for found in run_ranks(2, bodies.starts_and_ends, folder, seconds=SECONDS, backend=BACKEND):
        descriptors, threads, free = zip(*found, strict=True)
        assert descriptors[2] <= descriptors[1] and threads == ([], [], []), found
        assert free[2] >= free[1] - SLACK_BYTES, found


def test_a_rank_whose_leader_is_killed_lives_with_its_device(checkpoints: Checkpoints) -> None:
    started = start_ranks(2, bodies.leader_is_killed, str(checkpoints.get().folder), backend=BACKEND)
    try:
        assert started.result(1, SECONDS) == (1000.0, [])
    finally:
        started.end()
