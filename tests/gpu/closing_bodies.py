"""What trainer ranks do in the tests of what is left of engines on devices. Each function runs on every rank, in a
process of its own, whose device it is."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import torch
from torch import distributed

from headrace import Engine
from tests.gpu.builders import greedy
from tests.gpu.rank_group_bodies import ENGINE, come_to


def held() -> tuple[int, list[str], int]:
    """Descriptors, our threads, and what the device has free."""
    torch.cuda.synchronize()
    threads = sorted(each.name for each in threading.enumerate() if each.name.startswith("headrace"))
    return len(os.listdir("/proc/self/fd")), threads, torch.cuda.mem_get_info()[0]


def starts_and_ends(rank: int, folder: str) -> Any:
    """What each rank holds after engines that were shut down."""
    found = []
    for number in range(3):
        with Engine(folder, rank_group=distributed.group.WORLD, **ENGINE) as engine:
            if rank == 0:
                engine.generate(input_ids=[[1, 2, 3]], sampling_params=greedy(8))
        come_to(f"ended {number}", rank)
        found.append(held())
        come_to(f"looked {number}", rank)
    return found


def leader_is_killed(rank: int, folder: str) -> Any:
    """While its own device and the other's compute: the other rank lives, with a device that works."""
    engine = Engine(folder, rank_group=distributed.group.WORLD, **{**ENGINE, "control_timeout": 10})
    if rank == 0:
        arguments: dict[str, Any] = {"input_ids": [[1, 2, 3]] * 4, "sampling_params": greedy(4000)}
        threading.Thread(target=engine.generate, kwargs=arguments, daemon=True).start()
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)
    engine.shutdown()
    torch.cuda.synchronize()
    total = float(torch.ones(1000, device="cuda").sum())
    return total, [each.name for each in threading.enumerate() if each.name.startswith("headrace")]
