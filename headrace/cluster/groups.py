"""A trainer's process group over all replicas: one address is joined by the ranks of every replica behind it, in
SGLang's calls and in vLLM's. Owns which replicas are in which group, and what each is told of its place.

What is broadcast reaches whoever is in the group, so each call of an update goes to all of them at once, and ends with
the fence of `WeightUpdates`. A replica that came, or was started again, after a group was made is not in it: it falls
behind with the next update, takes the weights from a peer where that is to be had, and is in the group that is made
next.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from headrace.cluster.asking import ReplicaAnswer, ask_each, failure_of, said_alike
from headrace.cluster.exchange import Exchange
from headrace.cluster.fan_out import reply_json
from headrace.cluster.http_parts import Head
from headrace.cluster.options import RouterOptions
from headrace.cluster.replicas import RemoteReplica, Replicas
from headrace.cluster.updates import WeightUpdates
from headrace.ipc.codec import DECODE_ERRORS
from headrace.server.errors import body_of
from headrace.types.errors import HeadraceError, UpdateConflictError
from headrace.types.weights import DEFAULT_GROUP, TRANSFER_GROUP

_INIT, _TRANSFER_INIT = "/init_weights_update_group", "/init_weight_transfer_engine"
_DESTROY, _WORLD_SIZE = "/destroy_weights_update_group", "/get_world_size"
_FINISH = "/finish_weight_update"
_OF_TRANSFER = frozenset((_TRANSFER_INIT, "/start_weight_update", "/update_weights", _FINISH))
_FORGET_SECONDS = 10.0
_LOOK_SECONDS = 0.2
GRACE_SECONDS = 3.0
"""For members to end a call in which another one died, before the group is ended at them."""
_MAX_DIGITS = 9
logger = logging.getLogger(__name__)


class _Size(msgspec.Struct):
    world_size: int


class _Place(msgspec.Struct, frozen=True):
    """Where a body says that its ranks begin, and how many the group has."""

    rank_offset: int
    world_size: int


class SharedGroup:
    """Replicas that are in one group, as the processes that they were then."""

    def __init__(self, members: Sequence[RemoteReplica]) -> None:
        self.members = [(each, each.instance) for each in members]
        self.is_broken = False
        """A member has failed in an update: perhaps it is not in the group any more."""

    @property
    def present(self) -> list[RemoteReplica]:
        """Those that are still there."""
        return [each for each, instance in self.members if each.is_healthy and each.instance == instance]

    @property
    def gone(self) -> list[str]:
        """The names of the others."""
        present = self.present
        return [each.id for each, _ in self.members if each not in present]


class SharedGroups:
    """The groups of all trainers. Lives on the router's loop."""

    def __init__(self, replicas: Replicas, updates: WeightUpdates, options: RouterOptions) -> None:
        self._replicas = replicas
        self._updates = updates
        self._options = options
        self._groups: dict[str, SharedGroup] = {}
        self._joining: set[str] = set()

    async def command(self, head: Head, body: bytes, exchange: Exchange) -> None:
        """One of these calls."""
        values = _read(body)
        name = TRANSFER_GROUP if head.path in _OF_TRANSFER else str(values.get("group_name", DEFAULT_GROUP))
        try:
            if head.path == _WORLD_SIZE:
                told = await self._world_size(head)
            elif head.path in (_INIT, _TRANSFER_INIT):
                told = await self._init_once(head, name, values, body)
            elif head.path == _DESTROY:
                told = await self._destroy(head, name, body)
            else:
                told = await self._update(head, name, values, body)
        except _FailedError as failed:
            told = failed.told()
        except HeadraceError as error:
            told = {**body_of(error), "success": False}
        if told.get("success"):
            reply_json(exchange, told)
        else:
            exchange.error(told)

    async def _world_size(self, head: Head) -> dict[str, Any]:
        sizes = await self._sizes(head, self._updates.replicas)
        results = [{"id": each.id, "url": each.url, "world_size": size} for each, size in sizes.items()]
        return {"success": True, "world_size": sum(sizes.values()), "results": results}

    async def _sizes(self, head: Head, replicas: Sequence[RemoteReplica]) -> dict[RemoteReplica, int]:
        """How many ranks each has."""
        asked = head.changed(method="GET", target=_WORLD_SIZE.encode())
        bodies = dict.fromkeys(replicas, b"")
        answers = await ask_each(asked, bodies, self._options.data_key, self._options.control_timeout)
        sizes: dict[RemoteReplica, int] = {}
        for each in answers:
            with contextlib.suppress(*DECODE_ERRORS):
                if each.is_ok:
                    sizes[each.replica] = msgspec.json.decode(each.raw, type=_Size).world_size
        if len(sizes) < len(answers):
            raise _FailedError([each for each in answers if each.replica not in sizes], answers)
        return sizes

    async def _init_once(self, head: Head, name: str, values: dict[str, Any], body: bytes) -> dict[str, Any]:
        """As at a server: what is joined has to be destroyed first, and is not harmed by who does not know of it. Of
        vLLM's trainers a later one takes the place of the one before."""
        group = self._groups.get(name)
        if head.path == _INIT and group is not None and not (group.is_broken or group.gone):
            raise UpdateConflictError(f"weight group {name!r} is joined; destroy it first", field="group_name")
        if head.path == _INIT and name in self._joining:
            raise UpdateConflictError(f"weight group {name!r} is being joined", field="group_name")
        self._joining.add(name)
        try:
            return await self._init(head, name, values, body)
        finally:
            self._joining.discard(name)

    async def _init(self, head: Head, name: str, values: dict[str, Any], body: bytes) -> dict[str, Any]:
        """All healthy replicas join at once, each behind the ranks of those before it."""
        sizes = await self._sizes(head, self._updates.replicas)
        bodies = dict.fromkeys(sizes, body)
        is_transfer = head.path == _TRANSFER_INIT
        info = values.get("init_info") if is_transfer else values
        place = _place_of(info, {"rank_offset": 1, "world_size": 2} if is_transfer else {})
        if place is not None and isinstance(info, dict):  # else each says what is wrong with it
            total = sum(sizes.values())
            room = place.world_size - place.rank_offset
            if total > room:
                message = f"the replicas have {total} ranks, and world_size leaves {max(0, room)} for them: ask again"
                raise UpdateConflictError(f"{message} ({_WORLD_SIZE})", field="world_size")
            offset = place.rank_offset
            for replica, size in sizes.items():
                own = {**info, "rank_offset": offset}
                bodies[replica] = msgspec.json.encode({**values, "init_info": own} if is_transfer else own)
                offset += size
        await self._forget_if_broken(head, name)
        answers = await self._join(head, name, bodies)
        failed = [each for each in answers if not each.is_ok]
        if failed:
            raise _FailedError(failed, answers)
        self._groups[name] = SharedGroup(list(sizes))
        logger.info("group %r has the ranks of %s", name, ", ".join(each.id for each in sizes))
        return {**_success(answers), "world_size": sum(sizes.values()), **self._outside(list(sizes))}

    async def _join(self, head: Head, name: str, bodies: Mapping[RemoteReplica, bytes]) -> list[ReplicaAnswer]:
        """What each answers. When one fails the others wait for it in vain, and are told so."""
        tasks = {each: asyncio.ensure_future(self._ask(head, {each: body})) for each, body in bodies.items()}
        waiting = set(tasks.values())
        try:
            while waiting:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if not all(answer.is_ok for each in done for answer in each.result()):
                    await self._forget(head, name, [replica for replica, task in tasks.items() if task in waiting])
                    break
            return [answer for each in tasks.values() for answer in await each]
        finally:
            for each in tasks.values():
                each.cancel()

    async def _update(self, head: Head, name: str, values: dict[str, Any], body: bytes) -> dict[str, Any]:
        """Without a group the replicas say that there is none; a folder needs none."""
        group = self._groups.get(name)
        if group is None or (head.path == "/update_weights" and values.get("update_info") is None):
            return await self._updates.told(head, body)
        gone = group.gone
        if gone and head.path != _FINISH:  # its end needs nobody who is gone
            group.is_broken = True
            message = f"{', '.join(gone)} of group {name!r} is gone: make the group again, with those that are there"
            raise UpdateConflictError(message, field="group_name")
        watching = asyncio.ensure_future(self._end_if_one_dies(head, name, group))
        try:
            told = await self._updates.told(head, body, group.present)
        finally:
            watching.cancel()
        if not told["success"] or told["failed_replicas"]:
            group.is_broken = True
        return {**told, **self._outside([each for each, _ in group.members])}

    async def _end_if_one_dies(self, head: Head, name: str, group: SharedGroup) -> None:
        """Others may have had all of a broadcast; if not, they wait for it in vain."""
        while not group.gone:
            await asyncio.sleep(_LOOK_SECONDS)
        await asyncio.sleep(GRACE_SECONDS)
        group.is_broken = True
        await self._forget(head, name, group.present)

    async def _destroy(self, head: Head, name: str, body: bytes) -> dict[str, Any]:
        """It succeeds if one has left the group: those that are gone have."""
        group = self._groups.pop(name, None)
        present = self._updates.replicas if group is None else group.present
        answers = await self._ask(head, dict.fromkeys(present, body))
        failed = [each for each in answers if not each.is_ok]
        if answers and len(failed) == len(answers):
            raise _FailedError(failed, answers)
        return _success(answers)

    async def _forget_if_broken(self, head: Head, name: str) -> None:
        """A group that cannot be used any more gives way to one of its name."""
        group = self._groups.get(name)
        if group is not None and (group.is_broken or group.gone):
            del self._groups[name]
            await self._forget(head, name, group.present)

    async def _forget(self, head: Head, name: str, replicas: Sequence[RemoteReplica]) -> None:
        """Have these leave a group, where they are in it."""
        leaving = head.changed(target=_DESTROY.encode())
        bodies = dict.fromkeys(replicas, msgspec.json.encode({"group_name": name}))
        for each in await ask_each(leaving, bodies, self._options.admin_key, _FORGET_SECONDS):
            logger.info("group %r is over at %s: %s", name, each.replica.id, each.value)

    async def _ask(self, head: Head, bodies: Mapping[RemoteReplica, bytes]) -> list[ReplicaAnswer]:
        return await ask_each(head, bodies, self._options.admin_key, self._options.control_timeout)

    def _outside(self, members: Sequence[RemoteReplica]) -> dict[str, list[str]]:
        """Who is, and who is not in a group, as the trainer is told."""
        others = [each.id for each in self._replicas if each not in members and not each.is_another_name]
        return {"replicas": [each.id for each in members], "replicas_not_in_group": others}


