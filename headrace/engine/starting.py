"""The start of an engine, in a thread of its own: no event loop stands still for it, and a wait may be interrupted.

Owns the order of a start, and the parts of an engine once it has started. Knows nothing of how they are used.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import threading
from functools import partial
from pathlib import Path

from headrace.config import EngineConfig, ResolvedConfig
from headrace.engine.core_host import (
    ExecutorKind,
    begin_core,
    current_device,
    load_tokenizer,
    log_ends,
    model_folder,
    resolve_settings,
    with_tokenizer,
)
from headrace.engine.intake import Intake
from headrace.engine.requests import RequestBuilder
from headrace.engine.runtime import EngineLoop, forked, result_of
from headrace.ipc import BegunCore, PulsePage
from headrace.ipc.rank_meeting import Meeting
from headrace.telemetry import Progress, ProgressBar
from headrace.text import Tokenizer
from headrace.types.errors import ShutdownError
from headrace.types.messages import CoreReady

logger = logging.getLogger(__name__)


class Running:
    """An engine that has started. `resolved` says what only the core could measure, too."""

    def __init__(
        self, config: EngineConfig, resolved: ResolvedConfig, tokenizer: Tokenizer | None, runtime: EngineLoop
    ) -> None:
        self.resolved = resolved
        self.tokenizer = tokenizer
        self.runtime = runtime
        self.builder = RequestBuilder(resolved, tokenizer)
        self.intake = Intake(runtime.client, self.builder, tokenizer, config.request_timeout, runtime.lookback)

    def note_restart(self, ready: CoreReady) -> None:
        """Another core may have found room for more or less."""
        self.resolved = self.resolved.with_pool(ready.max_total_num_tokens, ready.explanations)
        self.builder.resize(self.resolved)


class Start:
    """Begins at once. `close` may come at any time, from any thread."""

    def __init__(
        self, config: EngineConfig, *, inprocess: bool, executor: ExecutorKind, shows_progress: bool = False
    ) -> None:
        self._config = config
        self._shows_progress = shows_progress
        self._inprocess = inprocess
        self._executor: ExecutorKind = executor
        self._device = current_device()  # here, in the caller's thread
        self._lock = threading.RLock()  # a signal handler or the garbage collector may close what is just being closed
        self._is_closed = False
        self._pid = os.getpid()
        self._begun: BegunCore | None = None
        self._runtime: EngineLoop | None = None
        self._outcome: concurrent.futures.Future[Running] = concurrent.futures.Future()
        self._outcome.set_running_or_notify_cancel()  # somebody who stops waiting does not stop the start
        threading.Thread(target=self._run, name="headrace-start", daemon=True).start()

    @property
    def running(self) -> Running | None:
        """The engine, if it has started, in this process."""
        if self.foreign is not None:  # before anything that has a lock, which a fork copies as it is
            return None
        return self._outcome.result() if self._outcome.done() and self._outcome.exception() is None else None

    def wait(self) -> Running:
        """Wait in this thread. Raises what kept the engine from starting."""
        if self.foreign is not None:
            raise self.foreign
        return self._outcome.result() if self._outcome.done() else result_of(self._outcome)

    async def wait_async(self) -> Running:
        if self.foreign is not None:
            raise self.foreign
        if not self._outcome.done():
            outcome = asyncio.wrap_future(self._outcome)
            outcome.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to see it
            await asyncio.wait([outcome])
        return self._outcome.result()

    @property
    def foreign(self) -> ShutdownError | None:
        """What the engine is here, if this process is a fork of the one that owns it, and that starts it."""
        return forked(self._pid) if os.getpid() != self._pid else None

    def close(self) -> None:
        """End the engine, or its start. Waits until the core is gone. Nothing in a fork."""
        if self.foreign is not None:
            return
        with self._lock:
            self._is_closed = True
        if self._begun is not None:
            self._begun.close()
        if self._runtime is not None:
            self._runtime.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ShutdownError("the engine was shut down before it had started")

    def _run(self) -> None:
        try:
            running = self._start()
        except BaseException as error:
            self.close()
            self._outcome.set_exception(error)
        else:
            self._outcome.set_result(running)

    def _begin(self, config: EngineConfig) -> None:
        """The core's process, which has much to load before it needs its settings."""
        with self._lock:
            self._check_open()
            self._begun = begin_core(config, self._executor)
            self._check_open()

    def _start(self) -> Running:
        config = self._config
        folder = model_folder(config.model)
        ranks_here = 1 if isinstance(self._executor, Meeting) else None
        if not self._inprocess:
            self._begin(config)
        resolved = resolve_settings(
            config, self._executor, first_device=self._device, ranks_here=ranks_here, folder=folder
        )
        with self._lock:
            self._check_open()
            self._runtime = runtime = EngineLoop(
                resolved, inprocess=self._inprocess, executor=self._executor, begun=self._begun
            )
            self._check_open()  # the garbage collector may have closed it in here
        read = partial(_progress_of, runtime.host.pulse, Path(config.model).name)
        with ProgressBar(read, is_wanted=self._shows_progress):
            tokenizer = load_tokenizer(config, resolved.folder)
            ready = runtime.wait(runtime.supervisor.start())
        # Only the core could measure what a device has room for; requests are bounded by that.
        resolved = with_tokenizer(resolved, tokenizer).with_pool(ready.max_total_num_tokens, ready.explanations)
        log_ends(resolved.model)
        running = Running(config, resolved, tokenizer, runtime)
        runtime.supervisor.on_restart = running.note_restart
        logger.info("ready", extra={"fields": {"model": config.model, "seed": resolved.engine.seed}})
        return running


def _progress_of(pulse: PulsePage, model: str) -> Progress:
    stage, done, total = pulse.read_start()
    return Progress(f"{model}: {stage or 'starting'}", done, total)
