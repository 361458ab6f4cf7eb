"""A block of a CUDA device's memory that can be given back to the driver, or be exchanged, while its address stays.

Owns the calls of the driver's virtual memory interface: an address range is reserved once, and physical memory is
mapped into it, unmapped and mapped again. What was captured with those addresses stays valid. Knows no tags.

A block that has a twin has two memories, each mapped beside it at an address of its own, for good; its own addresses
show one of them. So an exchange maps once, and nothing is to be mapped before the next. Each range holds a handle of
what is mapped there: a memory is the driver's again when the last of them has let go.
"""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any

import torch

from headrace.config.cuda_driver import array_interface, cuda_driver

_OUT_OF_MEMORY = 2
_PINNED = 1  # CU_MEM_ALLOCATION_TYPE_PINNED: memory of a device that stays where it is
_ON_DEVICE = 1  # CU_MEM_LOCATION_TYPE_DEVICE
_READ_WRITE = 3  # CU_MEM_ACCESS_FLAGS_PROT_READWRITE
_MINIMUM = 0  # CU_MEM_ALLOC_GRANULARITY_MINIMUM


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Flags(ctypes.Structure):
    _fields_ = (
        ("compression", ctypes.c_ubyte),
        ("rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )


class _Properties(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("metadata", ctypes.c_void_p),
        ("flags", _Flags),
    )


class _Access(ctypes.Structure):
    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


class DeviceBlock:
    """Zeros on a device, whose primary context is current in this thread. `bytes` is all of it; the address range lives
    as long as the last tensor over it. Raises `torch.OutOfMemoryError`."""

    def __init__(self, num_bytes: int, device: torch.device, driver: Any = None) -> None:
        self._new_range = partial(AddressRange, max(1, num_bytes), device.index or 0, driver or cuda_driver())
        self._num_bytes, self._device = num_bytes, device
        self._beside: list[AddressRange] = []  # of the twin, and of what the block shows
        self._range = self._new_range()
        self._range.map()
        self.bytes = self._bytes_at(self._range).zero_()

    def release(self) -> None:
        """Give the memory back to the driver, also the twin's: nothing on the device may use it any more.
        Idempotent."""
        self.drop_twin()
        self._range.unmap()

    def resume(self) -> None:
        """Take as much again, as zeros. Raises `torch.OutOfMemoryError`; nothing is taken then."""
        self._range.map()
        self.bytes.zero_()

    @property
    def has_twin(self) -> bool:
        """As much memory again is taken."""
        return bool(self._beside)

    def twin(self) -> torch.Tensor:
        """The bytes of the twin, of whatever values; it is taken if there is none. Raises `torch.OutOfMemoryError`;
        nothing is taken then."""
        if not self._beside:
            twin, own = self._new_range(), self._new_range()
            try:
                twin.map()
                own.show(self._range)
            except BaseException:
                for each in (own, twin):
                    each.unmap()
                raise
            self._beside = [twin, own]
        return self._bytes_at(self._beside[0])

    def exchange(self) -> None:
        """The block holds what the twin held, and the other way round: nothing on the device may be at work on either.

        No memory is taken or given back. A failure is the device's end, as tensors and graphs have no memory then: a
        `RuntimeError` that says so.
        """
        try:
            self._range.show(self._beside[0])
        except torch.OutOfMemoryError as error:
            raise RuntimeError("CUDA driver error 2: a block is not mapped any more") from error
        self._beside.reverse()

    def drop_twin(self) -> None:
        """Give its memory back. Idempotent."""
        for each in self._beside:
            each.unmap()
        self._beside = []

    def _bytes_at(self, place: AddressRange) -> torch.Tensor:
        return torch.as_tensor(place, dtype=torch.uint8, device=self._device)[: self._num_bytes]


class AddressRange:
    """Addresses of a device, with memory behind them or without. What torch makes of it keeps it alive."""

    def __init__(self, num_bytes: int, device: int, driver: Any) -> None:
        self._driver = driver
        self._handle: ctypes.c_uint64 | None = None  # of the memory that is mapped here, as long as it is
        self._address = ctypes.c_uint64(0)
        location = _Location(_ON_DEVICE, device)
        self._properties = _Properties(type=_PINNED, location=location)
        self._access = _Access(location, _READ_WRITE)
        unit = ctypes.c_size_t(0)
        properties = ctypes.byref(self._properties)
        self._call("cuMemGetAllocationGranularity", ctypes.byref(unit), properties, ctypes.c_int(_MINIMUM))
        self._size = ctypes.c_size_t(-(-num_bytes // unit.value) * unit.value)
        no_hint = (ctypes.c_size_t(0), ctypes.c_uint64(0), ctypes.c_uint64(0))
        self._call("cuMemAddressReserve", ctypes.byref(self._address), self._size, *no_hint)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return array_interface(self._address.value, self._size.value)

    def map(self) -> None:
        """Take memory, unless some is mapped here."""
        if self._handle is not None:
            return
        handle, properties = ctypes.c_uint64(0), ctypes.byref(self._properties)
        self._call("cuMemCreate", ctypes.byref(handle), self._size, properties, ctypes.c_uint64(0))
        self._map(handle)

    def show(self, other: AddressRange) -> None:
        """Map what is mapped there, which is of the same size, in place of what is mapped here."""
        handle = ctypes.c_uint64(0)
        self._call("cuMemRetainAllocationHandle", ctypes.byref(handle), other._address)
        self._map(handle)

    def _map(self, handle: ctypes.c_uint64) -> None:
        try:
            self.unmap()
            self._call("cuMemMap", self._address, self._size, ctypes.c_size_t(0), handle, ctypes.c_uint64(0))
        except BaseException:
            self._call("cuMemRelease", handle)
            raise
        self._handle = handle
        self._call("cuMemSetAccess", self._address, self._size, ctypes.byref(self._access), ctypes.c_size_t(1))

    def unmap(self) -> None:
        """Let go of the memory that is mapped here. Idempotent."""
        if self._handle is not None:
            self._call("cuMemUnmap", self._address, self._size)
            handle, self._handle = self._handle, None
            self._call("cuMemRelease", handle)

    def __del__(self) -> None:
        if self._address.value:  # nobody is left who could be told of a failure
            if self._handle is not None:
                self._driver.cuMemUnmap(self._address, self._size)
                self._driver.cuMemRelease(self._handle)
            self._driver.cuMemAddressFree(self._address, self._size)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code == _OUT_OF_MEMORY:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {name} of {self._size.value} bytes")
        if code:
            raise RuntimeError(f"CUDA driver error {code} in {name}")
