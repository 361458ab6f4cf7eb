"""Calls to one core that have no answer yet. Owns their ids and deadlines, and what becomes of a call that nobody
waits for any more. Knows nothing of sequences.

A call ends with the core's verdict, or with `DeadlineError` when the core has not come to it by its deadline: it will
refuse it then. One that is cancelled is given up at the core before `CancelledError` goes on. So what failed for its
caller does not happen later, and what a call paused or opened is undone with it; of what cannot be undone the caller
hears that it was done.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import msgspec

from headrace.ipc import PulsePage
from headrace.types.errors import DeadlineError, HeadraceError, InternalError
from headrace.types.messages import Command, GetStatus, GiveUp, Reply, Shutdown

CLAIM_SECONDS = 0.02
"""After its deadline a call is left so long to be claimed: the core looks at the clock a moment after it claims."""

_LONGEST_WAIT = 3600.0

Result = TypeVar("Result")


class Call(msgspec.Struct):
    """A call on its way. `deadline` is in seconds of the clock; `answer` is set once, and `has_status` if with one."""

    call_id: int
    name: str
    deadline: float
    answer: asyncio.Future[bytes]
    has_status: bool = False


class Calls:
    """The calls of one front, numbered as they are sent. Bound to one event loop."""

    def __init__(self, send: Callable[[Command], None], pulse: PulsePage, clock: Callable[[], float]) -> None:
        """`clock` is the core's too, and `pulse` says what the core has come to."""
        self._send = send
        self._pulse = pulse
        self._clock = clock
        self._num_calls = 0
        self._waiting: dict[int, Call] = {}

    def follow(self, pulse: PulsePage) -> None:
        """Calls go to another core from now on, whose pulse this is."""
        self._pulse = pulse

    async def call(
        self,
        command: Callable[[int], Command],
        timeout: float,
        refresh: Callable[[], Awaitable[None]] | None = None,
        *,
        is_final: bool = False,
    ) -> bytes:
        """Send the command made from a call id and return the payload of its reply, or raise its error.

        One that changes the core's state says how to `refresh` its status, which comes with the answer; where it does
        not, that is awaited as part of the call. One that `is_final`, which `GiveUp` does not undo, is not cancelled
        any more once the core has done it: it returns.
        """
        call = self._open(command, timeout, wants_status=refresh is not None)
        try:
            if not await self._is_answered(call, call.answer):
                message = f"{call.name} was not begun by its deadline and will not be"
                raise DeadlineError(message, field="control_timeout")
            if refresh is not None and not call.has_status:
                await refresh()
            return call.answer.result()
        except asyncio.CancelledError:
            await outlast(self._give_up(call, refresh))
            if is_final and call.answer.done() and call.answer.exception() is None:
                return call.answer.result()
            raise
        finally:
            self._waiting.pop(call.call_id, None)

    async def ask(self, question: Callable[[int], GetStatus | Shutdown], timeout: float) -> bytes:
        """As `call`, for what needs no verdict: `DeadlineError` at the deadline, at once."""
        call = self._open(question, timeout)
        try:
            async with asyncio.timeout(timeout):  # `wait_for` may miss that it is cancelled
                return await call.answer
        except TimeoutError:
            raise DeadlineError(f"{call.name} had no answer within {timeout:g} s", field="control_timeout") from None
        finally:
            self._waiting.pop(call.call_id, None)

    async def give_up(self, call_id: int) -> None:
        """Leave nothing of a call that was answered when nobody listened any more."""
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        answer.set_result(b"")
        await outlast(self._give_up(Call(call_id, "", -math.inf, answer), None))

    def status_in(self, reply: Reply) -> bytes:
        """The core's status, where a reply brings it: beside the answer to a change, or as that to the question."""
        call = self._waiting.get(reply.call_id)
        return reply.payload if call is not None and call.name == GetStatus.__name__ else reply.status

    def settle(self, reply: Reply) -> None:
        """The core has answered. Nothing happens if nobody waits for it any more."""
        call = self._waiting.get(reply.call_id)
        if call is None or call.answer.done():
            return
        call.has_status = bool(reply.status)
        if reply.error is not None:
            call.answer.set_exception(reply.error.to_exception())
        else:
            call.answer.set_result(reply.payload)

    def fail(self, error: Callable[[], HeadraceError]) -> None:
        """The core is gone: every call ends with an error of its own."""
        for call in self._waiting.values():
            if not call.answer.done():
                call.answer.set_exception(error())

    def _open(self, command: Callable[[int], Command], timeout: float, *, wants_status: bool = False) -> Call:
        """Send a command with its deadline."""
        self._num_calls += 1
        deadline = self._clock() + timeout
        message = command(self._num_calls)
        if not isinstance(message, (GetStatus, GiveUp, Shutdown)):
            message = msgspec.structs.replace(message, deadline=deadline, wants_status=wants_status)
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(look_at)
        call = Call(self._num_calls, type(message).__name__, deadline, answer)
        self._send(message)
        self._waiting[call.call_id] = call
        return call

    async def _is_answered(self, call: Call, answer: asyncio.Future[bytes]) -> bool:
        """Wait for `answer`; False once the core has let the deadline of `call` pass without coming to it.

        A call that the core has come to is waited for: it answers at the next boundary, and the watchdog bounds that.
        """
        while not answer.done():
            left = call.deadline + CLAIM_SECONDS - self._clock()
            if left <= 0 and not self._pulse.has_claimed(call.call_id):
                return False
            await asyncio.wait([answer], timeout=min(left, _LONGEST_WAIT) if left > 0 else None)
        return True

    async def _give_up(self, call: Call, refresh: Callable[[], Awaitable[None]] | None) -> None:
        """Have the core forget a call whose caller was cancelled."""
        try:
            telling = self._open(lambda call_id: GiveUp(call_id, call.call_id), math.inf)
        except HeadraceError:  # the core is gone and does nothing any more, or takes no commands before the deadline
            await self._is_answered(call, call.answer)
            return
        try:
            if await self._is_answered(call, telling.answer) and refresh is not None:
                await refresh()
        finally:
            self._waiting.pop(telling.call_id, None)


async def outlast(cleaning: Coroutine[Any, Any, object]) -> None:
    """Await what undoes a thing that failed or was cancelled: another cancellation does not end it."""
    task = asyncio.ensure_future(cleaning)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([task])
    if not task.cancelled():  # else the loop is being closed, and the core with it
        task.result()


def look_at(answer: asyncio.Future[Any]) -> None:
    """The error of what was given up is nobody's: asyncio need not complain that no one looked at it."""
    if not answer.cancelled():
        answer.exception()


def run_here(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """What comes of a coroutine that awaits nothing that waits, in this thread, with or without a loop."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: Result = end.value
        return result
    finally:
        coroutine.close()
    raise InternalError(f"{coroutine} waits, and nobody would wake it")
