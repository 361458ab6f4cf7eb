"""Nodes of a replica for tests: process trees of `headrace serve`, which meet over loopback addresses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.arch.source import ROOT, child_environment
from tests.engine.test_restart import is_gone, wait_for
from tests.processes import children_of

SECRET = "a secret of this test only"
FIRST = "127.0.0.2"
"""Where node 0 listens."""


class Node:
    """A node that is not the first, which sees these `devices` only."""

    def __init__(
        self,
        folder: Path,
        address: str,
        rank: int = 1,
        secret: str = SECRET,
        devices: str | None = None,
        **settings: Any,
    ) -> None:
        given = {"tp_size": 2, "nnodes": 2, "device": "cpu", "dtype": "float32", "start_timeout": 60, **settings}
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        flags += [f"--node-rank={rank}", f"--dist-init-addr={address}", "--num-threads=1"]
        environment = child_environment(HEADRACE_DIST_SECRET=secret)
        if devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = devices
        self.process = subprocess.Popen(
            [sys.executable, "-m", "headrace", "serve", str(folder), *flags],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def rank_pids(self) -> list[int]:
        """The processes of its ranks."""
        return children_of(self.process.pid)

    def send(self, number: signal.Signals) -> None:
        """A signal to the whole tree."""
        for pid in (self.process.pid, *self.rank_pids):
            os.kill(pid, number)

    def end(self) -> tuple[int, str]:
        """Wait for its own end: its exit code, and what it has said."""
        _, text = self.process.communicate(timeout=90)
        return self.process.returncode, text

    def close(self) -> None:
        pids = self.rank_pids
        with suppress(ProcessLookupError):
            self.send(signal.SIGCONT)
            self.process.kill()
        self.process.communicate(timeout=30)
        wait_for(lambda: all(is_gone(pid) for pid in pids))


@contextmanager
def node(folder: Path, address: str, **settings: Any) -> Iterator[Node]:
    started = Node(folder, address, **settings)
    try:
        yield started
    finally:
        started.close()
