"""Trainers of several ranks: processes with `torch.distributed`, over gloo unless a test says otherwise, each of which
runs a function of a test. Where NCCL is part of it each has a device of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import distributed

from tests import warm
from tests.free_ports import free_port

SECONDS = 120.0
FAMILIES = ("qwen2", "qwen3", "qwen3_moe")
PRELOADED = [*warm.IMPORTS, "tests.rl.verl_bodies", "tests.rl.rank_scenarios", "tests.engine.rank_group_bodies"]
PRELOADED += [f"transformers.models.{family}.modeling_{family}" for family in FAMILIES]
"""What all processes would load, and so only one does."""

Body = Callable[..., Any]


def run_ranks(num_ranks: int, body: Body, *args: Any, seconds: float = SECONDS, backend: str = "gloo") -> list[Any]:
    """Run `body(rank, *args)` on that many ranks; what each returns. Raises with the traceback of one that fails."""
    started = start_ranks(num_ranks, body, *args, backend=backend)
    try:
        return [started.result(rank, seconds) for rank in range(num_ranks)]
    finally:
        started.end()


class StartedRanks:
    """Ranks that run."""

    def __init__(self, processes: list[Any], answers: list[Connection]) -> None:
        self.processes = processes
        self._answers = answers

    def result(self, rank: int, seconds: float = SECONDS) -> Any:
        """What the rank returns."""
        deadline = time.monotonic() + seconds
        while not self._answers[rank].poll(max(deadline - time.monotonic(), 0)):
            raise TimeoutError(f"rank {rank} is still running after {seconds} s")
        is_good, value = self._answers[rank].recv()
        if not is_good:
            raise AssertionError(f"rank {rank}: {value}")
        return value

    def end(self) -> None:
        """End those that are left."""
        for process in self.processes:
            process.join(5.0)
            if process.is_alive():
                process.kill()
                process.join()


def start_ranks(num_ranks: int, body: Body, *args: Any, backend: str = "gloo") -> StartedRanks:
    """As `run_ranks`, without waiting. `body` is a function of a module, by its name. Processes that it starts are warm
    where this process's are."""
    port = free_port()
    context: Any = multiprocessing.get_context("spawn" if "nccl" in backend else "forkserver")  # CUDA minds forks
    context.set_forkserver_preload(PRELOADED)
    processes, answers = [], []
    for rank in range(num_ranks):
        ours, theirs = context.Pipe()
        meeting = rank, num_ranks, port, backend
        process = context.Process(target=_run, args=(*meeting, warm.are_starts_warm(), theirs, body, args))
        process.start()
        theirs.close()
        processes.append(process)
        answers.append(ours)
    return StartedRanks(processes, answers)


def _run(
    rank: int,
    num_ranks: int,
    port: int,
    backend: str,
    starts_warm: bool,
    answer: Connection,
    body: Body,
    args: tuple[Any, ...],
) -> None:
    starts = warm.warm_starts(warm.Template(warm.forked)) if starts_warm else contextlib.nullcontext()
    torch.set_num_threads(1)
    try:
        if "nccl" in backend:
            torch.cuda.set_device(rank)
        distributed.init_process_group(backend, f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_ranks)
        with starts:
            answer.send((True, body(rank, *args)))
    except BaseException:
        answer.send((False, traceback.format_exc()))
        raise
