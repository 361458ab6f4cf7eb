"""What a router's `/dashboard` shows: all replicas as one, and each by itself; also what one says at `/metrics`. Owns
how often they are asked.

Nobody is asked while nobody looks. Who looks gets what is known; the replicas are asked behind that, each with the
router's own key, for what is new since they were asked before.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec

from headrace import __version__
from headrace.cluster.http_parts import Head, write_head
from headrace.cluster.messages import exchange_whole
from headrace.cluster.options import RouterOptions
from headrace.cluster.replicas import RemoteReplica, Replicas
from headrace.cluster.upstream import BrokenAnswerError
from headrace.ipc.codec import DECODE_ERRORS
from headrace.server.dashboard_state import STATE_PATH, DashboardState, ReplicaView
from headrace.telemetry import POINT_FIELDS, History, HistoryPart, HistoryPoint, sum_of
from headrace.types.errors import DeadlineError, HeadraceError, UnreachableError

LOOK_SECONDS = 2.0
LINGER_SECONDS = 10.0
"""The replicas are asked for so long after somebody looked."""
ANSWER_SECONDS = 0.9
METRICS_SECONDS = 5.0
MAX_ANSWER_BYTES = 16 << 20
MAX_ASKED_PER_SECOND = 100
_MAX_AT_ONCE = 16
_OK = 200


class _Told(msgspec.Struct, frozen=True):
    """What is read of a replica's answer."""

    history: HistoryPart


class _Seen:
    """Of one replica, what it has told."""

    def __init__(self) -> None:
        self.source = ""
        self.last = 0
        self.point: HistoryPoint | None = None


class Lookout:
    """One per router. Lives on its loop."""

    def __init__(self, replicas: Replicas, options: RouterOptions) -> None:
        self._replicas = replicas
        self._key = options.data_key
        self._history = History()
        self._seen: dict[int, _Seen] = {}
        self._task: asyncio.Task[None] | None = None
        self._looked_at = 0.0

    def state(self, since: int) -> DashboardState:
        """What is new behind `since`, as far as it is known; more will be by the next look."""
        self._looked_at = asyncio.get_running_loop().time()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._look_while_wanted())
        views = [self._view(each) for each in self._replicas]
        return DashboardState(
            kind="router",
            version=__version__,
            model="",
            is_ready=any(view.is_ready for view in views),
            look_seconds=self._pace(),
            history=self._history.since(since),
            replicas=views,
        )

    async def metrics(self, replica_id: str) -> tuple[Head, bytes]:
        """What a replica answers to `/metrics`. Raises what `Replicas.find` does, and `HeadraceError` where there is no
        answer."""
        replica = self._replicas.find(replica_id)
        try:
            async with asyncio.timeout(METRICS_SECONDS):
                head = self._head(replica, b"/metrics")
                return await exchange_whole(replica.upstream, head, b"", MAX_ANSWER_BYTES)
        except TimeoutError:
            raise DeadlineError(f"{replica_id} did not tell its metrics within {METRICS_SECONDS:g} s") from None
        except BrokenAnswerError as error:
            raise UnreachableError(f"{replica_id}: {error.message}") from None

    def close(self) -> None:
        """Ask nobody any more."""
        if self._task is not None:
            self._task.cancel()

    def _pace(self) -> float:
        return max(LOOK_SECONDS, len(self._replicas) / MAX_ASKED_PER_SECOND)

    async def _look_while_wanted(self) -> None:
        loop = asyncio.get_running_loop()
        while loop.time() - self._looked_at < LINGER_SECONDS:
            began = loop.time()
            await self._look()
            await asyncio.sleep(max(0.1, self._pace() - (loop.time() - began)))

    async def _look(self) -> None:
        here = {each.number for each in self._replicas}
        self._seen = {number: seen for number, seen in self._seen.items() if number in here}
        places = asyncio.Semaphore(_MAX_AT_ONCE)
        await asyncio.gather(*(self._ask(each, places) for each in self._replicas if each.is_healthy))
        points = [seen.point for seen in self._seen.values() if seen.point is not None]
        if points:
            self._history.note_point(sum_of(points, time.time()))

    async def _ask(self, replica: RemoteReplica, places: asyncio.Semaphore) -> None:
        """One that does not answer, or is a server of another kind, has said nothing: `health` sees what is wrong."""
        seen = self._seen.setdefault(replica.number, _Seen())
        head = self._head(replica, b"%b?since=%d" % (STATE_PATH.encode(), seen.last))
        try:
            async with places, asyncio.timeout(ANSWER_SECONDS):
                answer, body = await exchange_whole(replica.upstream, head, b"", MAX_ANSWER_BYTES)
            if answer.status == _OK:
                self._take(replica, seen, msgspec.json.decode(body, type=_Told).history)
        except (TimeoutError, HeadraceError, *DECODE_ERRORS):
            return

    def _head(self, replica: RemoteReplica, target: bytes) -> bytes:
        headers = [(b"host", replica.host_header)]
        if self._key is not None:
            headers.append((b"authorization", b"Bearer " + self._key.encode()))
        return write_head(b"GET %b HTTP/1.1" % target, headers)

    def _take(self, replica: RemoteReplica, seen: _Seen, told: HistoryPart) -> None:
        if seen.source not in ("", told.source):  # the server has been started again
            seen.source, seen.last = "", 0
            return
        newest: dict[str, Any] = {name: values[-1] for name, values in told.points.items() if values}
        if newest.keys() >= set(POINT_FIELDS):
            seen.point = msgspec.convert({name: newest[name] for name in POINT_FIELDS}, HistoryPoint)
        seen.source, seen.last = told.source, told.last
        for update in told.updates:
            update.replica = replica.id
            self._history.note_update(update)
        for sample in told.samples:
            sample.replica = replica.id
            self._history.note_sample(sample)

    def _view(self, replica: RemoteReplica) -> ReplicaView:
        seen = self._seen.get(replica.number)
        return ReplicaView(
            id=replica.id,
            url=replica.url,
            is_healthy=replica.is_healthy,
            is_ready=replica.is_ready,
            ailment=replica.ailment,
            num_requests=replica.num_requests,
            num_sent=replica.num_sent,
            weight_version=replica.weight_version,
            now=None if seen is None else seen.point,
        )
