"""Which memory tensors are named in, with an allocator and a driver made up: no device is needed to say that."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch

from headrace.engine import device_export as module
from headrace.engine.device_export import DeviceExport, ExportPlan
from headrace.engine.held_tensors import HeldTensors
from headrace.parallel import device_sharing
from headrace.types.errors import UnavailableError, WeightUpdateError
from headrace.types.weights import BufferEntry, DeviceArea

SEGMENT = 1 << 12


class Allocator:
    """Segments of SEGMENT bytes, at addresses that are multiples of it; the handle of one is its number."""

    def __init__(self) -> None:
        memory = torch.zeros(5 * SEGMENT, dtype=torch.uint8)
        skipped = -memory.data_ptr() % SEGMENT
        self.memory = memory[skipped : skipped + 4 * SEGMENT]
        self.first = self.memory.data_ptr() // SEGMENT
        self.shared = True
        self.num_asked = 0

    def at(self, offset: int, *shape: int) -> torch.Tensor:
        size = 4 * int(np.prod(shape))
        return self.memory[offset : offset + size].view(torch.float32).view(*shape)

    def allocation_of(self, address: int) -> tuple[int, int]:
        return address // SEGMENT * SEGMENT, SEGMENT

    def handle_of(self, base: int) -> bytes:
        self.num_asked += 1
        if not self.shared:
            raise UnavailableError("no", field="buffer")
        return bytes([base // SEGMENT - self.first])


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    found = Allocator()
    monkeypatch.setattr(device_sharing, "allocation_of", found.allocation_of)
    monkeypatch.setattr(device_sharing, "handle_of", found.handle_of)
    monkeypatch.setattr(module, "device_of", lambda tensor: "GPU")
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: Stream())
    return found


class Stream:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def add_all(export: DeviceExport, *tensors: Any) -> list[bool]:
    return [export.add(index, f"t{index}", each, replaces=False) for index, each in enumerate(tensors)]


def test_each_allocation_is_named_once(allocator: Allocator) -> None:
    export = DeviceExport(("GPU",), shares_process=False)
    tensors = allocator.at(2 * SEGMENT + 64, 3, 4), allocator.at(0, 5), allocator.at(2 * SEGMENT, 2)
    assert add_all(export, *tensors) == [True, True, True]
    assert export.ref.areas == (DeviceArea(b"\2", 0, SEGMENT), DeviceArea(b"\0", 0, SEGMENT))
    assert export.entries == [BufferEntry(0, 64, 0, 48), BufferEntry(1, SEGMENT, 0, 20), BufferEntry(2, 0, 0, 8)]
    assert export.ref.size == 2 * SEGMENT and allocator.num_asked == 2


def test_tensors_may_be_on_any_device_that_is_read(allocator: Allocator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several in one call each is waited for and asked in its own context."""
    entered: list[Any] = []
    waited: list[Any] = []

    def enter(device: Any) -> Any:
        entered.append(device)
        return contextlib.nullcontext()

    class Waited(Stream):
        def __init__(self, device: Any = None) -> None:
            self.device = device

        def synchronize(self) -> None:
            waited.append(self.device)

    class Lying(torch.Tensor):
        place: Any = torch.device("cuda", 0)

        @property
        def device(self) -> Any:  # type: ignore[override]
            return self.place

    monkeypatch.setattr(torch.cuda, "device", enter)
    monkeypatch.setattr(torch.cuda, "current_stream", Waited)
    monkeypatch.setattr(module, "device_of", lambda tensor: f"GPU-{tensor.device.index}")
    tensors = []
    for number, index in enumerate((0, 1, 2, 1)):
        tensors.append(allocator.at(number * SEGMENT, 4).as_subclass(Lying))
        tensors[-1].place = torch.device("cuda", index)
    export = DeviceExport(("GPU-0", "GPU-1"), shares_process=False)
    assert add_all(export, *tensors) == [True, True, False, True]
    assert export.ref.areas == tuple(DeviceArea(bytes([number]), 0, SEGMENT) for number in (0, 1, 3))
    assert [entry.offset for entry in export.entries] == [0, SEGMENT, 2 * SEGMENT]
    assert {each.index for each in entered} == {0, 1}
    export.settle()
    assert [each.index for each in waited] == [0, 1]


