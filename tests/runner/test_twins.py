"""Blocks whose memory an update exchanges: what is at their addresses then, what calls that takes, and what is kept."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from headrace.core.faults import is_of_lost_device
from headrace.runner.device_block import DeviceBlock
from headrace.runner.occupation import BlockTwin, Occupation
from headrace.types.memory import MEMORY_TAGS
from tests.runner.mapped_driver import CPU, OUT_OF_MEMORY, UNIT, MappedDriver, mapped_driver

EXCHANGE = ["cuMemRetainAllocationHandle", "cuMemUnmap", "cuMemRelease", "cuMemMap", "cuMemSetAccess"]
SHAPES = [((3, 5), torch.float32), ((7,), torch.bfloat16), ((UNIT,), torch.uint8), ((), torch.float16)]


@pytest.fixture
def driver() -> Iterator[MappedDriver]:
    with mapped_driver() as found:
        yield found


def test_an_exchange_maps_once_and_takes_and_gives_nothing(driver: MappedDriver) -> None:
    block = DeviceBlock(UNIT + 5, CPU, driver)
    address = block.bytes.data_ptr()
    block.bytes.fill_(0)
    assert not block.has_twin
    for value in range(1, 6):
        driver.calls.clear()
        block.twin().fill_(value)
        assert value == 1 or driver.calls == []
        assert (block.bytes == value - 1).all() and block.twin().data_ptr() != address
        driver.calls.clear()
        block.exchange()
        assert driver.calls == EXCHANGE
        assert (block.bytes == value).all() and (block.twin() == value - 1).all()
        assert block.bytes.data_ptr() == address and driver.num_memories == 2
    block.release()
    block.release()
    assert driver.num_memories == 0 and not driver.mapped and not block.has_twin
    block.resume()
    assert not block.bytes.any() and driver.num_memories == 1
    block.twin().fill_(9)
    block.exchange()
    block.drop_twin()
    assert (block.bytes == 9).all() and driver.num_memories == 1
    del block
    gc.collect()
    assert driver.num_memories == 0 and not driver.reserved


@pytest.mark.parametrize("name", ["cuMemAddressReserve", "cuMemCreate", "cuMemMap", "cuMemSetAccess"])
def test_a_twin_for_which_there_is_no_room_leaves_nothing(driver: MappedDriver, name: str) -> None:
    block = DeviceBlock(5, CPU, driver)
    block.bytes.fill_(3)
    driver.refuses[name] = OUT_OF_MEMORY
    with pytest.raises(torch.OutOfMemoryError, match=name):
        block.twin()
    assert not block.has_twin and driver.num_memories == 1 and (block.bytes == 3).all()
    driver.refuses.clear()
    driver.refuses["cuMemRetainAllocationHandle"] = OUT_OF_MEMORY
    with pytest.raises(torch.OutOfMemoryError, match="Retain") as caught:
        block.twin()
    assert not block.has_twin and driver.num_memories == 1 and caught.value.__traceback__ is not None  # held
    driver.refuses.clear()
    assert len(block.twin()) == 5 and driver.num_memories == 2


@pytest.mark.parametrize("name", EXCHANGE)
@pytest.mark.parametrize("code", [OUT_OF_MEMORY, 700])
def test_an_exchange_that_fails_is_the_end_of_the_device(driver: MappedDriver, name: str, code: int) -> None:
    """For want of memory too: nobody may go on with addresses that are not mapped."""
    block = DeviceBlock(5, CPU, driver)
    block.twin()
    driver.refuses[name] = code
    with pytest.raises(RuntimeError) as caught:
        block.exchange()
    assert is_of_lost_device(caught.value)


def laid(driver: MappedDriver) -> tuple[Occupation, list[torch.Tensor], BlockTwin]:
    occupation = Occupation(CPU, is_saver=False)
    tensors, twin = occupation.parameters(SHAPES)
    assert isinstance(twin, BlockTwin)
    return occupation, tensors, twin


def test_the_tensors_of_a_twin_are_those_of_the_block_after_an_exchange(driver: MappedDriver) -> None:
    _, tensors, twin = laid(driver)
    for each in tensors:
        each.fill_(1)
    beside = twin.take(0)
    assert beside is not None
    assert [(tuple(each.shape), each.dtype) for each in beside] == SHAPES
    for number, each in enumerate(beside):
        each.fill_(number + 2)
    assert all((each == 1).all() for each in tensors)
    twin.exchange()
    twin.put()
    assert all((each == number + 2).all() for number, each in enumerate(tensors))
    beside = twin.take(None)
    assert beside is not None and all((each == 1).all() for each in beside)


def test_an_exchange_waits_for_what_this_thread_has_enqueued(
    driver: MappedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stream:
        def synchronize(self) -> None:
            driver.calls.append("synchronize")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    twin = BlockTwin(DeviceBlock(5, CPU, driver), lambda data: [data], torch.device("cuda", 0))
    assert twin.take(0) is not None
    driver.calls.clear()
    twin.exchange()
    assert driver.calls == ["synchronize", *EXCHANGE]


def test_a_twin_is_made_where_there_is_room_and_then_kept(driver: MappedDriver) -> None:
    _, tensors, twin = laid(driver)
    size = sum(-(-each.nbytes // 512) * 512 for each in tensors)
    assert twin.take(None) is None
    driver.num_free = 3
    assert twin.take(3 * UNIT - size + 1) is None and driver.num_memories == 1
    assert twin.take(3 * UNIT - size) is not None and driver.num_memories == 2
    twin.put()
    driver.num_free = 0
    assert twin.take(1 << 40) is not None and twin.take(None) is not None


def test_what_torch_gave_back_in_a_release_is_left_for_its_steps(driver: MappedDriver) -> None:
    occupation, _, twin = laid(driver)
    driver.num_torch = 5
    give_back(occupation, "cuda_graph")
    driver.num_torch, driver.num_free = 1, 2 + 4
    assert twin.take(0) is not None
    twin.put()
    give_back(occupation, "asked")
    driver.num_free = 1 + 4
    assert twin.take(0) is None
    driver.num_torch, driver.num_free = 3, 2 + 2
    assert twin.take(0) is not None


def test_a_twin_that_another_process_leaves_no_room_for_is_none(
    driver: MappedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, twin = laid(driver)
    driver.num_free = 1
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    assert twin.take(0) is None and driver.num_memories == 1
    driver.num_free = 8
    assert twin.take(0) is not None


@pytest.mark.parametrize("how", ["weights", "kv_cache", "cuda_graph", "resume", "close", "asked"])
def test_what_is_kept_for_updates_goes_with_other_memory(driver: MappedDriver, how: str) -> None:
    occupation, tensors, twin = laid(driver)
    tensors[2].fill_(4)
    assert twin.take(0) is not None
    twin.put()
    give_back(occupation, how)
    assert driver.num_memories == (0 if how == "weights" else 1)
    assert how == "weights" or (tensors[2] == 4).all()


@pytest.mark.parametrize("how", ["kv_cache", "cuda_graph", "resume", "asked"])
def test_but_not_out_of_an_update(driver: MappedDriver, how: str) -> None:
    occupation, tensors, twin = laid(driver)
    beside = twin.take(0)
    assert beside is not None
    give_back(occupation, how)
    beside[2].fill_(4)
    twin.exchange()
    assert (tensors[2] == 4).all() and driver.num_memories == 2


def give_back(occupation: Occupation, how: str) -> None:
    if how in MEMORY_TAGS:
        list(occupation.release([how], keeps_copy=False))
    elif how == "resume":
        list(occupation.resume(["kv_cache"], "await"))
    else:
        {"close": occupation.close, "asked": occupation.let_twins_go}[how]()


def test_other_memory_has_no_twin_nor_has_a_cpu() -> None:
    assert Occupation(CPU, is_saver=True).parameters(SHAPES)[1] is None
    with mapped_driver() as driver:
        occupation, _, twin = laid(driver)
        occupation.zeros("kv_cache", (5,), torch.float32)
        assert twin.take(0) is not None and driver.num_memories == 3
