"""A client that sends nothing more: whether it still listens. Owns when that is asked; knows no request.

TCP says the same of a client that has closed its sending side and waits for its answer, as `nc -N` and some proxies do,
and of one that is gone: only what is written to the second is answered with a reset, which the next write meets, or a
look at the socket. Interim answers are such writes (100, which clients of HTTP/1.1 skip). Once an answer has begun
there is none to ask with: whoever stops sending then, as clients do that leave a stream, is taken to be gone.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable

PROBE_SECONDS = (1.0, 10.0, 60.0)
"""From the first probe, which is at once, to the second, and so on. Few, as some clients read no more than five interim
answers, of which one is what they wait for before a body."""
VERDICT_SECONDS = 0.01
"""So soon what the first probe brought is looked at."""
LOOK_SECONDS = 0.25
"""From one look for a reset to the next: what a probe brings, or who closes a connection with something unread."""
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"


class HalfClosed:
    """Begun when the client's end has come. `probe` writes `INTERIM`, unless the answer has begun; it is called until
    `close`. `transport` is aborted once the client has reset the connection."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport, probe: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._transport = transport
        self._probe = probe
        self._waits = iter(PROBE_SECONDS)
        self._was_asked = asyncio.Event()
        self._probe_timer: asyncio.TimerHandle | None = None
        self._look_timer = loop.call_later(VERDICT_SECONDS, self._look)
        self._ask()

    async def verdict(self) -> None:
        """Wait until a client that is gone has been noticed, unless it is far away. Moments."""
        await self._was_asked.wait()

    def close(self) -> None:
        """The connection is lost, or its last answer sent."""
        if self._probe_timer is not None:
            self._probe_timer.cancel()
        self._look_timer.cancel()
        self._was_asked.set()

    def _ask(self) -> None:
        self._probe()
        self._end_if_reset()  # on the same host a reset has come by now
        wait = next(self._waits, None)
        self._probe_timer = None if wait is None else self._loop.call_later(wait, self._ask)

    def _look(self) -> None:
        self._loop.call_soon(self._was_asked.set)  # whoever waits goes on behind the loss of the connection
        self._end_if_reset()
        self._look_timer = self._loop.call_later(LOOK_SECONDS, self._look)

    def _end_if_reset(self) -> None:
        """Nothing is read any more, so that the event loop sees no reset before it writes again."""
        if self._transport.is_closing():
            return
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), 0)
        if any(events & select.POLLERR for _, events in poll.poll(0)):
            self._transport.abort()
