"""Ranks as processes, kept for many tests: each is told which function to run on which mesh, and answers.

Rank 0 is the test's own process. A job is the name of a function of `tests.parallel.stories` and its arguments as
plain values; every rank calls it with its mesh. Also the program of the others: `python -m tests.parallel.pool PORT`.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed

from headrace.parallel import Mesh
from headrace.parallel.joining import LinkLimits, join_mesh
from tests.quick_interpreter import quicken

dist: Any = torch.distributed  # whose types lack most of it
ROOT = Path(__file__).parents[2]
SECONDS = 60.0


class Job(msgspec.Struct):
    """`number` names the groups that its ranks make."""

    number: int
    rank: int
    num_ranks: int
    story: str
    arguments: dict[str, Any]
    num_stages: int = 1


def mesh_of(store: Any, job: Job, seconds: float = SECONDS) -> Mesh:
    """This rank's place among those of a job, over gloo; `seconds` are its communicator's deadline."""

    def join(rank: int, num_ranks: int, name: str) -> Any:
        within = dist.PrefixStore(f"job {job.number}/{name}", store)
        return dist.ProcessGroupGloo(within, rank, num_ranks, timedelta(seconds=SECONDS))

    return join_mesh(job.rank, job.num_ranks // job.num_stages, job.num_stages, join, LinkLimits(seconds, depth=2))


def run(store: Any, job: Job) -> Any:
    """This rank's part of a job. Nothing of it stays: a thread of gloo wakes a hundred times a second."""
    try:
        return _answer(store, job)
    finally:
        gc.collect()


def _answer(store: Any, job: Job) -> Any:
    from tests.parallel import stories

    quicken()
    mesh = mesh_of(store, job) if job.num_ranks > 1 else Mesh.single()
    answer = getattr(stories, job.story)(mesh, **job.arguments)
    mesh.of_all.all_reduce_(torch.zeros(1))  # with a rank goes what it has sent and nobody has taken
    return answer


class RankPool:
    """Rank 0 here, and processes for as many others as any test needs."""

    def __init__(self, max_ranks: int) -> None:
        limit = timedelta(seconds=SECONDS)
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=limit)
        command = [sys.executable, "-m", "tests.parallel.pool", str(self._store.port)]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
            for _ in range(1, max_ranks)
        ]
        self._num_jobs = 0

    def run(self, num_ranks: int, story: str, **arguments: Any) -> list[Any]:
        """What each rank says, by rank, of `num_stages` if that is given. Fails with what any of them fails with."""
        self._num_jobs += 1
        num_stages = arguments.pop("num_stages", 1)
        jobs = [Job(self._num_jobs, rank, num_ranks, story, arguments, num_stages) for rank in range(num_ranks)]
        others = self._processes[: num_ranks - 1]
        for process, job in zip(others, jobs[1:], strict=True):
            _write(process.stdin, msgspec.msgpack.encode(job))
        own = msgspec.msgpack.decode(msgspec.msgpack.encode(run(self._store, jobs[0])))
        answers = [own, *(msgspec.msgpack.decode(_read(process.stdout)) for process in others)]
        failed = [f"rank {rank}: {answer['failed']}" for rank, answer in enumerate(answers) if "failed" in answer]
        assert not failed, "\n".join(failed)
        return answers

    def close(self) -> None:
        """End the others, and wait until they have ended."""
        for process in self._processes:
            process.kill()
            process.communicate()


def _write(pipe: Any, data: bytes) -> None:
    pipe.write(len(data).to_bytes(8, "little") + data)
    pipe.flush()


def _read(pipe: Any) -> bytes:
    data: bytes = pipe.read(int.from_bytes(pipe.read(8), "little"))
    return data


def main(port: int) -> None:
    """Do jobs until standard input ends."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=SECONDS))
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    gc.freeze()
    while data := _read(sys.stdin.buffer):
        try:
            answer = run(store, msgspec.msgpack.decode(data, type=Job))
        except Exception:
            answer = {"failed": traceback.format_exc()}
        _write(answers, msgspec.msgpack.encode(answer))


if __name__ == "__main__":
    import tests.conftest  # noqa: F401 - the environment of tests

    main(int(sys.argv[1]))
