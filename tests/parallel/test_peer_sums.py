"""Ranks that share memory of devices all have it or none; what they opened is closed, whatever fails.

The ranks are threads, and the devices' memory is this process's.
"""

from __future__ import annotations

import itertools
import threading
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from headrace.parallel import Mesh, peer_sums
from headrace.parallel.communicator import GroupCommunicator
from headrace.parallel.peer_sums import PeerMemory
from headrace.types.errors import UnavailableError
from headrace.types.plan import RankLost
from headrace.types.weights import DeviceArea, DeviceRef
from tests.parallel.test_communicator import on_ranks

NUM_RANKS = 3
CPU = torch.device("cpu")


class Driver:
    """Gives and maps memory, and knows what is open. What `fails` does so where rank 1 asks for it."""

    def __init__(self, fails: str) -> None:
        self.open: list[object] = []
        self.shared: dict[bytes, Shared] = {}
        self.numbers = itertools.count(1)
        self._fails, self._failing = fails, threading.local()

    def take(self, rank: int) -> None:
        """The thread is this rank's from now on."""
        self._failing.is_one = rank == 1

    def check(self, task: str, error: type[Exception] = UnavailableError) -> None:
        if self.fails(task):
            raise error(f"no {task}")

    def fails(self, task: str) -> bool:
        return task == self._fails and bool(self._failing.is_one)


class Shared:
    def __init__(self, driver: Driver, size: int) -> None:
        driver.check("room")
        handle = bytes([next(driver.numbers)] * 64)
        self.driver, self._bytes = driver, torch.full((size,), 0x7F, dtype=torch.uint8)
        self.ref = DeviceRef((DeviceArea(handle, 0, size),))
        driver.open.append(self)
        driver.shared[handle] = self

    def view(self, offset: int, size: int) -> Tensor:
        self.driver.check("write", RuntimeError)
        return self._bytes[offset : offset + size]

    def flush(self) -> None:
        pass

    def close(self) -> None:
        _close(self.driver, self)


class Mapped:
    def __init__(self, driver: Driver, area: DeviceArea) -> None:
        driver.check("way")
        self.driver, found = driver, driver.shared[area.handle]
        if driver.fails("mark"):  # of another host, whose handles are like those of this one
            found = next(each for handle, each in driver.shared.items() if handle != area.handle)
        self.address = found._bytes.data_ptr()
        driver.open.append(self)

    def close(self) -> None:
        _close(self.driver, self)
        self.driver.check("end")


def _close(driver: Driver, memory: object) -> None:
    if memory in driver.open:
        driver.open.remove(memory)


def connected(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> list[PeerMemory | Exception | None]:
    """What each rank has of it, or what it raised."""
    memories_of = peer_sums._memories

    def gather(mesh: Mesh, values: Tensor) -> Tensor:
        driver.check("answer" if len(values) == 1 else "handle", RankLost)
        return mesh.communicator.all_gather(values)

    def memories(*arguments: Any) -> Any:
        driver.check("pinned memory", RuntimeError)
        return memories_of(*arguments)

    def connect(mesh: Mesh) -> PeerMemory | Exception | None:
        driver.take(mesh.rank)
        try:
            return PeerMemory.connect(mesh.rank, NUM_RANKS, CPU, lambda values: gather(mesh, values))
        except (RankLost, RuntimeError) as error:
            return error

    monkeypatch.setattr(peer_sums, "SharedDeviceMemory", lambda size, *_, **__: Shared(driver, size))
    monkeypatch.setattr(peer_sums, "MappedMemory", lambda area: Mapped(driver, area))
    monkeypatch.setattr(peer_sums, "_memories", memories)
    return on_ranks(NUM_RANKS, connect, 1.0)


@pytest.mark.parametrize("fails", ["room", "way", "mark"])
def test_where_one_rank_does_not_reach_another_none_has_any(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(fails)
    assert connected(monkeypatch, driver) == [None] * NUM_RANKS and not driver.open


@pytest.mark.parametrize("fails", ["write", "handle", "answer", "pinned memory"])
def test_what_breaks_off_leaves_nothing(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(fails)
    found = connected(monkeypatch, driver)
    assert f"no {fails}" in str(found[1])
    for memory in found:
        if isinstance(memory, PeerMemory):  # who had all of it before the other broke off
            memory.close()
    assert not driver.open


def test_what_cannot_be_given_back_keeps_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    class Group:
        def size(self) -> int:
            return NUM_RANKS

        def name(self) -> str:
            return "nccl"

        def abort(self) -> None:
            pass

    driver = Driver("end")
    memories = cast("list[PeerMemory]", connected(monkeypatch, driver))
    assert len(driver.open) == NUM_RANKS * NUM_RANKS
    for rank, memory in enumerate(memories):
        driver.take(rank)
        communicator, everyone = GroupCommunicator(Group(), 1.0), GroupCommunicator(Group(), 1.0)
        communicator._peers = memory
        mesh = Mesh(rank, NUM_RANKS, communicator, everyone=everyone)
        if rank == 1:
            with pytest.raises(UnavailableError):
                mesh.close()
        else:
            mesh.close()
        assert communicator._group is everyone._group is None
        assert len(driver.open) == NUM_RANKS * (NUM_RANKS - 1 - rank)
        mesh.close()
        assert memory.sums._stop.item() == 1
