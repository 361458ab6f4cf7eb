"""Tensors that lie on devices, staged to two ranks of which each maps them: on CPUs that pass for devices."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.core.faults import DeviceLost
from headrace.core.rank_executor import RankExecutor
from headrace.ipc import SharedBuffer
from headrace.types.errors import UnavailableError
from headrace.types.messages import AbortUpdate, CommitUpdate, Digest, Stage
from headrace.types.weights import BufferEntry, DeviceArea, DeviceRef, UpdateReport
from tests.core.device_rank import FAULT, HERE, pass_for_device
from tests.core.harness import Core, bucket_of
from tests.core.ranks import STAGES, start_two
from tests.core.test_rank_executor import CORE, NEW, OLD, SETTINGS, Tensors, digests_of, update
from tests.core.test_rank_executor import folder as folder

Start = Callable[..., RankExecutor]


@pytest.fixture
def start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Executors of two ranks, of which the second may have a fault."""
    started: list[RankExecutor] = []
    pass_for_device(monkeypatch.setattr, HERE)
    monkeypatch.setattr("headrace.ipc.rank_spawn.RANK_MODULE", "tests.core.device_rank")

    def begin(fault: str = "", **settings: Any) -> RankExecutor:
        monkeypatch.setenv(FAULT, fault)
        started.append(start_two(folder, SETTINGS | settings))
        return started[-1]

    yield begin
    for executor in started:
        executor.close()


class Lying:
    """Tensors in two allocations, the second of which begins with what is none of them."""

    def __init__(self, tensors: Tensors) -> None:
        half, listed = len(tensors) // 2, list(tensors.values())
        gap = torch.zeros(16)
        self.buffers: list[SharedBuffer] = []
        areas, self.entries, size = [], [], 0
        for first, part in ((0, listed[:half]), (half - 1, [gap, *listed[half:]])):
            buffer, offsets = bucket_of(part)
            self.buffers.append(buffer)
            areas.append(DeviceArea(f"/proc/{os.getpid()}/fd/{buffer.descriptor}".encode(), 0, buffer.ref.size))
            places = [
                (first + number, offset)
                for number, (offset, each) in enumerate(zip(offsets, part, strict=True))
                if each is not gap
            ]
            self.entries += [BufferEntry(index, size + offset, 0, listed[index].nbytes) for index, offset in places]
            size += buffer.ref.size
        self.ref = DeviceRef(tuple(areas))

    def num_mapped(self, pid: int) -> int:
        """How often a process maps them."""
        files = {os.fstat(buffer.descriptor).st_ino for buffer in self.buffers}
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        return sum("memfd:" in line and int(line.split()[4]) in files for line in lines)


def pid_of_other(executor: RankExecutor) -> int:
    (peer,) = executor._others.peers
    return int(peer.name.split("process ")[1].rstrip(")"))


@pytest.mark.parametrize("settings", [{}, STAGES], ids=["shares", "stages"])
def test_every_rank_reads_what_lies_on_a_device_and_lets_go_of_it(start: Start, settings: Any) -> None:
    executor = start(**settings)
    core, other = Core(executor, **CORE), pid_of_other(executor)
    for tensors, mode in [(NEW, "shadow"), (OLD, "shadow"), (NEW, "inplace"), (OLD, "inplace")]:
        lying, session = Lying(tensors), core.begin(tensors, mode=mode)
        own = lying.num_mapped(os.getpid())  # by who made them
        core.call(Stage, session, lying.ref, tuple(lying.entries))
        assert lying.num_mapped(other) == 2 and lying.num_mapped(os.getpid()) == own + 2
        core.call(CommitUpdate, session, kind=UpdateReport)
        core.settle()
        assert lying.num_mapped(other) == 0 and lying.num_mapped(os.getpid()) == own
        assert core.call(Digest, kind=dict[str, str]) == digests_of(tensors)


def test_the_next_update_finds_nothing_mapped(start: Start) -> None:
    """Also after one that was aborted, where no time was to let go of it."""
    executor = start()
    core, other = Core(executor, **CORE), pid_of_other(executor)
    for _ in range(5):
        lying, session = Lying(NEW), core.begin(NEW, mode="shadow")
        core.call(Stage, session, lying.ref, tuple(lying.entries))
        core.call(AbortUpdate, session)
        update(core, OLD, "old")
        assert lying.num_mapped(other) == 0
    assert core.call(Digest, kind=dict[str, str]) == digests_of(OLD)


def test_what_one_rank_cannot_map_is_refused_by_all_and_comes_through_the_host(start: Start) -> None:
    core = Core(start("refuse"), **CORE)
    lying, session = Lying(NEW), core.begin(NEW, mode="inplace")
    refusal = core.refused(Stage, session, lying.ref, tuple(lying.entries))
    assert (refusal.code, refusal.field) == ("UnavailableError", "buffer") and "on rank 1" in refusal.message
    buffer, offsets = bucket_of(list(NEW.values()))
    entries = tuple(BufferEntry(index, offset, replaces=True) for index, offset in enumerate(offsets))
    core.call(Stage, session, buffer.ref, entries)
    core.call(CommitUpdate, session, kind=UpdateReport)
    assert core.call(Digest, kind=dict[str, str]) == digests_of(NEW)


def test_a_rank_that_dies_over_it_is_the_loss_of_all(start: Start) -> None:
    core = Core(start("die"), **CORE)
    lying, session = Lying(NEW), core.begin(NEW)
    with pytest.raises(DeviceLost, match=r"rank 1 \(process \d+\) was killed by signal 9"):
        core.call(Stage, session, lying.ref, tuple(lying.entries))


def told(executor: RankExecutor) -> tuple[str, ...]:
    return executor.weights.device_ids


def test_the_front_is_told_of_devices_that_all_ranks_read(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of none where one rank is in a caller's process, or on another host."""
    executor = start()
    assert told(executor) == ()
    monkeypatch.setattr(executor._others, "shares_process", False)
    assert told(executor) == ("GPU-0", "GPU-1")
    monkeypatch.setattr(type(executor._others), "has_far", True)
    assert told(executor) == ()
    with pytest.raises(UnavailableError, match="another host"):
        executor.weights.open_buffer(Lying(NEW).ref)
