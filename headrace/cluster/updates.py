"""Calls that bring weights, SGLang's dialect: each goes to all healthy replicas, and ends with a fence.

An update has succeeded if one replica has it: those that have not leave the rotation before the call is answered, so
that from then on nobody is answered by older weights. Owns which replicas have dropped out of an update that comes in
several calls, and how such a call is answered. What a tensor is, nobody here knows.
"""

from __future__ import annotations

import asyncio
import binascii
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Sequence
from typing import Any, TypeVar

import msgspec

from headrace.cluster.asking import ReplicaAnswer, ask_each, failure_of, said_alike
from headrace.cluster.exchange import Exchange
from headrace.cluster.fan_out import reply_json
from headrace.cluster.http_parts import Head, own_request
from headrace.cluster.metrics import RouterMetrics
from headrace.cluster.options import RouterOptions
from headrace.cluster.replicas import RemoteReplica, Replicas
from headrace.ipc.codec import DECODE_ERRORS
from headrace.types.errors import UnreachableError, WeightUpdateError
from headrace.weights.foreign import read_payload
from headrace.weights.foreign_files import count_up

_BUCKET = "/update_weights_from_tensor"
_LABEL = "/update_weight_version"
_END = "/end_weight_update"
_FINISH = "/finish_weight_update"
_RECEIVE = frozenset(("/update_weights_from_distributed", "/update_weights"))
"""Tensors that are broadcast."""
_PARTS = _RECEIVE | {_BUCKET, _END, _FINISH}
_COMMITS = frozenset(("/update_weights_from_disk", _LABEL, _END, _FINISH))
_MAY_COMMIT = _COMMITS | _RECEIVE | {_BUCKET}
_GIVE_UP_SECONDS = 5.0
_JSON = (b"content-type", b"application/json")
Result = TypeVar("Result")
logger = logging.getLogger(__name__)


class _Body(msgspec.Struct):
    """What a body says of these."""

    weight_version: str | int | None = None
    new_version: str | int | None = None
    serialized_named_tensors: Any = None


