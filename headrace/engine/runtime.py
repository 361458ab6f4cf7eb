"""The engine's private event loop, its thread, and the core behind it. Owns their start and their end.

The thread knows nothing of the engine object: dropping the last reference to an engine, or leaving the interpreter,
closes its runtime.

Nothing here is locked: a fork would copy a lock as it is, and a signal handler that calls the engine would wait for the
very call that it interrupted. What must happen in order is done on the loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from headrace.config import ResolvedConfig
from headrace.engine.client import CoreClient
from headrace.engine.core_host import CoreHost, ExecutorKind, start_core
from headrace.engine.health import HealthLimits
from headrace.engine.joined_update import JoinedUpdate
from headrace.engine.ledger import Ledger
from headrace.engine.lookback import Lookback
from headrace.engine.supervision import Supervisor
from headrace.engine.update import Updater
from headrace.ipc import BegunCore, FrontLink, keep_standard_numbers
from headrace.types.errors import HeadraceError, InternalError, ShutdownError

logger = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 5.0
_LOOK_SECONDS = 0.5
_CLOSING_SECONDS = 0.02
_SHUTTING_DOWN = "the engine is shut down"

Result = TypeVar("Result")
Regret = Callable[[Result], Coroutine[Any, Any, None]]
Undoable = tuple[Coroutine[Any, Any, Result], Regret[Result]]
"""A coroutine, and what undoes a result of which nobody heard."""


class _Errand(Generic[Result]):
    """A coroutine that runs on a loop for somebody elsewhere, who may give it up. `on_news` is called on that loop when
    it is over, and when all that came of it is undone."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        coroutine: Coroutine[Any, Any, Result],
        regret: Regret[Result] | None,
        on_news: Callable[[], None],
        is_closing: Callable[[], bool],
        waited_for: set[_Errand[Any]],
    ) -> None:
        """Nothing runs before `start`, or once `is_closing`. `regret` undoes a result that came although it was given
        up. It is in `waited_for` from its start until it is over."""
        self.is_gone = False
        self.is_over = False
        """It has come to something, which `result` says."""
        self._loop = loop
        self._coroutine = coroutine
        self._regret = regret
        self._on_news = on_news
        self._is_closing = is_closing
        self._waited_for = waited_for
        self._task: asyncio.Task[Result] | None = None
        self._undoing: asyncio.Task[None] | None = None

    def result(self) -> Result:
        """What it came to, once it is over: `ShutdownError` if the loop has ended without it."""
        if self._task is None or not self._task.done():
            raise ShutdownError(_SHUTTING_DOWN)
        return self._task.result()

    def start(self) -> None:
        """Run it, from any thread. Whoever is interrupted in here need not know whether it will run: he gives it up."""
        self._waited_for.add(self)  # first: the end of the loop is told to all that are there
        try:
            self._loop.call_soon_threadsafe(self._begin)
        except RuntimeError:  # the loop is closed
            self.refuse()

    def refuse(self) -> None:
        """Nothing more becomes of it: it was not begun and will not be, or the loop has ended."""
        if self._task is None:
            self._coroutine.close()
        self.is_gone = True
        self._end()

    def give_up(self) -> None:
        """Leave nothing of it, from any thread, whether it has begun, is over, or neither. `is_gone` tells the end."""
        _call_soon(self._loop, self._give_up)  # once the loop is closed everything on it is over

    def _begin(self) -> None:
        if self._is_closing():
            self.refuse()
            return
        self._task = self._loop.create_task(self._coroutine)
        self._task.add_done_callback(self._finish)

    def _finish(self, task: asyncio.Task[Result]) -> None:
        self.is_gone = task.cancelled() or task.exception() is not None
        self._end()

    def _end(self) -> None:
        self.is_over = True
        self._waited_for.discard(self)
        self._on_news()

    def _give_up(self) -> None:
        if self._task is None:
            self.refuse()
        elif not self.is_gone and self._undoing is None:
            self._undoing = self._loop.create_task(self._undo(self._task))

    async def _undo(self, task: asyncio.Task[Result]) -> None:
        """Behind the first step of `task`, though it be given up at once: what it says there of itself others count on,
        as those do who send what it announces."""
        task.cancel()
        try:
            await asyncio.wait([task])
            if self._regret is not None and not task.cancelled() and task.exception() is None:
                await self._regret(task.result())
        finally:
            self.is_gone = True
            self._on_news()


class _Begun(Generic[Result]):
    """Tells an error of a coroutine from its refusal."""

    def __init__(self, function: Callable[[], Coroutine[Any, Any, Result]]) -> None:
        self.is_true = False
        self._function = function

    async def run(self) -> Result:
        self.is_true = True
        return await self._function()


def result_of(future: concurrent.futures.Future[Result]) -> Result:
    """Wait for a result in this thread. An interrupt that comes in the moment before a wait does not end that wait: so
    there are many."""
    while True:
        try:
            return future.result(_LOOK_SECONDS)
        except TimeoutError:
            if future.done():  # then this is its own error, or it came just now
                return future.result()


