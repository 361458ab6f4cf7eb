"""Looks at every replica, each second: is it alive, would it start a request now, which weights does it hold.

Owns the rhythm and what an answer means; what follows from it is `Replicas`'. A replica that answers nothing is out
within two seconds; answers of requests never count against one.
"""

from __future__ import annotations

import asyncio

import msgspec

from headrace.cluster.http_parts import Head, write_head
from headrace.cluster.messages import INSTANCE_HEADER, exchange_whole
from headrace.cluster.replicas import RemoteReplica, Replicas
from headrace.ipc.codec import DECODE_ERRORS
from headrace.types.errors import HeadraceError

LOOK_SECONDS = 1.0
ANSWER_SECONDS = 0.9
MAX_ANSWER_BYTES = 1 << 20
WITHOUT_WEIGHTS = frozenset(("needs_weights", "poisoned"))
"""States of a replica that has nothing to answer by, as when its core was started again behind an update."""
_OK, _NOT_FOUND = 200, 404


class _Ready(msgspec.Struct):
    """What `/ready` says, of either kind."""

    weight_version: str | None = None
    message: str = "not ready"
    weights_state: str = ""


class Watch:
    """One task for each replica."""

    def __init__(self, replicas: Replicas, stuck_timeout: float) -> None:
        self._replicas = replicas
        self._stuck_timeout = stuck_timeout
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._ending: set[int] = set()

    def begin(self, replica: RemoteReplica) -> None:
        """Look at it from now on."""
        self._tasks[replica.number] = asyncio.get_running_loop().create_task(self._watch(replica))

    def end(self, replica: RemoteReplica) -> None:
        """Look at it no more, once it has answered what it was asked."""
        self._ending.add(replica.number)

    def close(self) -> None:
        """Look at none any more."""
        while self._tasks:
            self._tasks.popitem()[1].cancel()

    async def _watch(self, replica: RemoteReplica) -> None:
        loop = asyncio.get_running_loop()
        while replica.number not in self._ending or replica.num_requests:
            began = loop.time()
            await self._look(replica)
            now = loop.time()
            replica.upstream.look(now)
            since = replica.unhealthy_since
            if since is not None and now - since >= self._stuck_timeout:
                replica.upstream.cut(f"{replica.id} has not been healthy for {now - since:.0f} s: {replica.ailment}")
            await asyncio.sleep(max(0.0, LOOK_SECONDS - (now - began)))
        self._ending.discard(replica.number)
        del self._tasks[replica.number]

    async def _look(self, replica: RemoteReplica) -> None:
        loop, fence_number = asyncio.get_running_loop(), self._replicas.fence.number
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                health, _ = await _get(replica, b"/health")
                ready, body = await _get(replica, b"/ready") if health.status == _OK else (health, b"")
        except TimeoutError:
            self._replicas.set_unhealthy(replica, f"no answer within {ANSWER_SECONDS:g} s", loop.time())
            return
        except HeadraceError as error:
            self._replicas.set_unhealthy(replica, error.message, loop.time())
            return
        if health.status != _OK:
            self._replicas.set_unhealthy(replica, f"/health answers {health.status}", loop.time())
            return
        told = _read(body)
        is_ready = ready.status in (_OK, _NOT_FOUND)  # other servers have no such call
        is_news = self._replicas.fence.number == fence_number  # or it may tell of the weights before
        version = told.weight_version if ready.status == _OK and is_news else None
        has_none = is_news and told.weights_state in WITHOUT_WEIGHTS
        ailment, instance = "" if is_ready else told.message, ready.header(INSTANCE_HEADER)
        self._replicas.set_healthy(replica, ailment, version, instance, has_weights=not has_none, now=loop.time())


async def _get(replica: RemoteReplica, path: bytes) -> tuple[Head, bytes]:
    head = write_head(b"GET %b HTTP/1.1" % path, [(b"host", replica.host_header)])
    return await exchange_whole(replica.upstream, head, b"", MAX_ANSWER_BYTES)


def _read(body: bytes) -> _Ready:
    try:
        return msgspec.json.decode(body, type=_Ready)
    except DECODE_ERRORS:
        return _Ready()