class WeightUpdates:
    """The updates of all replicas together."""

    def __init__(self, replicas: Replicas, options: RouterOptions, metrics: RouterMetrics) -> None:
        self._replicas = replicas
        self._options = options
        self._metrics = metrics
        self._dropped: set[RemoteReplica] = set()
        """They have failed in the update that is open, and get no more of it."""
        self._label: str | None = None
        self._left_out: set[RemoteReplica] = set()
        self._num_asking = 0
        self._is_quiet = asyncio.Event()
        self._is_quiet.set()
        self._turn = asyncio.Lock()
        self._committing: asyncio.Future[Any] | None = None

    @property
    def replicas(self) -> list[RemoteReplica]:
        """Those that an update which begins now goes to. `UnreachableError` if there is none."""
        taking_part = self.taking_part
        if not taking_part:
            raise UnreachableError("no replica is healthy: GET /workers says why")
        return taking_part

    @property
    def taking_part(self) -> list[RemoteReplica]:
        """The same, or none."""
        return [each for each in self._replicas if each.is_healthy and each not in self._left_out]

    @property
    def current(self) -> list[RemoteReplica]:
        """Those of them whose weights are current: another label, or new values of some tensors only, are for no
        others. `UnreachableError` if there is none."""
        current = [each for each in self.replicas if each.is_current]
        if not current:
            raise UnreachableError("no healthy replica holds the current weights: push all of them again")
        return current

    async def ask(self, head: Head, bodies: dict[RemoteReplica, bytes]) -> list[ReplicaAnswer]:
        """What each answers to a call of an update."""
        self._num_asking += 1
        self._is_quiet.clear()
        try:
            return await ask_each(head, bodies, self._options.admin_key, self._options.control_timeout)
        finally:
            self._num_asking -= 1
            if not self._num_asking:
                self._is_quiet.set()

    @contextlib.asynccontextmanager
    async def without(self, replica: RemoteReplica) -> AsyncIterator[None]:
        """No call of an update is at the replica inside, nor will be."""
        while self._num_asking:
            await self._is_quiet.wait()
        self._left_out.add(replica)
        try:
            yield
        finally:
            self._left_out.discard(replica)

    async def carry_out(self, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """What may make weights live: one after the other, so that all replicas see the same order, and to its end. If
        its client goes away meanwhile some replicas may have the weights, and the others have to follow, or to leave
        the rotation."""
        await self._turn.acquire()
        self._committing = asyncio.ensure_future(work())
        self._committing.add_done_callback(self._end_turn)
        return await asyncio.shield(self._committing)

    def close(self) -> None:
        """Carry out nothing more."""
        if self._committing is not None:
            self._committing.cancel()

    def _end_turn(self, done: asyncio.Future[Any]) -> None:
        self._committing = None
        self._turn.release()
        if not done.cancelled() and (error := done.exception()) is not None:
            logger.info("a call that brings weights failed: %s", error)  # perhaps nobody waits for it any more

    async def command(self, head: Head, body: bytes, exchange: Exchange) -> None:
        """A call. It fails if it does at all replicas."""
        told = await self.told(head, body)
        if told["success"]:
            reply_json(exchange, told)
        else:
            exchange.error(told)

    async def told(self, head: Head, body: bytes, members: Sequence[RemoteReplica] | None = None) -> dict[str, Any]:
        """What the client of a call is told. `members` are the replicas that a trainer broadcasts to; None: it does
        not, and the call is for all."""
        work = functools.partial(self._update, head, body, members)
        return await (self.carry_out(work) if head.path in _MAY_COMMIT else work())

    def _taking(self, path: str, members: Sequence[RemoteReplica] | None) -> Sequence[RemoteReplica]:
        """Who a call goes to. What is broadcast all members have to receive, also one whose update has failed."""
        if members is not None and path in _RECEIVE:
            return members
        taking = self.current if path == _LABEL else members or self.replicas
        return [each for each in taking if each not in self._dropped] or taking

    async def _update(self, head: Head, body: bytes, members: Sequence[RemoteReplica] | None = None) -> dict[str, Any]:
        asked = _read(body)
        self._begin_if_new(head.path, asked)
        taking = self._taking(head.path, members)
        if head.path == _BUCKET:
            await asyncio.to_thread(_share, asked.serialized_named_tensors, len(taking) - 1)
        answers = await self.ask(head, dict.fromkeys(taking, body))
        good = [each for each in answers if each.is_ok]
        if not good:
            self._dropped.clear()
            results = [each.shown() for each in answers]
            return {**failure_of(answers, len(answers)), "success": False, "results": results}
        reports = {each.replica: _report_of(each) for each in good}
        live = [replica for replica, report in reports.items() if report is not None or head.path in _COMMITS]
        if live:
            version = _version_of(reports.values()) or asked.new_version or self._label
            self.commit(None if version is None else str(version), live)
        else:
            self._dropped |= {each.replica for each in answers if not each.is_ok}
        kept = set(live) or {each.replica for each in answers if each.is_ok or each.is_conflict}
        await self.give_up({each.replica for each in answers} - kept)
        return _told(answers, good, [each for each in reports.values() if each is not None])

    def commit(self, version: str | None, live: Collection[RemoteReplica]) -> None:
        """An update has returned at these replicas: the fence."""
        self._dropped.clear()
        self._label = None
        behind = self._replicas.pass_fence(version, live)
        self._metrics.updates.inc()
        logger.info("weights %r are live at %d replicas, %d fell behind", version, len(live), len(behind))

    async def give_up(self, replicas: Collection[RemoteReplica]) -> None:
        """Have those that failed drop what they have of the update, or the next one would find it there."""
        head = own_request("POST", "/abort_weight_update", _JSON)
        bodies = {each: b"{}" for each in replicas if each.is_healthy}
        answers = await ask_each(head, bodies, self._options.admin_key, _GIVE_UP_SECONDS)
        for each in answers:
            if not each.is_ok:
                logger.info("%s did not drop its update: %s", each.replica.id, each.value)

    def _begin_if_new(self, path: str, asked: _Body) -> None:
        """Another label, or a call that is no part of an update in buckets, is for all replicas again."""
        label = None if asked.weight_version is None else str(asked.weight_version)
        if path not in _PARTS or label not in (None, self._label):
            self._dropped.clear()
        self._label = label or self._label


def _read(body: bytes) -> _Body:
    """What cannot be read the replicas refuse."""
    try:
        return msgspec.json.decode(body, type=_Body)
    except DECODE_ERRORS:
        return _Body()


def _report_of(answer: ReplicaAnswer) -> dict[str, Any] | None:
    """What an update did that this call has completed."""
    value = answer.value
    report = value.get("report") if isinstance(value, dict) else None
    return report if isinstance(report, dict) else None


def _version_of(reports: Collection[dict[str, Any] | None]) -> str | None:
    return next((report["version"] for report in reports if report and "version" in report), None)


def _told(
    answers: Sequence[ReplicaAnswer], good: Sequence[ReplicaAnswer], reports: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """What the client is told: what all that succeeded said alike, the first report, and who failed."""
    told = {"success": True, **said_alike([each.value for each in good])}
    if reports:
        told["report"] = reports[0]
    failed = [each.replica.id for each in answers if not each.is_ok]
    return {**told, "failed_replicas": failed, "results": [each.shown() for each in answers]}


def _share(payloads: Any, num_more: int) -> None:
    """Memory of the sender's that a payload names was sent to one receiver, and there are more. Where it is not of this
    host, or no payload, the replicas say so."""
    for payload in payloads if isinstance(payloads, list) and num_more > 0 else ():
        try:
            count_up(read_payload(binascii.a2b_base64(payload)), num_more)
        except (WeightUpdateError, ValueError, TypeError) as error:
            logger.debug("a payload's files are not shared: %s", error)
