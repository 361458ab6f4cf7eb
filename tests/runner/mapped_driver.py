"""A driver of devices whose memory is the host's: what it maps, unmaps and maps again are real pages at real addresses.
So tensors over its address ranges hold what the calls made of them. What is touched where nothing is mapped ends the
process, as it would a device."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from headrace.runner import occupation
from headrace.runner.device_block import AddressRange, DeviceBlock

CPU = torch.device("cpu")
UNIT = 1 << 16
OUT_OF_MEMORY, INVALID = 2, 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_NONE, _FIXED = 0, 0x10


class MappedDriver:
    """`calls` are those made, `refuses` what one is answered with. `num_free` units may still be taken, `num_torch` are
    torch's. Fresh memory is full of junk."""

    def __init__(self, num_free: int = 1 << 20) -> None:
        self.num_torch = 0
        self.calls: list[str] = []
        self.refuses: dict[str, int] = {}
        self.num_free = num_free
        self.reserved: dict[int, int] = {}
        self.mapped: dict[int, int] = {}
        self._held: dict[int, int] = {}  # handles of each memory that are not released

    @property
    def num_memories(self) -> int:
        """That are taken."""
        return len(self._held)

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name in self.refuses:
                return self.refuses[name]
            result: int = getattr(self, f"_{name}")(*arguments)
            return result

        return call

    def _cuMemGetAllocationGranularity(self, unit: Any, *_: Any) -> int:
        unit._obj.value = UNIT
        return 0

    def _cuMemAddressReserve(self, address: Any, size: Any, *_: Any) -> int:
        address._obj.value = self._pages(0, size.value, _NONE)
        self.reserved[address._obj.value] = size.value
        return 0

    def _cuMemAddressFree(self, address: Any, size: Any) -> int:
        if address.value in self.mapped or self.reserved.pop(address.value, 0) != size.value:
            return INVALID
        return int(_libc.munmap(address.value, size.value))

    def _cuMemCreate(self, handle: Any, size: Any, *_: Any) -> int:
        if size.value // UNIT > self.num_free:
            return OUT_OF_MEMORY
        self.num_free -= size.value // UNIT
        handle._obj.value = os.memfd_create("device")
        os.write(handle._obj.value, b"\xa5" * size.value)
        self._held[handle._obj.value] = 1
        return 0

    def _cuMemRetainAllocationHandle(self, handle: Any, address: Any) -> int:
        if address.value not in self.mapped:
            return INVALID
        handle._obj.value = self.mapped[address.value]
        self._held[handle._obj.value] += 1
        return 0

    def _cuMemRelease(self, handle: Any) -> int:
        self._held[handle.value] -= 1
        return self._free_unused(handle.value)

    def _cuMemMap(self, address: Any, size: Any, offset: Any, handle: Any, flags: Any) -> int:
        fits = self.reserved[address.value] == size.value == os.fstat(handle.value).st_size
        if address.value in self.mapped or not fits or offset.value or flags.value or not self._held[handle.value]:
            return INVALID
        self._pages(address.value, size.value, _NONE, handle.value)
        self.mapped[address.value] = handle.value
        return 0

    def _cuMemSetAccess(self, address: Any, size: Any, *_: Any) -> int:
        if address.value not in self.mapped:
            return INVALID
        return int(_libc.mprotect(address.value, size.value, mmap.PROT_READ | mmap.PROT_WRITE))

    def _cuMemUnmap(self, address: Any, size: Any) -> int:
        if address.value not in self.mapped or self.reserved[address.value] != size.value:
            return INVALID
        self._pages(address.value, size.value, _NONE)
        return self._free_unused(self.mapped.pop(address.value))

    def _free_unused(self, handle: int) -> int:
        if not self._held[handle] and handle not in self.mapped.values():
            self.num_free += os.fstat(handle).st_size // UNIT
            os.close(handle)
            del self._held[handle]
        return 0

    def _pages(self, address: int, size: int, protection: int, file: int = -1) -> int:
        flags = (_FIXED if address else 0) | (mmap.MAP_SHARED if file >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        found: int = _libc.mmap(address or None, size, protection, flags, file, 0)
        assert found == address or not address
        return found


def bytes_at(block: DeviceBlock, place: AddressRange) -> torch.Tensor:
    """As a device's block has them: they keep the range."""

    class Bytes(ctypes.c_ubyte * place._size.value):  # type: ignore[misc]
        pass

    found: Any = Bytes.from_address(place._address.value)
    found.place = place
    return torch.frombuffer(found, dtype=torch.uint8)[: block._num_bytes]


@contextmanager
def mapped_driver() -> Iterator[MappedDriver]:
    """CPU occupations then have a device's blocks, over such a driver."""
    driver = MappedDriver()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceBlock, "_bytes_at", bytes_at)
        patch.setattr(occupation, "HostBlock", lambda num_bytes: DeviceBlock(num_bytes, CPU, driver))
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (driver.num_free * UNIT, 1 << 40))
        patch.setattr(torch.cuda, "memory_reserved", lambda device: driver.num_torch * UNIT)
        yield driver
