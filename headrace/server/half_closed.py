"""A client that sends nothing more: whether it still listens. Owns when that is asked; knows no request.

TCP says the same of a client that has closed its sending side and waits for its answer, as `nc -N` and some proxies do,
and of one that is gone: only what is written to the second is answered with a reset, which the next write meets.
Interim answers are such writes (100, which clients of HTTP/1.1 skip). Once an answer has begun there is none to ask
with: whoever stops sending then, as clients do that leave a stream, is taken to be gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

PROBE_SECONDS = (0.01, 1.0, 30.0)
"""Between one probe and the next, behind two at once: on the same host the second meets the reset. Few, as some clients
read no more than five interim answers."""
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"


class HalfClosed:
    """Begun when the client's end has come. `probe` writes `INTERIM`, unless the answer has begun; it is called until
    `close`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, probe: Callable[[], None]) -> None:
        self._loop = loop
        self._probe = probe
        self._waits = iter(PROBE_SECONDS)
        self._was_asked = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._probe()
        self._ask()

    async def verdict(self) -> None:
        """Wait until a client that is gone has been noticed, unless it is far away. Moments."""
        await self._was_asked.wait()

    def close(self) -> None:
        """The connection is lost, or its last answer sent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._was_asked.set()

    def _ask(self) -> None:
        if self._timer is not None:  # the second time, or a later one
            self._loop.call_soon(self._was_asked.set)  # behind the loss of the connection, if this causes it
        self._probe()
        wait = next(self._waits, None)
        self._timer = None if wait is None else self._loop.call_later(wait, self._ask)
