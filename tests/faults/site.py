"""What faults are tried on: an engine with a core of its own behind a server, and trainers in processes of their own.

Owns two sets of weights, what the engine generates with each, and the count of what must not leak.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from headrace import Engine, HeadraceError, SamplingParams, serve
from headrace.types.messages import CoreStatus
from tests.arch.source import ROOT, child_environment
from tests.faults.trainer import Order
from tests.processes import children_of
from tests.server.builders import SETTINGS, save_random_model

DEADLINE = 1.5
"""Seconds that a session waits for its next call."""

GRACE = 5.0
"""Within which after a deadline everybody has his error."""

SLOW_ROADS = ("group", "buckets")
PROMPT = list(range(1, 20))
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=6, ignore_eos=True)


class Trainer:
    """The other end of a trainer process."""

    def __init__(self, road: str) -> None:
        command = [sys.executable, "-m", "tests.faults.trainer", *(["--torch"] if road in SLOW_ROADS else [])]
        environment = child_environment(OMP_NUM_THREADS="1")
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._said: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert "pid" in self.hear(60.0)

    def tell(self, order: Order | None = None) -> None:
        """Give an order, or let it do its next step."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write((msgspec.json.encode(order).decode() if order else "go") + "\n")
            self.process.stdin.flush()

    def hear(self, seconds: float) -> dict[str, Any]:
        """What it says next; empty once it is dead."""
        try:
            line = self._said.get(timeout=seconds)
        except queue.Empty:
            raise AssertionError(f"the trainer has said nothing for {seconds:g} s") from None
        return json.loads(line) if line else {}

    def close(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.wait()
        self._reader.join(10)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._said.put(line)
        self._said.put("")


class Site:
    """The engine and what is known about it. `live` names the weights that it must have."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self.folder, self.ranks = folder, ranks
        self.digests: dict[str, dict[str, str]] = {}
        self.tokens: dict[str, list[int]] = {}
        for seed, name in enumerate(("a", "b")):
            save_random_model(folder / name, seed)
        (folder / "scratch").mkdir()
        settings = {**SETTINGS, "numerics": "invariant", "tp_size": ranks}
        restarts: dict[str, Any] = {"max_core_restarts": 1000, "core_restart_window": 0.0}
        self.engine = Engine(folder / "a", **settings, **restarts)
        roots = (str(folder),)
        self.url = serve(self.engine, weight_roots=roots).url
        for name in ("b", "a"):
            self.engine.update_weights_from_disk(folder / name, name)
            self.digests[name], self.tokens[name] = self.engine.digest(), self.generate()
            (folder / name / "digests.json").write_text(json.dumps(self.digests[name]))
        assert self.tokens["a"] != self.tokens["b"]
        self.live = "a"
        self._trainers: dict[bool, Trainer] = {}
        self._pids: set[int] = set()

    @property
    def core(self) -> int:
        """The process of the core."""
        return self.engine.asynchronous.runtime.host.pid

    @property
    def second(self) -> int:
        """The process of rank 1."""
        (pid,) = children_of(self.core)
        return pid

    @property
    def other(self) -> str:
        """The weights that are not live."""
        return "b" if self.live == "a" else "a"

    def order(self, road: str, name: str, **fields: Any) -> Order:
        """An update to these weights."""
        scratch = str(self.folder / "scratch")
        return Order(
            road=road,
            ranks=self.ranks,
            url=self.url,
            folder=str(self.folder / name),
            version=name,
            scratch=scratch,
            timeout=DEADLINE,
            **fields,
        )

    def trainer(self, road: str) -> Trainer:
        """One that can go by this road."""
        slow = road in SLOW_ROADS
        if slow not in self._trainers or self._trainers[slow].process.poll() is not None:
            self.drop_trainer(road)
            self._trainers[slow] = Trainer(road)
            self._pids.add(self._trainers[slow].process.pid)
        return self._trainers[slow]

    def drop_trainer(self, road: str) -> None:
        """The next one is another."""
        trainer = self._trainers.pop(road in SLOW_ROADS, None)
        if trainer is not None:
            trainer.close()

    def generate(self) -> list[int]:
        return self.engine.generate(input_ids=PROMPT, sampling_params=GREEDY)[0].token_ids

    def push(self, road: str, name: str) -> None:
        """A whole update by a trainer that makes no mistake."""
        trainer = self.trainer(road)
        trainer.tell(self.order(road, name, mode="auto"))
        while "step" in (said := trainer.hear(60.0)):
            trainer.tell()
        assert said == {"done": name}, said
        assert self.engine.version == name and self.engine.digest() == self.digests[name]
        assert self.generate() == self.tokens[name]
        self.live = name

    def status(self) -> CoreStatus | None:
        """None while no core answers."""
        try:
            return self.engine.status(timeout=1.0)
        except HeadraceError:
            return None

    @property
    def is_alive(self) -> bool:
        """The core is, as far as anybody has noticed."""
        return self.engine.asynchronous.runtime.client.is_alive

    @property
    def is_quiet(self) -> bool:
        """The core answers, and no update is open."""
        status = self.status()
        return status is not None and not status.updating

    def until(self, condition: Callable[[], Any], seconds: float, otherwise: Callable[[], str]) -> None:
        """Wait for a condition; `otherwise` says what is wrong."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"after {seconds:g} s: {otherwise()}"
            time.sleep(0.02)

    def belongings(self) -> dict[str, int]:
        """What may not grow, by kind."""
        core = self.core
        processes = {"here": os.getpid(), "of the core": core}
        processes |= {f"of rank {rank}": pid for rank, pid in enumerate(children_of(core), 1)}
        return {
            **{f"descriptors {whose}": len(os.listdir(f"/proc/{pid}/fd")) for whose, pid in processes.items()},
            **{f"shared mappings {whose}": _num_shared_mappings(pid) for whose, pid in processes.items()},
            "threads here": threading.active_count(),
            "children": len(children_of(os.getpid())) + len(children_of(core)),
            "names in shared memory": sum(self._is_ours(name) for name in os.listdir("/dev/shm")),
        }

    def grown(self, before: dict[str, int]) -> dict[str, int]:
        """What there is more of than before."""
        return {kind: count for kind, count in self.belongings().items() if count > before.get(kind, 0)}

    def _is_ours(self, name: str) -> bool:
        return any(f"_{pid}_" in name for pid in self._pids)

    def close(self) -> None:
        """End everything."""
        for road in ("shared", "group"):
            self.drop_trainer(road)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.core, signal.SIGCONT)
        self.engine.shutdown()


def _num_shared_mappings(pid: int) -> int:
    with open(f"/proc/{pid}/maps") as file:
        return sum("/memfd:" in line or "/dev/shm/" in line for line in file)
