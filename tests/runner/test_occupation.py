"""Blocks of memory: where tensors lie in them, what is left after a resume, and which calls the driver sees."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.runner.device_block import AddressRange
from headrace.runner.host_block import HostBlock
from headrace.runner.occupation import Occupation
from headrace.types.errors import UnavailableError
from headrace.types.memory import MEMORY_TAGS
from headrace.types.plan import RankLost

CPU = torch.device("cpu")
SHAPES = [((3, 5), torch.float32), ((7,), torch.bfloat16), ((), torch.float16), ((0, 4), torch.float32)]
UNIT = 2 << 20


def exhaust(slices: Any) -> None:
    for _ in slices:
        pass


def resident_pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


def test_tensors_of_a_block_are_zero_aligned_and_apart() -> None:
    occupation = Occupation(CPU, is_saver=False)
    tensors = occupation.allocate("weights", SHAPES)
    assert [(tuple(each.shape), each.dtype) for each in tensors] == SHAPES
    assert all(each.data_ptr() % 64 == 0 and each.is_contiguous() and not each.any() for each in tensors)
    for number, each in enumerate(tensors):
        each.fill_(number + 1)
    assert all((each == number + 1).all() for number, each in enumerate(tensors))


def test_addresses_stay_and_what_was_there_comes_back() -> None:
    occupation = Occupation(CPU, is_saver=False)
    weights, pool = occupation.allocate("weights", SHAPES), occupation.zeros("kv_cache", (1 << 20,), torch.float32)
    for each in (*weights, pool):
        each.fill_(2.0)
    addresses = [each.data_ptr() for each in (*weights, pool)]
    exhaust(occupation.release(["weights"], keeps_copy=True))
    exhaust(occupation.release(["kv_cache"], keeps_copy=False))
    exhaust(occupation.resume(["kv_cache"], "await"))
    exhaust(occupation.resume(["weights"], "copy"))
    assert [each.data_ptr() for each in (*weights, pool)] == addresses
    assert all((each == 2.0).all() for each in weights) and not pool.any()
    exhaust(occupation.release(["weights"], keeps_copy=True))
    coming = occupation.resume(["weights"], "copy")
    next(coming)
    coming.close()
    assert not any(each.any() for each in weights)  # it is the system's again
    exhaust(occupation.resume(["weights"], "copy"))
    assert all((each == 2.0).all() for each in weights)
    exhaust(occupation.release(["weights"], keeps_copy=False))
    exhaust(occupation.resume(["weights"], "await"))
    assert not any(each.any() for each in weights)


class FakeGraphs:
    """Three graphs. `shortage` is how many are captured before memory does not suffice."""

    def __init__(self) -> None:
        self.num_held = 3
        self.shortage: tuple[int, Exception] | None = None

    def drop_graphs(self) -> None:
        self.num_held = 0

    def capture_again(self) -> Iterator[None]:
        while self.num_held < 3:
            if self.shortage is not None and self.num_held == self.shortage[0]:
                raise self.shortage[1]
            self.num_held += 1
            yield


def test_graphs_go_and_come_with_their_tag() -> None:
    occupation = Occupation(CPU, is_saver=False)
    exhaust(occupation.release(["cuda_graph"], keeps_copy=False))  # of which there are none
    exhaust(occupation.resume(["cuda_graph"], "await"))
    occupation.graphs = graphs = FakeGraphs()
    exhaust(occupation.release(["kv_cache"], keeps_copy=False))
    assert graphs.num_held == 3
    exhaust(occupation.release(["cuda_graph"], keeps_copy=False))
    assert graphs.num_held == 0
    exhaust(occupation.resume(["kv_cache"], "await"))
    assert graphs.num_held == 0
    coming = occupation.resume(["cuda_graph"], "await")
    next(coming)
    coming.close()
    assert graphs.num_held == 0
    exhaust(occupation.resume(["cuda_graph"], "await"))
    assert graphs.num_held == 3


@pytest.mark.parametrize("num_captured", [0, 2])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("CUDA error: out of memory"),  # the driver's, for a graph
        RankLost("a rank is lost: CUDA error: out of memory"),
        RuntimeError("a bug"),
    ],
)
def test_graphs_for_which_there_is_no_room_leave_everything_released(
    monkeypatch: pytest.MonkeyPatch, error: Exception, num_captured: int
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 << 20, 1 << 40))
    occupation = Occupation(CPU, is_saver=False)
    weights = occupation.zeros("weights", (7,), torch.float32).fill_(2.0)
    occupation.graphs = graphs = FakeGraphs()
    exhaust(occupation.release(MEMORY_TAGS, keeps_copy=True))
    graphs.shortage = num_captured, error
    if type(error) is RankLost or "memory" not in str(error):
        with pytest.raises(type(error)):
            exhaust(occupation.resume(MEMORY_TAGS, "copy"))
    else:
        with pytest.raises(UnavailableError, match="weights need 0 MiB and what graphs take, and 5 MiB of") as caught:
            exhaust(occupation.resume(MEMORY_TAGS, "copy"))
        assert caught.value.field == "tags" and caught.value.__context__ is None
    assert graphs.num_held == 0 and not weights.any()
    graphs.shortage = None
    exhaust(occupation.resume(MEMORY_TAGS, "copy"))
    assert graphs.num_held == 3 and (weights == 2.0).all()


def test_a_block_gives_its_memory_back_and_ends_with_its_last_tensor() -> None:
    block = HostBlock(64 << 20)
    block.bytes.fill_(1)
    page = 4096
    before = resident_pages()
    block.release()
    assert (before - resident_pages()) * page > 60 << 20
    block.bytes.fill_(1)
    part = block.bytes[:10]
    mapping = weakref.ref(block._mapping)
    del block
    gc.collect()
    assert mapping() is not None and part.sum() == 10
    del part
    gc.collect()
    assert mapping() is None


class FakeDriver:
    """Keeps account of what is reserved, created and mapped, as the driver would. `refuses` is a call that fails."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.refuses: dict[str, int] = {}
        self.num_handles = self.num_mapped = self.num_reserved = 0
        self.sizes: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name not in self.refuses:
                self.do(name, arguments)
            return self.refuses.get(name, 0)

        return call

    def do(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "cuMemGetAllocationGranularity":
            arguments[0]._obj.value = UNIT
        elif name == "cuMemAddressReserve":
            arguments[0]._obj.value = 1 << 40
            self.num_reserved += 1
            self.sizes.add(arguments[1].value)
        elif name == "cuMemCreate":
            properties = arguments[2]._obj
            assert (properties.type, properties.location.type, properties.location.id) == (1, 1, 3)
            self.num_handles += 1
            self.sizes.add(arguments[1].value)
        elif name == "cuMemRelease":
            self.num_handles -= 1
        elif name in ("cuMemMap", "cuMemUnmap"):
            self.num_mapped += 1 if name == "cuMemMap" else -1
            assert arguments[0].value == 1 << 40
            self.sizes.add(arguments[1].value)
        elif name == "cuMemAddressFree":
            self.num_reserved -= 1


def test_the_driver_is_asked_in_order_and_holds_nothing_of_a_range_that_is_unmapped() -> None:
    driver = FakeDriver()
    found = AddressRange(UNIT + 1, 3, driver)
    for _ in range(2):
        found.map()
    assert driver.calls == [
        *("cuMemGetAllocationGranularity", "cuMemAddressReserve", "cuMemCreate", "cuMemMap", "cuMemSetAccess")
    ]
    assert (driver.num_handles, driver.num_mapped, driver.sizes) == (1, 1, {2 * UNIT})
    assert found.__cuda_array_interface__["data"] == (1 << 40, False)
    for _ in range(2):
        found.unmap()
    assert (driver.num_handles, driver.num_mapped) == (0, 0)
    found.map()
    del found
    gc.collect()
    assert (driver.num_handles, driver.num_mapped, driver.num_reserved) == (0, 0, 0)


@pytest.mark.parametrize("name", ["cuMemCreate", "cuMemMap", "cuMemSetAccess"])
def test_what_the_driver_refuses_leaves_nothing(name: str) -> None:
    driver = FakeDriver()
    found = AddressRange(5, 3, driver)
    driver.refuses[name] = 2
    with pytest.raises(torch.OutOfMemoryError, match=name):
        found.map()
    found.unmap()
    assert (driver.num_handles, driver.num_mapped) == (0, 0)
    driver.refuses = {name: 700}
    with pytest.raises(RuntimeError, match=f"CUDA driver error 700 in {name}"):
        found.map()
    found.unmap()
    driver.refuses.clear()
    found.map()
    assert (driver.num_handles, driver.num_mapped) == (1, 1)


def test_structures_are_as_large_as_the_drivers() -> None:
    from headrace.runner import device_block

    assert ctypes.sizeof(device_block._Properties) == 32
    assert ctypes.sizeof(device_block._Access) == 12