class _FailedError(Exception):
    """A call failed at some of those that were asked."""

    def __init__(self, failed: Sequence[ReplicaAnswer], answers: Sequence[ReplicaAnswer]) -> None:
        super().__init__()
        self._failed = failed
        self._answers = answers

    def told(self) -> dict[str, Any]:
        """The error body."""
        results = [each.shown() for each in self._answers]
        return {**failure_of(self._failed, len(self._answers)), "success": False, "results": results}


def _success(answers: Sequence[ReplicaAnswer]) -> dict[str, Any]:
    alike = said_alike([each.value for each in answers]) if answers else {}
    return {**alike, "success": True, "results": [each.shown() for each in answers]}


def _read(body: bytes) -> dict[str, Any]:
    """What cannot be read the replicas refuse."""
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except DECODE_ERRORS:
        return {}


def _place_of(info: Any, defaults: Mapping[str, int]) -> _Place | None:
    """None where there is none to be read."""
    if not isinstance(info, dict):
        return None
    found = [_integer(info.get(name, defaults.get(name))) for name in _Place.__struct_fields__]
    return None if None in found else _Place(*found)  # type: ignore[arg-type]


def _integer(value: Any) -> int | None:
    """Frameworks send numbers as text, too."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= _MAX_DIGITS:
        return int(value)
    return value if type(value) is int else None
