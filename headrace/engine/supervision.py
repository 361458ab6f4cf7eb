"""What becomes of an engine whose core has died: another core within a budget, or the end. Owns the host of the core.

The new core is the engine's own core again: same settings, same seed, paused if it was paused. It serves at once only
if the weights of the checkpoint are what was live, and their files are as they were; otherwise it needs a complete
update first. Knows no requests: they
were answered when the core died. Lives on the engine's loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import time
from collections.abc import Callable

import msgspec

from headrace.config import ResolvedConfig
from headrace.engine.client import CoreClient
from headrace.engine.core_host import CoreHost, ExecutorKind, start_core
from headrace.ipc.restarts import RestartBudget
from headrace.types.errors import EngineDeadError, HeadraceError
from headrace.types.messages import CoreReady
from headrace.weights.files import weight_files

logger = logging.getLogger(__name__)

BURIAL_SECONDS = 30.0
_LOOK_SECONDS = 0.02


class Supervisor:
    """Watches over one engine's core from its first start on. `ended` is set once there is none and will be none."""

    def __init__(
        self, host: CoreHost, client: CoreClient, resolved: ResolvedConfig, executor: ExecutorKind, max_restarts: int
    ) -> None:
        self.host = host
        self.ended: concurrent.futures.Future[HeadraceError] = concurrent.futures.Future()
        self.ended.set_running_or_notify_cancel()  # somebody who stops waiting for it does not cancel it
        self.on_restart: Callable[[CoreReady], None] | None = None
        self._client = client
        self._resolved = resolved
        self._executor: ExecutorKind = executor
        self._budget = RestartBudget(max_restarts, resolved.engine.core_restart_window)
        self._files = weight_files(resolved.folder)
        self._has_started = False
        self._revival: asyncio.Task[None] | None = None

    async def start(self) -> CoreReady:
        """Wait for the first core. Raises as `CoreClient.start`; one that dies before it was ready stays dead."""
        ready = await self._client.start(self._resolved.engine.start_timeout)
        self._has_started = True
        return ready

    def core_died(self, death: HeadraceError) -> None:
        """Called by the client, once for each core, when everybody has had his answer."""
        self.host.kill()
        if self._revival is not None and not self._revival.done():
            return  # the one that dies is being started by it
        if self._has_started and self._budget.max_restarts:
            self._revival = asyncio.get_running_loop().create_task(self._revive(death))
            self._revival.add_done_callback(self._revival_ended)
        else:
            self.end(death)

    def end(self, reason: HeadraceError) -> None:
        """There is no core any more, for good. Of any thread: the first reason stays."""
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            self.ended.set_result(reason)

    async def stop(self) -> None:
        """Start no core any more."""
        if self._revival is not None:
            self._revival.cancel()
            await asyncio.wait([self._revival])

    async def _revive(self, death: HeadraceError) -> None:
        while (delay := self._budget.take(time.monotonic())) is not None:
            logger.warning("the core is started again in %g s", delay)
            await asyncio.sleep(delay)
            try:
                await self._replace()
            except (HeadraceError, OSError) as error:
                logger.error("the core did not start again: %s", error)
                self.host.kill()
                death = type(death)(f"{death.message.partition(_THEN)[0]}{_THEN}{error}")
                self._client.end(death)
            else:
                return
        budget = self._budget
        spent = f"max_core_restarts {budget.max_restarts} in {budget.window:g} s are spent"
        death = type(death)(f"{death.message}; {spent}")
        self._client.end(death)
        self.end(death)

    def _revival_ended(self, revival: asyncio.Task[None]) -> None:
        """Nobody awaits it: a bug in it must not leave an engine that waits for its core for ever."""
        error = None if revival.cancelled() else revival.exception()
        if error is not None:
            logger.error("the core cannot be started again", exc_info=error)
            death = EngineDeadError(f"the engine core is dead and cannot be started again: {error}")
            self._client.end(death)
            self.end(death)

    async def _replace(self) -> None:
        """A new core in the place of the dead one. Raises what keeps it from starting."""
        await self._bury()
        takeover = self._client.ledger.bury()
        if takeover.is_current and weight_files(self._resolved.folder) != self._files:
            logger.error("the files in %s are not those that the dead core had loaded", self._resolved.folder)
            takeover = msgspec.structs.replace(takeover, is_current=False)
        resolved = msgspec.structs.replace(self._resolved, takeover=takeover)
        self.host, link = start_core(resolved, inprocess=False, executor=self._executor)
        self._client.attach(link, self.host.pulse)
        ready = await self._client.start(resolved.engine.start_timeout)
        if self.on_restart is not None:
            self.on_restart(ready)
        state = self._client.status.state if self._client.status is not None else ""
        logger.warning("the core has been started again", extra={"fields": {"weights": state}})

    async def _bury(self) -> None:
        """Wait until the dead core has let go of the device."""
        await self._client.detach()
        deadline = time.monotonic() + BURIAL_SECONDS
        while self.host.is_alive:
            if time.monotonic() > deadline:
                raise EngineDeadError(f"core process {self.host.pid} does not end")
            await asyncio.sleep(_LOOK_SECONDS)
        self.host.close(0.0)


_THEN = "; then it did not start again: "
