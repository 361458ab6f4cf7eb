"""Brings replicas that have no current weights to them: a peer that has them saves them to a folder that both see, in
shared memory where there is some, and the replica reads them from there. It may be chosen from then on.

Owns that folder and when this happens. Must not know processes: whoever is healthy and behind is brought up.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from headrace.cluster.asking import ReplicaAnswer, ask_each
from headrace.cluster.http_parts import own_request
from headrace.cluster.options import RouterOptions
from headrace.cluster.replicas import RemoteReplica, Replicas
from headrace.cluster.updates import WeightUpdates
from headrace.types.http import MESSAGE_TYPE, PREFIX
from headrace.types.weights import SaveReport

LOOK_SECONDS = 0.25
_PREFIX = "headrace-weights-"
REST_SECONDS = 2.0
"""After an attempt that failed."""
_SHARED_MEMORY = Path("/dev/shm")
_TYPE = (b"content-type", MESSAGE_TYPE.encode())
logger = logging.getLogger(__name__)


class WeightsFolder:
    """A folder of this host for weights on their way between replicas, until `close`. It is locked, so that the next
    one who makes one removes those of whoever was killed."""

    def __init__(self) -> None:
        home = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
        for left in home.glob(f"{_PREFIX}*"):
            _remove_if_left(left)
        self._lock: int | None = None
        while self._lock is None:  # who makes one at the same moment may have taken this for one that was left
            self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=home))
            self._lock = _lock(self.path)

    def close(self) -> None:
        """Remove it. Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder until it is closed, or its process ends; None if somebody else does, or it is
    gone, or not ours."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if folder.exists() and os.fstat(descriptor).st_uid == os.getuid():
            return descriptor
    except OSError:
        logger.debug("%s is in use", folder)
    os.close(descriptor)
    return None


def _remove_if_left(folder: Path) -> None:
    descriptor = _lock(folder)
    if descriptor is not None:
        logger.info("%s was left by a process that was killed, and is removed", folder)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


class CatchUp:
    """Looks for replicas that are behind. Lives on the router's loop."""

    def __init__(self, replicas: Replicas, updates: WeightUpdates, options: RouterOptions, folder: Path) -> None:
        self._replicas = replicas
        self._updates = updates
        self._options = options
        self._folder = folder
        self._num_failed = 0
        """Attempts: each is made with another peer."""

    async def run(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            behind = [each for each in self._replicas if each.is_healthy and not each.is_current]
            if behind and not await self._bring(behind):
                self._num_failed += 1
                await asyncio.sleep(REST_SECONDS)

    async def _bring(self, behind: list[RemoteReplica]) -> bool:
        """Whether all of them have the current weights now, or there is nobody to take them from."""
        peers = [each for each in self._replicas if each.is_ready]
        if not peers:
            return True
        number, path = self._replicas.fence.number, self._folder / "current"
        peer = peers[self._num_failed % len(peers)]
        saving = (await self._call(peer, "save_model", {"path": str(path)})).checked(SaveReport)
        try:
            if not saving.is_ok:
                logger.warning("%s did not save its weights for others: %s", peer.id, saving.value)
                return False
            version = msgspec.msgpack.decode(saving.raw, type=SaveReport).version
            if self._replicas.fence.number != number:
                return False  # another update came meanwhile
            done = await asyncio.gather(*(self._read(each, str(path), version, number) for each in behind))
            return all(done)
        finally:
            await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)

    async def _read(self, replica: RemoteReplica, path: str, version: str, number: int) -> bool:
        """Have one read what was saved, while no update reaches it."""
        async with self._updates.without(replica):
            if self._replicas.fence.number != number or not replica.is_healthy:
                return False
            ask = {"path": path, "version": version, "in_flight": "abort"}
            answer = await self._call(replica, "update_weights_from_disk", ask)
            if not answer.is_ok:
                logger.warning("%s did not take weights %r from a peer: %s", replica.id, version, answer.value)
                return False
            return self._replicas.confirm(replica, number)

    async def _call(self, replica: RemoteReplica, name: str, ask: dict[str, Any]) -> ReplicaAnswer:
        head = own_request("POST", f"{PREFIX}/{name}", _TYPE)
        bodies = {replica: msgspec.msgpack.encode(ask)}
        (answer,) = await ask_each(head, bodies, self._options.admin_key, self._options.control_timeout)
        return answer