def _look_out(news: queue.SimpleQueue[None]) -> None:
    """Wait for news, but not for long: an interrupt that comes in the moment before a wait does not end that wait."""
    with contextlib.suppress(queue.Empty):
        news.get(timeout=_LOOK_SECONDS)


def _call_soon(loop: asyncio.AbstractEventLoop, action: Callable[[], None]) -> None:
    """From any thread; forgotten once the loop is closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(action)


def forked(owner: int) -> ShutdownError:
    """What an engine of process `owner` is in a fork of it."""
    return ShutdownError(f"the engine belongs to process {owner}, of which this one is a fork")


class _Latch:
    """A `threading.Event` that is set once, and has no lock of Python's: it may be waited for in a signal handler that
    has interrupted a wait for it."""

    def __init__(self) -> None:
        self._is_set = False
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        """From any thread."""
        self._is_set = True
        self._news.put(None)

    def wait(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds. Returns whether it is set."""
        deadline = time.monotonic() + timeout
        while not self._is_set and time.monotonic() < deadline:
            _look_out(self._news)
        if self._is_set:
            self._news.put(None)  # for whoever else waits
        return self._is_set


def _end_core(loop: asyncio.AbstractEventLoop, host: CoreHost, link: FrontLink) -> None:
    """One that has been started, and that nobody has spoken to. A thread ends as soon as it sees that."""
    loop.run_until_complete(link.close())
    host.kill()
    host.close(SHUTDOWN_SECONDS)


