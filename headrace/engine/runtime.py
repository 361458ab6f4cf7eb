"""The engine's private event loop, its thread, and the core behind it. Owns their start and their end.

The thread knows nothing of the engine object: dropping the last reference to an engine, or leaving the interpreter,
closes its runtime.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from headrace.config import ResolvedConfig
from headrace.engine.client import CoreClient
from headrace.engine.health import HealthLimits
from headrace.engine.launch import CoreHost, ExecutorKind, start_core
from headrace.engine.ledger import Ledger
from headrace.engine.supervision import Supervisor
from headrace.engine.update import Updater
from headrace.ipc import keep_standard_numbers
from headrace.types.errors import HeadraceError, InternalError, ShutdownError

logger = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 5.0
_LOOK_SECONDS = 0.5
_SHUTTING_DOWN = "the engine is shut down"

Result = TypeVar("Result")


def result_of(future: concurrent.futures.Future[Result]) -> Result:
    """Wait for a result in this thread. An interrupt that comes in the moment before a wait does not end that wait: so
    there are many."""
    while True:
        try:
            return future.result(_LOOK_SECONDS)
        except TimeoutError:
            if future.done():  # then this is its own error, or it came just now
                return future.result()


class Runtime:
    """A loop in a daemon thread with one core. `close` may be called from any thread, any number of times."""

    def __init__(self, resolved: ResolvedConfig, *, inprocess: bool, executor: ExecutorKind) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._is_closing = False
        self._has_closed = threading.Event()
        keep_standard_numbers()
        self.loop = asyncio.new_event_loop()
        engine = resolved.engine
        host, link = start_core(resolved, inprocess=inprocess, executor=executor)
        limits = HealthLimits(watchdog=engine.watchdog_timeout)
        ledger = Ledger(engine.initial_version)
        self.client = CoreClient(link, host.pulse, engine.control_timeout, self._core_died, limits, ledger)
        # A core in the caller's process is not restarted: what broke the device for it has broken it for the caller.
        max_restarts = 0 if inprocess else engine.max_core_restarts or 0
        self.supervisor = Supervisor(host, self.client, resolved, executor, max_restarts)
        self.updater = Updater(self.client, self.loop)
        self._closers: list[Callable[[], Coroutine[Any, Any, None]]] = []
        self._thread = threading.Thread(target=self._run_loop, name="headrace-engine", daemon=True)
        self._thread.start()

    @property
    def host(self) -> CoreHost:
        """What the core runs in, now."""
        return self.supervisor.host

    @property
    def is_over(self) -> bool:
        """True once there is no core and will be none."""
        return self._is_closing or self.supervisor.ended.done()

    @property
    def is_closing(self) -> bool:
        """True once `close` was called."""
        return self._is_closing

    def add_closer(self, closer: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Await this on the loop before the core is ended (a server that runs on the loop, say)."""
        self._closers.append(closer)

    async def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Await a coroutine on the engine's loop, from whatever loop this is."""
        if asyncio.get_running_loop() is self.loop:
            return await coroutine
        return await asyncio.wrap_future(self._schedule(coroutine))

    def wait(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine on the engine's loop and wait for it in this thread."""
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise InternalError("a blocking call was made on the engine's own loop, where it would wait for itself")
        future = self._schedule(coroutine)
        try:
            return result_of(future)
        except BaseException:
            future.cancel()
            raise

    def post(self, action: Callable[[], None]) -> None:
        """Call `action` on the loop soon; forgotten once the runtime is closed."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(action)

    def check_open(self) -> None:
        """Raise `ShutdownError` once the runtime is closing, and in a fork of the process that owns it."""
        if os.getpid() != self._pid:
            raise ShutdownError(f"the engine belongs to process {self._pid}, of which this one is a fork")
        if self._is_closing:
            raise ShutdownError(_SHUTTING_DOWN)

    def close(self) -> None:
        """Answer what runs, end the core and the loop. A second caller waits for the first one's work."""
        if os.getpid() != self._pid:
            return  # a fork: neither the thread nor the core is ours
        with self._lock:
            is_first, self._is_closing = not self._is_closing, True
        self.supervisor.end(ShutdownError(_SHUTTING_DOWN))
        on_own_thread = threading.current_thread() is self._thread
        if is_first:
            self.loop.call_soon_threadsafe(self._start_closing)
        if on_own_thread:
            return  # called by the garbage collector on the loop: the loop ends by itself
        if not self._has_closed.wait(4 * SHUTDOWN_SECONDS):
            logger.error("the engine did not end in time; its core is killed")
            self.host.kill()
        self._thread.join(SHUTDOWN_SECONDS)

    def _schedule(self, coroutine: Coroutine[Any, Any, Result]) -> concurrent.futures.Future[Result]:
        try:
            with self._lock:
                self.check_open()
                return asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        except ShutdownError:
            coroutine.close()
            raise

    def _core_died(self, death: HeadraceError) -> None:
        self.supervisor.core_died(death)

    def _start_closing(self) -> None:
        task = self.loop.create_task(self._close())
        task.add_done_callback(lambda _: self.loop.stop())

    async def _close(self) -> None:
        for closer in self._closers:
            with contextlib.suppress(HeadraceError, TimeoutError):
                await asyncio.wait_for(closer(), SHUTDOWN_SECONDS)
        await self.supervisor.stop()
        if not await self.client.shut_down(SHUTDOWN_SECONDS):
            self.host.kill()
        await self.client.close(ShutdownError(_SHUTTING_DOWN))
        await self.updater.close()
        await self._end_tasks()

    async def _end_tasks(self) -> None:
        """Let those who wait for an answer see theirs, then cancel the rest."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=1.0)
        pending = [task for task in others if not task.done()]
        for task in pending:
            task.cancel()
        if pending:
            await asyncio.wait(pending, timeout=1.0)

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.host.close(SHUTDOWN_SECONDS)
        finally:
            self._has_closed.set()
            self.loop.close()
