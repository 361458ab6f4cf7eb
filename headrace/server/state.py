"""What all faces of one server share. Owns its running requests, and whether new ones are let in."""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from starlette.requests import Request

from headrace.engine import AsyncEngine, GenerateItem, Stream
from headrace.engine.pacing import Pacer
from headrace.engine.runtime import Regret
from headrace.engine.stream import StreamGroup
from headrace.server.metrics import ServerMetrics
from headrace.server.options import ServerOptions
from headrace.server.waiting import WaitingCalls
from headrace.types.errors import HeadraceError

Result = TypeVar("Result")


class ServerState:
    """One per application. Lives on the engine's loop."""

    def __init__(self, engine: AsyncEngine, options: ServerOptions) -> None:
        self.engine = engine
        self.options = options
        self.metrics = ServerMetrics()
        self.calls = WaitingCalls(self.metrics.count_disconnect)
        self._pacer = Pacer()
        self.started_at = time.time()
        self.num_active = 0
        self.huge_bodies = asyncio.Lock()
        """Held while one is decoded."""
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._closers: list[Callable[[], None]] = []
        self.is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def submit(self, item: GenerateItem) -> Stream:
        """Start one sequence; it is one that `abort_all` ends."""
        stream = self.engine.submit(item)
        self._streams.add(stream)
        return stream

    def adopt(self, streams: Iterable[Stream]) -> None:
        """They are among those that `abort_all` ends."""
        self._streams.update(streams)

    def group(self, streams: Iterable[Stream]) -> StreamGroup:
        """Streams to be read as one, in turn with those of all other requests."""
        return StreamGroup(streams, self._pacer)

    async def run(
        self, request: Request, call: Coroutine[Any, Any, Result], regret: Regret[Result] | None = None
    ) -> Result:
        """The result of a control call. One whose client goes away is given up: nobody would know what it did."""
        return await self.calls.run(request, call, regret)

    def add_closer(self, closer: Callable[[], None]) -> None:
        """What ends with the server."""
        self._closers.append(closer)

    async def close(self, seconds: float) -> None:
        """Leave nothing begun that only a client of this server could finish. Waits so many seconds for either."""
        for closer in self._closers:
            closer()
        await self.calls.settle(seconds)
        dropping = self.engine.runtime.updater.abort_begun_in(self.calls.tasks)
        await asyncio.wait([asyncio.ensure_future(dropping)], timeout=seconds)

    def abort_all(self, message: str) -> None:
        """End this server's sequences, answered with what they have; the engine's other callers are left alone."""
        handles = [stream.request.handle for stream in self._streams if not stream.is_done]
        with contextlib.suppress(HeadraceError):  # a dead core has answered everything already
            self.engine.runtime.client.abort(handles, message)
        if self.engine.tokenizer is not None:
            self.engine.tokenizer.interrupt_chats()

    @property
    def model_name(self) -> str:
        return self.engine.config.served_model_name or self.engine.config.model

    @property
    def last_version(self) -> str:
        """The label of the last weights that were whole."""
        status = self.engine.runtime.client.status
        return self.engine.version if status is None else status.last_version

    @property
    def is_ready(self) -> bool:
        """True when a request that came now would start now."""
        return self.engine.is_ready and not self.is_draining

    @contextmanager
    def active(self, route: str) -> Iterator[None]:
        """One request runs inside."""
        self.num_active += 1
        self._idle.clear()
        started = time.perf_counter()
        try:
            yield
        finally:
            self.metrics.observe(route, time.perf_counter() - started)
            self.num_active -= 1
            if not self.num_active:
                self._idle.set()

    async def wait_idle(self, timeout: float) -> bool:
        """Wait until no request runs; False if some still do after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