class EngineLoop:
    """A loop in a daemon thread with one core. `close` may be called from any thread and any signal handler, any number
    of times."""

    def __init__(
        self, resolved: ResolvedConfig, *, inprocess: bool, executor: ExecutorKind, begun: BegunCore | None = None
    ) -> None:
        """`begun`: as `start_core`."""
        self._pid = os.getpid()
        self.is_closing = False
        self._closing: asyncio.Task[None] | None = None
        self._has_closed = _Latch()
        self._errands: set[_Errand[Any]] = set()  # that somebody waits for
        keep_standard_numbers()
        self.loop = asyncio.new_event_loop()
        with contextlib.ExitStack() as undo:  # whatever fails: nobody has this runtime, to close it
            undo.callback(self.loop.close)
            host, link = start_core(resolved, inprocess=inprocess, executor=executor, begun=begun)
            undo.callback(_end_core, self.loop, host, link)
            self._take_core(host, link, resolved, inprocess=inprocess, executor=executor)
            self._thread = threading.Thread(target=self._run_loop, name="headrace-engine", daemon=True)
            self._thread.start()
            undo.pop_all()

    def _take_core(
        self, host: CoreHost, link: FrontLink, resolved: ResolvedConfig, *, inprocess: bool, executor: ExecutorKind
    ) -> None:
        """What this owns beside the loop."""
        engine = resolved.engine
        limits = HealthLimits(watchdog=engine.watchdog_timeout)
        ledger = Ledger(engine.initial_version)
        self.lookback = Lookback(engine.page_size)
        self.client = CoreClient(link, host.pulse, engine.control_timeout, self._core_died, limits, ledger)
        self.client.on_status = self.lookback.note_status
        # A core in the caller's process is not restarted: what broke the device for it has broken it for the caller.
        max_restarts = 0 if inprocess else engine.max_core_restarts or 0
        self.supervisor = Supervisor(host, self.client, resolved, executor, max_restarts)
        of_engine: Any = {"dtype": resolved.dtype, "num_ranks": resolved.num_ranks}
        self.updater = Updater(self.client, self.loop, self.lookback, shares_process=inprocess, **of_engine)
        self.joined = JoinedUpdate(self.updater, self.client)
        self._closers: list[Callable[[], Coroutine[Any, Any, None]]] = []

    @property
    def host(self) -> CoreHost:
        return self.supervisor.host

    @property
    def is_over(self) -> bool:
        """True once there is no core and will be none, as in a fork of the process that owns it."""
        return self.foreign is not None or self.is_closing or self.supervisor.ended.done()

    @property
    def foreign(self) -> ShutdownError | None:
        """What the engine is here, if this process is a fork of the one that owns it."""
        return forked(self._pid) if os.getpid() != self._pid else None

    def add_closer(self, closer: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """What ends with the engine: it is awaited on the loop, before the core is ended."""
        self._closers.append(closer)

    async def run(self, coroutine: Coroutine[Any, Any, Result], regret: Regret[Result] | None = None) -> Result:
        """Await a coroutine on the engine's loop, from whatever loop this is. Cancelled, it is over before the caller
        goes on; `regret` undoes a result that came when nobody waited for it any more. On the engine's own loop none
        does: between the coroutine's end and its caller nothing is awaited."""
        caller = asyncio.get_running_loop()
        if caller is self.loop:
            return await coroutine
        news = asyncio.Event()
        errand = self._errand(coroutine, regret, functools.partial(_call_soon, caller, news.set))
        try:
            self._start(errand)
            while not errand.is_over:
                await news.wait()
            return errand.result()
        except asyncio.CancelledError:
            errand.give_up()
            while not self._is_rid_of(errand):
                news.clear()
                with contextlib.suppress(asyncio.CancelledError, TimeoutError):
                    await asyncio.wait_for(news.wait(), _LOOK_SECONDS)
            raise
        except BaseException:  # its own error, or it is dropped by whoever ran it: nobody is there to wait
            if not errand.is_gone:
                errand.give_up()
            raise

    def wait(self, coroutine: Coroutine[Any, Any, Result], regret: Regret[Result] | None = None) -> Result:
        """Run a coroutine on the engine's loop and wait for it in this thread. Interrupted, it is over and its result
        undone by `regret` before the caller goes on, unless he is interrupted again."""
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise InternalError("a blocking call was made on the engine's own loop, where it would wait for itself")
        # An interrupt may come between any two lines here. So nothing runs before the `try`, and the wait is for a
        # queue in C: Python's conditions and futures may be left locked by an interrupt.
        news: queue.SimpleQueue[None] = queue.SimpleQueue()
        errand = self._errand(coroutine, regret, functools.partial(news.put, None))
        try:
            self._start(errand)
            while not errand.is_over:
                _look_out(news)
            return errand.result()
        except asyncio.CancelledError:  # by the end of the engine
            raise concurrent.futures.CancelledError from None
        except BaseException:
            if not errand.is_gone:
                errand.give_up()
            while not self._is_rid_of(errand):
                _look_out(news)
            raise

    async def run_part(self, part: Callable[[], Coroutine[Any, Any, Result]], rest: Callable[[], Result]) -> Result:
        """`run` for what comes in parts. While the engine ends, and after, `rest` says the next one, without waiting,
        once nothing runs on the loop any more: what was answered at the end is heard by those who are slower too."""
        begun = _Begun(part)
        try:
            return await self.run(begun.run())
        except ShutdownError:
            if begun.is_true or self.foreign is not None:
                raise
        while not self._has_closed.is_set():
            await asyncio.sleep(_CLOSING_SECONDS)
        return rest()

    def wait_part(self, part: Callable[[], Coroutine[Any, Any, Result]], rest: Callable[[], Result]) -> Result:
        """`wait` for what comes in parts; `rest` as in `run_part`."""
        begun = _Begun(part)
        try:
            return self.wait(begun.run())
        except ShutdownError:
            if begun.is_true or self.foreign is not None:
                raise
        while not self._has_closed.wait(_LOOK_SECONDS):
            pass
        return rest()

    def post(self, action: Callable[[], None]) -> None:
        """Call `action` on the loop soon; forgotten once the runtime is closed."""
        _call_soon(self.loop, action)

    def check_open(self) -> None:
        """Raise `ShutdownError` once the runtime is closing, and in a fork of the process that owns it."""
        if os.getpid() != self._pid:
            raise forked(self._pid)
        if self.is_closing:
            raise ShutdownError(_SHUTTING_DOWN)

    def close(self) -> None:
        """Answer what runs, end the core and the loop. A second caller waits for the first one's work."""
        if self.foreign is not None:
            return  # a fork: neither the thread nor the core is ours
        self.is_closing = True
        self.client.note_ending()
        self.supervisor.end(ShutdownError(_SHUTTING_DOWN))
        self.post(self._start_closing)
        if threading.current_thread() is self._thread:
            return  # called by the garbage collector on the loop: the loop ends by itself
        if not self._has_closed.wait(4 * SHUTDOWN_SECONDS):
            logger.error("the engine did not end in time; its core is killed")
            self.host.kill()
        self._thread.join(SHUTDOWN_SECONDS)

    def _errand(
        self, coroutine: Coroutine[Any, Any, Result], regret: Regret[Result] | None, on_news: Callable[[], None]
    ) -> _Errand[Result]:
        return _Errand(self.loop, coroutine, regret, on_news, lambda: self.is_closing, self._errands)

    def _start(self, errand: _Errand[Any]) -> None:
        try:
            self.check_open()
        except ShutdownError:
            errand.refuse()
            raise
        errand.start()

    def _is_rid_of(self, errand: _Errand[Any]) -> bool:
        """Nothing is left of what was given up, or the loop has ended, and everything with it."""
        return errand.is_gone or self._has_closed.is_set()

    def _core_died(self, death: HeadraceError) -> None:
        self.supervisor.core_died(death)

    def _start_closing(self) -> None:
        if self._closing is None:
            self._closing = self.loop.create_task(self._close())
            self._closing.add_done_callback(lambda _: self.loop.stop())

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
            self.loop.close()
            for errand in tuple(self._errands):
                errand.refuse()
            self._has_closed.set()
