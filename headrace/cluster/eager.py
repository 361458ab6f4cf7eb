"""Coroutines that go on in the very callback that has what they wait for. Where a request is a task of asyncio's, it
waits for a turn of the event loop to begin and for one more when its answer comes, which costs more than what a router
does in them (docs/benchmarks.md).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Context
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
        if self._is_cancelled:
            raise asyncio.CancelledError

    def come(self) -> None:
        """Have whoever waits go on, now. To be called by the loop alone, not within a task, and last of all, as it may
        do anything."""
        callback = self._callback
        if callback is not None:
            self._callback = None
            callback(self)

    def come_soon(self) -> None:
        """Have whoever waits go on in the loop's next turn."""
        callback, self._callback = self._callback, None
        if callback is not None:
            self._loop.call_soon(callback, self)

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """As a future's."""
        return self._loop

    def add_done_callback(self, callback: Callable[[Any], object], *, context: Context | None = None) -> None:
        """As a future's, for the one who waits."""
        self._callback = callback if context is None else lambda news: context.run(callback, news)

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
    """A coroutine that runs as soon as it is told to `go_on`, up to where it waits, for a future, a task or `News`. It
    is no task: what needs one, such as `asyncio.timeout`, it gives to a task of its own and waits for that."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop) -> None:
        self._coroutine = coroutine
        self._loop = loop
        self._awaited: Any = None
        self._is_cancelled = False

    def cancel(self) -> None:
        """Have `CancelledError` raised where it waits, or will wait next."""
        if self._awaited is None or not self._awaited.cancel():
            self._is_cancelled = True

    def go_on(self, _: object = None) -> None:
        """Run it up to where it waits next. To be called once; then it goes on by itself."""
        self._awaited = None
        try:
            if self._is_cancelled:
                self._is_cancelled = False
                awaited = self._coroutine.throw(asyncio.CancelledError())
            else:
                awaited = self._coroutine.send(None)
        except (StopIteration, asyncio.CancelledError):
            return
        if awaited is None:  # it only gives way
            self._loop.call_soon(self.go_on)
            return
        self._awaited = awaited
        awaited.add_done_callback(self.go_on)
        if self._is_cancelled and awaited.cancel():
            self._is_cancelled = False
