"""Control calls that have no answer yet. Owns what becomes of one whose client goes away, and of all of them when their
server ends: what had come to something by then is answered with that, the rest is given up.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from starlette.requests import Request

from headrace.engine.calls import outlast
from headrace.engine.runtime import Regret
from headrace.server.connections import CLIENT, Connection
from headrace.server.wire import dropping
from headrace.types.errors import HeadraceError, ShutdownError, UnavailableError

VERDICT_SECONDS = 0.7
"""So long a server that ends waits for what became of calls it gives up: shortly after it cuts connections off."""

Value = TypeVar("Value")


class _Waiting(Generic[Value]):
    """A call on its way. Its answer is what its task comes to, unless somebody gives it before."""

    def __init__(self, call: Coroutine[Any, Any, Value], regret: Regret[Value] | None) -> None:
        self.task = asyncio.ensure_future(call)
        self.regret = regret
        self.answer: asyncio.Future[Value] = asyncio.get_running_loop().create_future()
        self._reason: HeadraceError | None = None
        self.task.add_done_callback(self._hand_on)

    def give_up(self, reason: HeadraceError) -> None:
        """End it: `reason` is its answer unless it comes to something all the same."""
        if self._reason is None and not self.task.done():
            self._reason = reason
            self.task.cancel()

    async def leave_nothing(self) -> None:
        """Wait for the end of one that was given up, and undo what it came to."""
        await asyncio.wait([self.task])
        if self.regret is not None and not self.task.cancelled() and self.task.exception() is None:
            await self.regret(self.task.result())

    def _hand_on(self, task: asyncio.Task[Value]) -> None:
        error = self._reason if task.cancelled() else task.exception()
        if self.answer.done():
            return
        if error is not None:
            self.answer.set_exception(error)
        elif task.cancelled():
            self.answer.cancel()
        else:
            self.answer.set_result(task.result())


class WaitingCalls:
    """Those of one server. Lives on the engine's loop."""

    def __init__(self, on_disconnect: Callable[[], None]) -> None:
        self.tasks: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()
        """In which calls have run."""
        self._on_disconnect = on_disconnect
        self._waiting: set[_Waiting[Any]] = set()
        self._undoing: set[asyncio.Task[None]] = set()
        self._has_ended = False

    async def run(
        self, request: Request, call: Coroutine[Any, Any, Value], regret: Regret[Value] | None = None
    ) -> Value:
        """What `call` comes to. It is given up when the client goes away before, since nobody would hear of it, and
        with a `ShutdownError` when the server ends: what it has not done by then it does not do, and what it came to
        in that very moment is undone by `regret`, before `settle` returns; or it has no regret, and has come to what is
        returned here. Where that is not known in time, `UnavailableError`."""
        if self._has_ended:
            call.close()
            raise _ended()
        client: Connection = request.scope["state"][CLIENT]
        waiting = _Waiting(call, regret)
        self.tasks.add(waiting.task)
        self._waiting.add(waiting)
        with dropping(request.scope, lambda: waiting.give_up(_gone()), self._on_disconnect):
            try:
                value = await waiting.answer
                if regret is not None:
                    await client.verdict()
            except asyncio.CancelledError:  # this call is cancelled, or the task was, by neither of us
                waiting.give_up(_ended())
                await outlast(waiting.leave_nothing())
                raise
            finally:
                self._waiting.discard(waiting)
            if regret is None or not client.is_gone:
                return value
            await outlast(regret(value))
        raise _gone()

    def end(self) -> None:
        """Give up all of them. Those that come from now on get a `ShutdownError`."""
        self._has_ended = True
        loop = asyncio.get_running_loop()
        loop.call_soon(self._give_up_all)  # those that end in this turn have come to something
        loop.call_later(VERDICT_SECONDS, self._answer_rest)

    async def settle(self, seconds: float) -> None:
        """Wait until what was answered before its end has ended too, so many seconds at most."""
        if self._undoing:
            await asyncio.wait(self._undoing, timeout=seconds)

    def _give_up_all(self) -> None:
        for waiting in self._waiting:
            waiting.give_up(_ended())

    def _answer_rest(self) -> None:
        """Those that are still on their way; what has a regret is undone behind that."""
        for waiting in self._waiting:
            if not waiting.task.done() and not waiting.answer.done():
                waiting.answer.set_exception(_unknown() if waiting.regret is None else _ended())
                undoing = asyncio.ensure_future(waiting.leave_nothing())
                self._undoing.add(undoing)
                undoing.add_done_callback(self._undoing.discard)


def _ended() -> ShutdownError:
    return ShutdownError("the server is shutting down; what was asked for is given up")


def _unknown() -> UnavailableError:
    return UnavailableError("the server is shutting down; what was asked for may have been done, or be done yet")


def _gone() -> UnavailableError:
    return UnavailableError("the client went away; what it asked for was given up")
