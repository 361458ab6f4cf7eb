"""Headrace as verl's rollout `timed`: as `headrace`, but that each process writes down what it waited for, for
`bench.trainer_steps`. verl loads it by VERL_USE_EXTERNAL_MODULES; TIMED_VERL is the folder of the notes.

Of a server a line for each sleep, which in a synchronous run ends the sampling of a step: seconds in which it had a
request, and in which its core ran steps. Of a trainer's rank that sends weights a line for each update: seconds in
Headrace's code, the server's resume of its memory included.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl.workers.rollout import base
from verl.workers.rollout.replica import RolloutReplicaRegistry, TokenOutput

from headrace.rl.verl_plugin import replica as headrace_replica
from headrace.rl.verl_plugin.actor import RolloutServer
from headrace.rl.verl_plugin.adapter import ServerAdapter
from headrace.rl.verl_plugin.translation import Launch

if TYPE_CHECKING:
    from headrace.rl.verl_plugin.adapter import NamedTensor


def note(name: str, **figures: float) -> None:
    with (Path(os.environ["TIMED_VERL"]) / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(figures) + "\n")


class TimedServer(RolloutServer):
    """One that knows for how long it had something to answer."""

    def __init__(self, launch: Launch) -> None:
        super().__init__(launch)
        self._num_running = 0
        self._since = self._served = self._forward = 0.0

    async def generate(self, *arguments: Any, **named: Any) -> TokenOutput:
        with self._busy():
            return await super().generate(*arguments, **named)

    async def sleep(self) -> None:
        forward = (await self._engine.asynchronous.metrics())["executing_s"]
        with self._busy():
            await super().sleep()
        note(f"server-{os.getpid()}", served=self._served, forward=forward - self._forward)
        self._served, self._forward = 0.0, forward

    @contextmanager
    def _busy(self) -> Iterator[None]:
        if not self._num_running:
            self._since = time.monotonic()
        self._num_running += 1
        try:
            yield
        finally:
            self._num_running -= 1
            if not self._num_running:
                self._served += time.monotonic() - self._since


class TimedReplica(headrace_replica.HeadraceReplica):
    """One whose server is timed."""

    async def launch_servers(self) -> None:
        headrace_replica.RolloutServer = TimedServer  # type: ignore[misc]
        await super().launch_servers()


class TimedAdapter(ServerAdapter):
    """One that knows how much of an update is Headrace's."""

    own = 0.0

    async def resume(self, tags: list[str]) -> None:
        begin = time.monotonic()
        await super().resume(tags)
        self.own += time.monotonic() - begin
        if "kv_cache" in tags and self.is_leader_rank:  # the last thing of an update
            note(f"adapter-{os.getpid()}", own=self.own)
            self.own = 0.0

    async def _send(self, pairs: AsyncIterator[NamedTensor], global_steps: int | None) -> None:
        waited = 0.0

        async def timed() -> AsyncIterator[NamedTensor]:
            nonlocal waited
            asked = time.monotonic()
            async for pair in pairs:
                waited += time.monotonic() - asked
                yield pair
                asked = time.monotonic()
            waited += time.monotonic() - asked

        begin = time.monotonic()
        await super()._send(timed(), global_steps)
        self.own += time.monotonic() - begin - waited


base._ROLLOUT_REGISTRY[("timed", "async")] = "bench.timed_verl.TimedAdapter"
RolloutReplicaRegistry.register("timed", lambda: TimedReplica)
