"""Two devices that sum by each other's memory, as NCCL does to the bit."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from headrace.parallel.rendezvous import Rendezvous

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")


@pytest.mark.parametrize("story", ["same_bits", "no_answer"])
def test_two_devices(story: str) -> None:
    rendezvous = Rendezvous.host()
    place = [str(rendezvous.port), rendezvous.secret]
    command = [sys.executable, "-m", "tests.gpu.rank_sums", story]
    ranks = [
        subprocess.Popen([*command, str(rank), *place], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        found = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [output.split() for output, _ in found] == [["0"], ["0"]], found
