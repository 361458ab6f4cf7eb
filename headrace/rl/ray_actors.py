"""One replica in an actor of Ray's: an engine, and HTTP in front of it. Owns its start, also when Ray starts it again,
and its end: a core that is dead for good ends the process, or Ray would keep an actor that answers nothing.

A replica that comes after an update takes the weights of another one, tensor by tensor, before it serves. Whom it may
take them from, and whether it came in time, `ReplicaRoster` says. `RayReplicas` makes actors of it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

from headrace.engine import AsyncEngine, UpdateSession
from headrace.server import RunningServer, serve
from headrace.types.errors import HeadraceError, ShutdownError, UnavailableError, UpdateConflictError
from headrace.types.generation import Generation
from headrace.types.weights import UpdateReport

EXIT_CODE = 3
"""That of `headrace serve` whose engine is dead for good."""
PEER_SECONDS = 60.0
"""For another replica to answer, or to send one tensor."""
FAREWELL_SECONDS = 2.0
ANY_ADDRESSES = ("0.0.0.0", "::")

logger = logging.getLogger(__name__)


class ReplicaActor:
    """Replica `number` of those on `roster`, an actor's handle. `settings` are the engine's, `options` the server's."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, number: int, roster: Any, settings: dict[str, Any], options: dict[str, Any], host: str
    ) -> None:
        self._number = number
        self._roster = roster
        self._session: UpdateSession | None = None
        self._engine = AsyncEngine(**settings)
        self._failure: HeadraceError | None = None
        try:
            await self._engine.start()
            self._server = await self._serve(host, options)
            self._watch = asyncio.create_task(self._end_with_core())
        except HeadraceError as error:
            await self._engine.shutdown()
            if _was_restarted():
                _exit(f"replica {number} did not start again: {error}")
            self._failure = error  # of which `started` tells whoever made it: nobody reads that of a constructor

    async def started(self) -> str:
        """The address at which it serves. Raises what kept it from that."""
        if self._failure is not None:
            raise self._failure
        return self._server.url

    async def generate(self, *args: Any, **options: Any) -> list[Generation]:
        """As `AsyncEngine.generate`."""
        return await self._engine.generate(*args, **options)

    async def begin_update(self, version: str, options: dict[str, Any]) -> None:
        """Open an update to which `stage_update` brings the tensors."""
        self._session = await self._engine.begin_update(version, None, **options)

    async def stage_update(self, named_references: list[tuple[str, Any]]) -> None:
        """Of each tensor there is a reference to Ray's object store."""
        session = self._open_session
        await self._engine.stage(session, [(name, await reference) for name, reference in named_references])

    async def commit_update(self) -> UpdateReport:
        return await self._engine.commit(self._open_session)

    async def abort_update(self) -> None:
        """Drop the update that was begun here, if it is still open."""
        session, self._session = self._session, None
        if session is not None:
            await self._engine.abort_update(session)

    async def live(self) -> tuple[str, int]:
        """Label and epoch of the live weights. `UnavailableError` while none are whole."""
        status = await self._engine.status()
        if not status.version:
            raise UnavailableError(f"replica {self._number} has no whole weights")
        return status.version, status.epoch

    async def weight(self, name: str, epoch: int) -> Any:
        """A tensor of the live weights, if they are still those of `epoch`; `UpdateConflictError` if not."""
        tensor = await self._engine.get_weights_by_name(name)
        if (await self._engine.status()).epoch != epoch:
            raise UpdateConflictError(f"replica {self._number} has other weights by now", field="epoch")
        return tensor

    async def process_ids(self) -> tuple[int, int]:
        """Those of this process and of its core."""
        return os.getpid(), self._engine.runtime.host.pid

    async def close(self) -> None:
        """Answer what runs with what there is, and end the engine; the process stays."""
        self._watch.cancel()
        await self._engine.shutdown()

    def __ray_shutdown__(self) -> None:
        """Called by Ray before it ends this process and kills its children: so the core ends in order."""
        self._engine.close()

    @property
    def _open_session(self) -> UpdateSession:
        if self._session is None:
            raise UpdateConflictError("no update is open: this replica was started again", field="session_id")
        return self._session

    async def _serve(self, host: str, options: dict[str, Any]) -> RunningServer:
        """Listen once the weights are those of the others, and go on the list."""
        server: RunningServer | None = None
        while True:
            arrival = await self._roster.arrive.remote(self._number)
            await self._catch_up(arrival.peers, has_updates=arrival.num_updates > 0)
            if server is None:
                server = await serve(self._engine, host=host, **options)
            url = f"http://{_shown(host)}:{server.port}"
            if await self._roster.enroll.remote(self._number, _own_handle(), url, arrival.num_updates):
                server.url = url
                return server

    async def _catch_up(self, peers: list[Any], *, has_updates: bool) -> None:
        """Have the weights of one of these; the checkpoint's are right if nobody has others. Where there were updates
        and nobody is left that has them, requests are refused until the next one."""
        for peer in peers:
            try:
                version, epoch = await asyncio.wait_for(peer.live.remote(), PEER_SECONDS)
                if epoch or version != self._engine.version:
                    await self._copy_from(peer, version, epoch)
                return
            except (HeadraceError, TimeoutError, _ray_error()) as error:
                logger.warning("replica %d cannot have the weights of another one: %s", self._number, error)
        if has_updates:
            logger.error("replica %d waits for an update: nobody has the weights that were live", self._number)
            await self._engine.weights_checker("reset_tensors")

    async def _copy_from(self, peer: Any, version: str, epoch: int) -> None:
        """The next tensor is on its way while one is copied."""
        names = list(await self._engine.digest())
        session = await self._engine.begin_update(version, None, in_flight="abort")
        try:
            coming = peer.weight.remote(names[0], epoch)
            for name, following in zip(names, [*names[1:], ""], strict=True):
                tensor = await asyncio.wait_for(coming, PEER_SECONDS)
                coming = peer.weight.remote(following, epoch) if following else None
                await self._engine.stage(session, [(name, tensor)])
            report = await self._engine.commit(session)
        except BaseException:  # whatever it is, no session stays open
            await self._engine.abort_update(session)
            raise
        logger.info("replica %d has the weights %s of another one (%d)", self._number, version, report.num_tensors)

    async def _end_with_core(self) -> None:
        reason = await self._engine.wait_ended()
        if isinstance(reason, ShutdownError):
            return
        try:
            await asyncio.wait_for(self._roster.dismiss.remote(self._number), FAREWELL_SECONDS)
        except (TimeoutError, _ray_error()) as error:
            logger.warning("replica %d could not take its leave: %s", self._number, error)
        _exit(f"replica {self._number} ends: {reason}")


def _shown(host: str) -> str:
    """By which name others reach what listens at `host`."""
    import ray

    name = ray.util.get_node_ip_address() if host in ANY_ADDRESSES else host
    return f"[{name}]" if ":" in name else name


def _own_handle() -> Any:
    import ray

    return ray.get_runtime_context().current_actor


def _was_restarted() -> bool:
    import ray

    return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def _ray_error() -> type[Exception]:
    from ray.exceptions import RayError

    kind: type[Exception] = RayError
    return kind


def _exit(reason: str) -> None:
    """End the process at once, which Ray takes for a crash: it starts the actor again."""
    logger.error("%s", reason)
    logging.shutdown()
    os._exit(EXIT_CODE)
