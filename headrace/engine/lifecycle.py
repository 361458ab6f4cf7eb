"""An engine from its start to its end: where its parts are, whether it lives, how to wait for either. Owns the start.

What an engine can be asked in between is `AsyncEngine`.
"""

from __future__ import annotations

import asyncio
import weakref
from pathlib import Path
from typing import Any, Self, get_args

from headrace.config import EngineConfig, ResolvedConfig
from headrace.engine.call_progress import CallProgress
from headrace.engine.core_host import ExecutorKind, ExecutorName
from headrace.engine.runtime import EngineLoop
from headrace.engine.starting import Running, Start
from headrace.ipc.rank_meeting import Meeting
from headrace.text import Tokenizer
from headrace.types.errors import ConfigError, HeadraceError
from headrace.types.plain_values import as_choice, as_flag


class EngineLifecycle:
    """The part of `AsyncEngine` that is about its life."""

    def __init__(
        self,
        model: str | Path,
        *,
        inprocess: bool = False,
        executor: ExecutorKind = "local",
        progress: bool = True,
        **settings: Any,
    ) -> None:
        self.config = EngineConfig.from_dict({"model": model, **settings})
        if self.config.node_rank:
            message = (
                f"node_rank {self.config.node_rank} has no engine, which is that of node 0: run `headrace serve` there"
            )
            raise ConfigError(message, field="node_rank")
        if not isinstance(executor, Meeting):
            as_choice(executor, get_args(ExecutorName), "executor", ConfigError)
        shows_progress = as_flag(progress, "progress", ConfigError)
        self._call_progress = CallProgress(is_wanted=shows_progress)
        in_thread = as_flag(inprocess, "inprocess", ConfigError)
        self._start = Start(self.config, inprocess=in_thread, executor=executor, shows_progress=shows_progress)
        self._finalizer = weakref.finalize(self, self._start.close)
        self._parts: Running | None = None
        if not _is_on_a_loop():
            self.wait_started()

    async def start(self) -> Self:
        """Wait until the engine can generate. Raises what keeps it from that; may be awaited any number of times."""
        self._parts = await self._start.wait_async()
        return self

    def wait_started(self) -> None:
        """`start`, blocking. Interrupted, it ends the engine."""
        is_started = False
        try:
            self._parts = self._start.wait()
            is_started = True
        finally:
            if not is_started:
                self._finalizer()

    async def wait_ended(self) -> HeadraceError:
        """Wait for the engine's end and return why: `EngineDeadError` once the core is dead and no other will take its
        place, `ShutdownError` after `shutdown` and in a fork. A Ray actor that serves an engine exits on it."""
        foreign = self._start.foreign
        if foreign is not None:
            return foreign
        await self.start()
        ended = self.runtime.supervisor.ended
        await asyncio.wait([asyncio.wrap_future(ended)])
        return ended.result()

    @property
    def runtime(self) -> EngineLoop:
        """The engine's loop and core. Waits for the start, as `resolved` and `tokenizer` do."""
        return (self._parts or self._running).runtime

    @property
    def resolved(self) -> ResolvedConfig:
        return (self._parts or self._running).resolved

    @property
    def tokenizer(self) -> Tokenizer | None:
        return (self._parts or self._running).tokenizer

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The engine's own event loop, on which `submit` and its streams must be used."""
        return self.runtime.loop

    @property
    def version(self) -> str:
        """The label of the live weights, as last heard from the core; "", which no label is, while none are whole: they
        were reset, an update in place failed, or a core is dead and the next one waits for its update."""
        status = None if self._parts is None else self._parts.runtime.client.status
        if status is None:
            return self.config.initial_version
        return status.version if self.runtime.client.is_alive or not self.is_alive else ""

    @property
    def is_alive(self) -> bool:
        """True once it has started, until `shutdown` or a death of the core after which no other takes its place."""
        running = self._start.running
        return running is not None and not running.runtime.is_over

    @property
    def is_responsive(self) -> bool:
        """True while the core goes on: not stopped, deadlocked or stuck. A long step or command is no such thing."""
        return self.is_alive and self.runtime.client.is_responsive

    @property
    def is_ready(self) -> bool:
        """True when a request would start now: the core answers, is not paused, has its memory and whole weights."""
        if not self.is_alive:
            return False
        client = self.runtime.client
        if not (client.is_responsive and client.is_whole) or client.status is None:
            return False
        status = client.status
        return not (status.paused or status.updating_in_place or status.released)

    @property
    def _running(self) -> Running:
        if self._parts is None:
            self._parts = self._start.wait()
        return self._parts

    async def shutdown(self) -> None:
        """End the engine: what runs is answered with what there is, then the core ends. Idempotent.

        On the engine's own loop it returns at once, and the end follows.
        """
        running = asyncio.get_running_loop()
        started = self._start.running
        if started is not None and running is started.runtime.loop:
            self.close()
        else:
            await running.run_in_executor(None, self.close)

    def close(self) -> None:
        """`shutdown`, blocking."""
        self._start.close()
        self._finalizer.detach()

    async def __aenter__(self) -> Self:
        try:
            return await self.start()
        except GeneratorExit:  # dropped by whoever ran it: nothing can be awaited any more
            self.close()
            raise
        except BaseException:
            await self.shutdown()
            raise

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is GeneratorExit:
            self.close()
        else:
            await self.shutdown()


def _is_on_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
