"""Coroutines that go on in the very callback that has what they wait for. Where a request is a task of asyncio's, it
waits for a turn of the event loop to begin and for one more when its answer comes, which costs more than what a router
does in them (docs/benchmarks.md).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


class News:
    """What one coroutine at a time waits for, again and again: until `come` is called. In an `EagerCall` it goes on
    inside of `come`; a task of asyncio's may wait as well, and takes this for a future."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._asyncio_future_blocking = False  # by this a task knows a future
        self._callback: Callable[[Any], object] | None = None
        self._is_cancelled = False

    def __await__(self) -> Any:
        self._is_cancelled, self._asyncio_future_blocking = False, True
        yield self
        self.result()

    def come(self) -> None:
        """Have whoever waits go on; to be called last, as it may do anything. Within a task it goes on after that has
        given way, since no two of them can run at once."""
        callback, self._callback = self._callback, None
        if callback is None:
            return
        if asyncio.current_task(self._loop) is None:
            callback(self)
        else:
            self._loop.call_soon(callback, self)

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """As a future's."""
        return self._loop

    def add_done_callback(self, callback: Callable[[Any], object], *, context: object = None) -> None:
        """As a future's, for the one who waits."""
        self._callback = callback

    def result(self) -> None:
        """As a future's: raises `CancelledError` when the wait was given up."""
        if self._is_cancelled:
            raise asyncio.CancelledError

    def cancel(self, msg: object = None) -> bool:
        """As a future's: have whoever waits give up, soon. False when nobody does."""
        callback, self._callback = self._callback, None
        if callback is None:
            return False
        self._is_cancelled = True
        self._loop.call_soon(callback, self)
        return True


class EagerCall:
    """A coroutine that runs from `begin` on, at once, up to where it waits, for a future, a task or `News`. It is no
    task: what needs one, such as `asyncio.timeout`, it gives to a task of its own and waits for that."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop) -> None:
        self._coroutine = coroutine
        self._loop = loop
        self._awaited: Any = None
        self._is_cancelled = False

    def begin(self) -> None:
        """Run it up to where it waits first. To be called once."""
        self._go_on(None)

    def cancel(self) -> None:
        """Have `CancelledError` raised where it waits, or will wait next."""
        if self._awaited is None or not self._awaited.cancel():
            self._is_cancelled = True

    def _go_on(self, _: object) -> None:
        self._awaited = None
        try:
            if self._is_cancelled:
                self._is_cancelled = False
                awaited = self._coroutine.throw(asyncio.CancelledError())
            else:
                awaited = self._coroutine.send(None)
        except (StopIteration, asyncio.CancelledError):
            return
        self._awaited = awaited
        awaited.add_done_callback(self._go_on)
        if self._is_cancelled and awaited.cancel():
            self._is_cancelled = False
