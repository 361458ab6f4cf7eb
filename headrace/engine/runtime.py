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
from typing import Any, Generic, TypeVar

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


class _Errand(Generic[Result]):
    """A coroutine that runs on a loop for somebody elsewhere. `result` comes when it is over, cancelled or not."""

    def __init__(self, loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Result]) -> None:
        self.result: concurrent.futures.Future[Result] = concurrent.futures.Future()
        self.result.set_running_or_notify_cancel()  # so that whoever is cancelled while he waits does not end it
        self._loop = loop
        self._task: asyncio.Task[Result] | None = None
        loop.call_soon_threadsafe(self._start, coroutine)

    @property
    def has_value(self) -> bool:
        """It ended without an error."""
        return self.result.done() and self.result.exception() is None

    def cancel(self) -> None:
        """Cancel it, from any thread. No harm if it is over."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and everything on it over
            self._loop.call_soon_threadsafe(self._cancel)

    def _start(self, coroutine: Coroutine[Any, Any, Result]) -> None:
        self._task = self._loop.create_task(coroutine)
        self._task.add_done_callback(self._finish)

    def _cancel(self) -> None:
        assert self._task is not None, "it is started before it is cancelled"
        self._task.cancel()

    def _finish(self, task: asyncio.Task[Result]) -> None:
        error = concurrent.futures.CancelledError() if task.cancelled() else task.exception()
        if error is not None:
            self.result.set_exception(error)
        else:
            self.result.set_result(task.result())


async def _outlast(future: concurrent.futures.Future[Any]) -> None:
    """Wait for the end of what was cancelled, whoever else is cancelled meanwhile."""
    waiter = asyncio.wrap_future(future)
    waiter.add_done_callback(lambda done: done.cancelled() or done.exception())  # looked at: its caller has his own
    while not waiter.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([waiter])
def result_of(future: concurrent.futures.Future[Result]) -> Result:
    """Wait for a result in this thread. An interrupt that comes in the moment before a wait does not end that wait: so
    there are many."""
    while True:
        try:
            return future.result(_LOOK_SECONDS)
        except TimeoutError:
            if future.done():  # then this is its own error, or it came just now
                return future.result()


def forked(owner: int) -> ShutdownError:
    """What an engine of process `owner` is in a fork of it."""
    return ShutdownError(f"the engine belongs to process {owner}, of which this one is a fork")


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
        """True once there is no core and will be none, as in a fork of the process that owns it."""
        return self._is_closing or self.supervisor.ended.done() or os.getpid() != self._pid

    @property
    def foreign(self) -> ShutdownError | None:
        """What the engine is here, if this process is a fork of the one that owns it."""
        return forked(self._pid) if os.getpid() != self._pid else None

    @property
    def is_closing(self) -> bool:
        """True once `close` was called."""
        return self._is_closing

    def add_closer(self, closer: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Await this on the loop before the core is ended (a server that runs on the loop, say)."""
        self._closers.append(closer)

    async def run(
        self,
        coroutine: Coroutine[Any, Any, Result],
        regret: Callable[[Result], Coroutine[Any, Any, None]] | None = None,
    ) -> Result:
        """Await a coroutine on the engine's loop, from whatever loop this is. Cancelled, it is over before the caller
        goes on; `regret` undoes a result that came when nobody waited for it any more."""
        if asyncio.get_running_loop() is self.loop:
            return await coroutine
        errand = self._schedule(coroutine)
        try:
            return await asyncio.shield(asyncio.wrap_future(errand.result))
        except asyncio.CancelledError:
            errand.cancel()
            await _outlast(errand.result)
            if regret is not None and errand.has_value:
                with contextlib.suppress(ShutdownError):  # then nothing is left of it either
                    await _outlast(self._schedule(regret(errand.result.result())).result)
            raise
        except GeneratorExit:  # dropped by whoever ran it: nobody is there to wait
            errand.cancel()
            raise

    def wait(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine on the engine's loop and wait for it in this thread. Interrupted, it is over before the
        caller goes on, unless he is interrupted again."""
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise InternalError("a blocking call was made on the engine's own loop, where it would wait for itself")
        errand = self._schedule(coroutine)
        try:
            return result_of(errand.result)
        except BaseException:
            errand.cancel()
            concurrent.futures.wait([errand.result])
            raise

    def post(self, action: Callable[[], None]) -> None:
        """Call `action` on the loop soon; forgotten once the runtime is closed."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(action)

    def check_open(self) -> None:
        """Raise `ShutdownError` once the runtime is closing, and in a fork of the process that owns it."""
        if self.foreign is not None:
            raise self.foreign
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

    def _schedule(self, coroutine: Coroutine[Any, Any, Result]) -> _Errand[Result]:
        try:
            with self._lock:
                self.check_open()
                return _Errand(self.loop, coroutine)
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
