"""What a device maps of other processes: each allocation once, until its update is over. The driver is made up."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch

from headrace.ipc import SharedBuffer
from headrace.types.errors import RequestError, UnavailableError
from headrace.types.weights import DeviceArea, DeviceRef
from headrace.weights import stage_buffers as module
from headrace.weights.memory import StageBuffer
from headrace.weights.stage_buffers import DeviceBuffers

CPU = torch.device("cpu")
ONE, OTHER = DeviceArea(b"1", 0, 8), DeviceArea(b"2", 4, 4)


class Mapped:
    open: list[DeviceArea]
    closed: list[DeviceArea]

    def __init__(self, area: DeviceArea) -> None:
        if area.handle == b"0":
            raise UnavailableError("gone", field="buffer")
        self.area = area
        self._bytes = torch.arange(area.size, dtype=torch.uint8) + 10 * int(area.handle)
        self.address = self._bytes.data_ptr()
        Mapped.open.append(area)

    def close(self) -> None:
        Mapped.closed.append(self.area)


def values_of(buffer: StageBuffer, offset: int, size: int) -> list[int]:
    found = buffer.part(offset, size)
    assert found.nbytes == size and found.device == CPU
    values: list[int] = found.view(torch.uint8).tolist()
    return values


class Cudart:
    def __init__(self) -> None:
        self.pinned: list[int] = []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.pinned.append(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.pinned.remove(address)
        return 0


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Cudart:
    found = Cudart()
    Mapped.open, Mapped.closed = [], []
    monkeypatch.setattr(module, "MappedMemory", Mapped)
    monkeypatch.setattr(module, "same_context", lambda: lambda: None)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: found)
    return found


def test_areas_count_as_one_after_the_other_and_are_mapped_once(cudart: Cudart) -> None:
    buffers = DeviceBuffers(CPU, lambda: None)
    buffer = buffers.open(DeviceRef((ONE, OTHER)))
    assert values_of(buffer, 9, 2) == [21, 22]
    assert values_of(buffer, 0, 8) == list(range(10, 18))
    again = buffers.open(DeviceRef((OTHER, ONE)))
    assert values_of(again, 3, 1) == [23] and values_of(again, 4, 1) == [10]
    assert Mapped.open == [ONE, OTHER]
    for offset, size in ((7, 2), (0, 9), (8, 5)):
        with pytest.raises(RequestError, match="not in one area"):
            buffer.part(offset, size)


def test_what_an_update_has_mapped_is_let_go_of_after_it_in_slices(cudart: Cudart) -> None:
    """What could not be mapped is refused when it is asked for, and nothing is left of it."""
    buffers = DeviceBuffers(CPU, lambda: None)
    assert not buffers.let_go(0.0)
    buffer = buffers.open(DeviceRef((ONE, DeviceArea(b"0", 0, 4), OTHER)))
    buffer.part(12, 1).data_ptr()
    with pytest.raises(UnavailableError, match="gone"):
        buffer.part(8, 1).data_ptr()
    buffer.close()
    assert not buffers.let_go(math.inf) and Mapped.closed == []
    buffers.close()
    assert buffers.let_go(0.0) and Mapped.closed == [ONE]
    assert not buffers.let_go(0.0) and Mapped.closed == [ONE, OTHER]


def test_what_is_not_mapped_yet_when_the_update_ends_never_is(cudart: Cudart, monkeypatch: pytest.MonkeyPatch) -> None:
    is_over = threading.Event()
    start = Mapped.__init__

    def slow(memory: Mapped, *call: Any) -> None:
        is_over.wait(10.0)
        start(memory, *call)

    monkeypatch.setattr(Mapped, "__init__", slow)
    buffers = DeviceBuffers(CPU, is_over.set)
    buffers.open(DeviceRef((ONE, OTHER)))
    buffers.close()
    buffers.let_go(math.inf)
    assert Mapped.closed == Mapped.open and len(Mapped.open) <= 2
    buffers.open(DeviceRef((OTHER,))).part(0, 1).data_ptr()
    assert Mapped.open[-1] == OTHER


def test_at_the_end_nothing_is_left(cudart: Cudart) -> None:
    before = set(threading.enumerate())
    buffers = DeviceBuffers(CPU, lambda: None)
    buffers.open(DeviceRef((ONE, OTHER))).part(8, 1).data_ptr()
    with SharedBuffer.create(16) as shared:
        buffers.open(shared.ref)
        buffers.end()
    assert Mapped.closed == [ONE, OTHER] and cudart.pinned == []
    assert set(threading.enumerate()) <= before


def test_memory_of_this_process_is_read_by_its_address(cudart: Cudart) -> None:
    values = torch.arange(16, dtype=torch.uint8)
    buffers = DeviceBuffers(CPU, lambda: None)
    buffer = buffers.open(DeviceRef((ONE, DeviceArea(b"", values.data_ptr() + 4, 8))))
    assert values_of(buffer, 8 + 2, 3) == [6, 7, 8] and values_of(buffer, 0, 1) == [10]
    buffers.close()
    assert not buffers.let_go(math.inf) and Mapped.closed == [ONE]


def test_memory_of_the_host_stays_pinned_while_updates_use_it(cudart: Cudart) -> None:
    """It is known by its file: another one may come to have its path."""
    buffers = DeviceBuffers(CPU, lambda: None)
    shared = SharedBuffer.create(16)
    for _ in range(3):
        shared.view[:4] = b"abcd"
        opened = buffers.open(shared.ref)
        assert bytes(opened.part(1, 3).tolist()) == b"bcd" and len(cudart.pinned) == 1
        opened.close()
        buffers.close()
    first, ref = cudart.pinned[0], shared.ref
    shared.close()
    other = SharedBuffer.create(16)
    assert other.ref == ref
    other.view[:4] = b"efgh"
    assert bytes(buffers.open(other.ref).part(0, 4).tolist()) == b"efgh"
    buffers.close()
    assert len(cudart.pinned) == 1 and cudart.pinned != [first]
    buffers.close()
    assert cudart.pinned == []
    other.close()


def test_memory_that_cannot_be_pinned_is_refused(cudart: Cudart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudart, "cudaHostRegister", lambda *_: 2, raising=False)
    with SharedBuffer.create(16) as shared, pytest.raises(UnavailableError, match="cannot be pinned: error 2"):
        DeviceBuffers(CPU, lambda: None).open(shared.ref)
