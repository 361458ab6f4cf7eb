"""Control calls that have no answer yet. Owns what becomes of one whose client goes away, and of all of them when their
server ends: that is answered at once, and what was begun is undone behind it.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from headrace.engine.runtime import Regret
from headrace.server.connections import CLIENT, Connection
from headrace.server.wire import dropping
from headrace.types.errors import ShutdownError, UnavailableError

Value = TypeVar("Value")


class WaitingCalls:
    """Those of one server. Lives on the engine's loop."""

    def __init__(self, on_disconnect: Callable[[], None]) -> None:
        self._on_disconnect = on_disconnect
        self._answers: set[asyncio.Future[Any]] = set()
        self._undoing: set[asyncio.Task[None]] = set()
        self._has_ended = False

    async def run(
        self, request: Request, call: Coroutine[Any, Any, Value], regret: Regret[Value] | None = None
    ) -> Value:
        """What `call` comes to. It is cancelled, and over, when the client goes away before: nobody would hear of it.
        What it came to in that very moment is undone by `regret`. `ShutdownError` at once when the server ends: the
        call is over, or undone, before `settle` returns."""
        if self._has_ended:
            call.close()
            raise _ended()
        client: Connection = request.scope["state"][CLIENT]
        is_gone = False

        def give_up() -> None:
            nonlocal is_gone
            is_gone = True
            task.cancel()

        task = asyncio.ensure_future(call)
        answer: asyncio.Future[Value] = asyncio.get_running_loop().create_future()  # `end` may be the first to give it
        task.add_done_callback(functools.partial(_hand_on, answer))
        self._answers.add(answer)
        with dropping(request.scope, give_up, self._on_disconnect):
            try:
                value = await answer
                if regret is None or not client.is_gone:
                    return value
                await regret(value)
            except asyncio.CancelledError:
                if not task.done():  # it is this call that is cancelled
                    task.cancel()
                    await asyncio.wait([task])
                    raise
                if not is_gone:
                    raise
            finally:
                self._answers.discard(answer)
                if not task.done():
                    self._undo(task, regret)
        raise UnavailableError("the client went away; what it asked for was given up")

    def end(self) -> None:
        """Answer all of them, and all that come from now on, with a `ShutdownError`."""
        self._has_ended = True
        for answer in self._answers:
            if not answer.done():
                answer.set_exception(_ended())

    async def settle(self, seconds: float) -> None:
        """Wait until what was answered before its end has ended too, so many seconds at most."""
        if self._undoing:
            await asyncio.wait(self._undoing, timeout=seconds)

    def _undo(self, task: asyncio.Task[Value], regret: Regret[Value] | None) -> None:
        async def undo() -> None:
            task.cancel()
            await asyncio.wait([task])
            if regret is not None and not task.cancelled() and task.exception() is None:
                await regret(task.result())

        undoing = asyncio.ensure_future(undo())
        self._undoing.add(undoing)
        undoing.add_done_callback(self._undoing.discard)


def _hand_on(answer: asyncio.Future[Value], task: asyncio.Task[Value]) -> None:
    error = None if task.cancelled() else task.exception()
    if answer.done():
        return
    if task.cancelled():
        answer.cancel()
    elif error is not None:
        answer.set_exception(error)
    else:
        answer.set_result(task.result())


def _ended() -> ShutdownError:
    return ShutdownError("the server is shutting down; what was asked for is given up")
