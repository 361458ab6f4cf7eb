"""A block of a CUDA device's memory that can be given back to the driver while its address stays.

Owns the calls of the driver's virtual memory interface: an address range is reserved once, and physical memory is
mapped into it, unmapped and mapped again. What was captured with those addresses stays valid. Knows no tags.
"""

from __future__ import annotations

import ctypes
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
        self._range = AddressRange(max(1, num_bytes), device.index or 0, driver or cuda_driver())
        self._range.map()
        self.bytes = torch.as_tensor(self._range, dtype=torch.uint8, device=device)[:num_bytes].zero_()

    def release(self) -> None:
        """Give the memory back to the driver: nothing on the device may use it any more. Idempotent."""
        self._range.unmap()

    def resume(self) -> None:
        """Take as much again, as zeros. Raises `torch.OutOfMemoryError`; nothing is taken then."""
        self._range.map()
        self.bytes.zero_()


class AddressRange:
    """Addresses of a device, with memory behind them or without. What torch makes of it keeps it alive."""

    def __init__(self, num_bytes: int, device: int, driver: Any) -> None:
        self._driver = driver
        self._is_mapped = False
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
        if self._is_mapped:
            return
        handle, size, none = ctypes.c_uint64(0), self._size, ctypes.c_uint64(0)
        self._call("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(self._properties), none)
        try:
            self._call("cuMemMap", self._address, size, ctypes.c_size_t(0), handle, none)
        finally:
            self._call("cuMemRelease", handle)  # what is mapped lives until it is unmapped
        self._is_mapped = True
        self._call("cuMemSetAccess", self._address, size, ctypes.byref(self._access), ctypes.c_size_t(1))

    def unmap(self) -> None:
        if self._is_mapped:
            self._call("cuMemUnmap", self._address, self._size)
            self._is_mapped = False

    def __del__(self) -> None:
        if self._address.value:  # nobody is left who could be told of a failure
            if self._is_mapped:
                self._driver.cuMemUnmap(self._address, self._size)
            self._driver.cuMemAddressFree(self._address, self._size)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code == _OUT_OF_MEMORY:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {name} of {self._size.value} bytes")
        if code:
            raise RuntimeError(f"CUDA driver error {code} in {name}")