def test_in_one_process_storages_are_named_by_address(allocator: Allocator) -> None:
    export = DeviceExport(("GPU",), shares_process=True)
    one, other = torch.zeros(8), torch.zeros(6)
    assert add_all(export, one[2:5], other, one) == [True, True, True]
    assert export.ref.areas == (DeviceArea(b"", one.data_ptr(), 32), DeviceArea(b"", other.data_ptr(), 24))
    assert export.entries == [BufferEntry(0, 8, 0, 12), BufferEntry(1, 32, 0, 24), BufferEntry(2, 0, 0, 32)]
    assert allocator.num_asked == 0


def test_what_does_not_lie_well_is_for_others(allocator: Allocator) -> None:
    export = DeviceExport(("GPU",), shares_process=False)
    square = allocator.at(0, 4, 4)
    odd = square.t(), np.zeros(3), square[:, 1], square[:0], torch.complex(square, square).conj()
    assert add_all(export, *odd) == [False] * len(odd)
    assert add_all(export, square) == [True] and len(export.entries) == 1


def test_memory_that_is_not_shared_is_asked_for_once(allocator: Allocator) -> None:
    allocator.shared = False
    export = DeviceExport(("GPU",), shares_process=False)
    assert add_all(export, allocator.at(0, 4), allocator.at(SEGMENT, 4)) == [False, False]
    assert allocator.num_asked == 1 and not export.entries


@pytest.mark.parametrize("how", ["written", "freed"])
def test_what_is_written_to_or_freed_meanwhile_is_refused_by_name(allocator: Allocator, how: str) -> None:
    export = DeviceExport(("GPU",), shares_process=True)
    one, other = torch.zeros(8), torch.zeros(6)
    assert add_all(export, one, other) == [True, True]
    export.settle()
    export.check()
    if how == "written":
        other.add_(1.0)
    else:
        other.untyped_storage().resize_(0)
    with pytest.raises(WeightUpdateError, match="written to while it was sent") as caught:
        export.check()
    assert caught.value.field == "t1"


def test_what_went_once_goes_again_while_its_allocations_are_there(
    allocator: Allocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An allocation that is made anew at the place of another is another, whatever its address."""
    numbers = {(allocator.first + at) * SEGMENT: 10 + at for at in range(4)}
    monkeypatch.setattr(device_sharing, "allocation_id", lambda address: numbers[address])
    tensors = {"a": allocator.at(2 * SEGMENT + 64, 3, 4), "b": allocator.at(0, 5), "c": allocator.at(2 * SEGMENT, 2)}
    held = HeldTensors(tensors)
    exports = [DeviceExport(("GPU",), shares_process=False) for _ in range(2)]
    for index, (name, each) in enumerate(tensors.items()):
        assert exports[index > 0].add(index, name, each, replaces=index == 1)
    assert held.listing is not None
    plan = ExportPlan(held.listing, exports, shares_process=False)
    same = HeldTensors(tensors, held.listing)
    assert plan.fits(same.listing) and not plan.fits(HeldTensors(tensors).listing)
    again = DeviceExport.again(plan, same, shares_process=False)
    areas, starts = again.ref.areas, [SEGMENT * at for at in range(3)]
    assert areas == tuple(DeviceArea(bytes([at]), 0, SEGMENT) for at in (2, 0, 2)) and again.num_bytes == 76
    offsets = starts[0] + 64, starts[1], starts[2]
    expected = zip(offsets, (48, 20, 8), strict=True)
    assert again.entries == [BufferEntry(at, offset, 0, size) for at, (offset, size) in enumerate(expected)]
    again.check()
    tensors["b"].add_(1.0)
    with pytest.raises(WeightUpdateError, match="was written to"):
        again.check()
    numbers[allocator.first * SEGMENT] = 99
    assert not plan.fits(same.listing)
    numbers.update(dict.fromkeys(numbers, 0))
    assert not ExportPlan(held.listing, exports, shares_process=False).fits(same.listing)
