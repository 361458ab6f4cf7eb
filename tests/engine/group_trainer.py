"""A trainer in a process of its own, rank 0 of a weight group, made as slime and SGLang make theirs. It does what lines
of JSON on its standard input say and answers each with a line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.arch.source import ROOT, child_environment


class TrainerProcess:
    """The other end of it."""

    def __init__(self) -> None:
        environment = child_environment(OMP_NUM_THREADS="1")
        command = [sys.executable, "-m", "tests.engine.group_trainer"]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `close`)
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)
        self.is_spent = False  # it will do nothing more
        self.ask(do="hello")

    def tell(self, **order: Any) -> None:
        """Give an order, whose answer `hear` waits for."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def hear(self) -> Any:
        """The answer of the oldest order that has not been heard; an error raises, with what it has said of it."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": "it has ended"}
        if "error" in answer:
            self.is_spent = True
            self._errors.seek(0)
            raise AssertionError(f"the trainer: {answer['error']}\n{self._errors.read()[-8000:]}")
        return answer

    def ask(self, **order: Any) -> Any:
        """Give an order and wait for its answer."""
        self.tell(**order)
        return self.hear()

    def kill(self) -> None:
        """As a crash."""
        self.is_spent = True
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """As a freeze."""
        self.is_spent = True
        self.process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        """End it, whatever it does."""
        self.kill()
        self._errors.close()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def init_custom_process_group(port: int, world_size: int, name: str, seconds: float, backend: str) -> Any:
    """In the order of SGLang's and slime's function of that name."""
    from torch.distributed.distributed_c10d import (
        Backend,
        GroupName,
        PrefixStore,
        _new_process_group_helper,
        _world,
    )
    from torch.distributed.rendezvous import rendezvous

    timeout = timedelta(seconds=seconds)
    store, rank, world_size = next(rendezvous(f"tcp://127.0.0.1:{port}", 0, world_size, timeout=timeout))
    store.set_timeout(timeout)
    store = PrefixStore(name, store)
    group, _ = _new_process_group_helper(
        world_size, rank, [], Backend(backend), store, group_name=GroupName(name), backend_options=None, timeout=timeout
    )
    _world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return group


class _Trainer:
    """Its tensors are where its last group's backend takes them: of NCCL on the last device."""

    def __init__(self) -> None:
        self.groups: dict[str, Any] = {}
        self.device = "cpu"

    def hello(self) -> None:
        import torch.distributed  # noqa: F401 (the slow part of a start)

    def init(self, port: int, name: str, world_size: int = 2, seconds: float = 60.0, backend: str = "gloo") -> None:
        import torch

        if name in self.groups:
            self.destroy(name)
        if backend == "nccl":
            self.device = f"cuda:{torch.cuda.device_count() - 1}"
            torch.cuda.set_device(self.device)
        self.groups[name] = init_custom_process_group(port, world_size, name, seconds, backend)

    def destroy(self, name: str) -> None:
        import torch.distributed as dist

        dist.destroy_process_group(self.groups.pop(name))

    def send(
        self, name: str, folder: str, names: list[str], dtype: str = "float32", bucket: bool = False, add: float = 0.0
    ) -> None:
        """Broadcast tensors of a checkpoint in this order, as slime does: handles first, then all waits."""
        import torch
        import torch.distributed as dist
        from safetensors.torch import load_file

        loaded = load_file(Path(folder) / "model.safetensors")
        tensors = [loaded[each].to(self.device, getattr(torch, dtype)) + add for each in names]
        if bucket:
            tensors = [torch.cat([each.flatten().view(torch.uint8) for each in tensors])]
        handles = [dist.broadcast(each, 0, group=self.groups[name], async_op=True) for each in tensors]
        for handle in handles:
            assert handle is not None
            handle.wait()

    def send_sizes(self, name: str, sizes: list[int], value: float = 1.0) -> None:
        """Broadcast float32 tensors of so many elements."""
        import torch
        import torch.distributed as dist

        for size in sizes:
            dist.broadcast(torch.full((size,), value, device=self.device), 0, group=self.groups[name])


def main() -> None:
    """Serve until the input ends. What libraries print, as NCCL does, is no answer."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    trainer = _Trainer()
    for line in sys.stdin:
        order = json.loads(line)
        try:
            getattr(trainer, order.pop("do"))(**order)
            answer: dict[str, Any] = {}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
