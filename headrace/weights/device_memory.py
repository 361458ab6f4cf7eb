"""Memory of a device as another process of this machine sees it. Owns the driver's handles and what is mapped of them.

A handle names a whole allocation of the driver, of which a buffer is a part. What is mapped stays allocated, whatever
its owner does, until it is closed here. See "Interprocess Communication" in the CUDA driver's reference (`cuIpc*`).
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from headrace.config.devices import DRIVER
from headrace.types.errors import UnavailableError
from headrace.types.weights import DeviceRef

_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * _HANDLE_BYTES),)


def export_memory(buffer: torch.Tensor) -> DeviceRef:
    """What another process maps a contiguous tensor by. `UnavailableError` where the driver cannot share its memory, as
    that of torch's expandable segments."""
    base, size = ctypes.c_ulonglong(), ctypes.c_size_t()
    address = ctypes.c_ulonglong(buffer.data_ptr())
    _check(_driver().cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), address), "find the allocation")
    handle = _Handle()
    _check(_driver().cuIpcGetMemHandle(ctypes.byref(handle), base), "share memory of the device")
    offset = buffer.data_ptr() - base.value
    return DeviceRef(device_uuid(buffer.device), bytes(bytearray(handle)), offset, buffer.nbytes)


def device_uuid(device: torch.device) -> str:
    """What tells a device from all others, in every process."""
    return str(torch.cuda.get_device_properties(device).uuid)


class MappedMemory:
    """Another's memory, mapped here. `bytes` are uint8 [size] on `device`, and nothing after `close`."""

    def __init__(self, ref: DeviceRef, device: torch.device) -> None:
        """Raises `UnavailableError` if its owner is gone, or it is on another device."""
        if ref.device != device_uuid(device):
            raise UnavailableError(
                f"the buffer is on device {ref.device}, not on {device_uuid(device)}", field="buffer"
            )
        self._base = 0
        if ref.handle:
            base = ctypes.c_ulonglong()
            handle = _Handle.from_buffer_copy(ref.handle)
            opened = _driver().cuIpcOpenMemHandle_v2(ctypes.byref(base), handle, ctypes.c_uint(_LAZY_PEER_ACCESS))
            _check(opened, "map another's memory")
            self._base = base.value
        self.bytes = torch.as_tensor(_Bytes(self._base + ref.offset, ref.size), device=device)

    def close(self) -> None:
        """Unmap it. What was enqueued that reads it has to be done. Idempotent."""
        base, self._base = self._base, 0
        self.bytes = self.bytes.new_empty(0)
        if base:
            _check(_driver().cuIpcCloseMemHandle(ctypes.c_ulonglong(base)), "unmap another's memory")


class _Bytes:
    """Bytes at an address, for torch to look at."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (size,),
            "strides": None,
            "data": (address, False),
        }


@functools.cache
def _driver() -> Any:
    driver = ctypes.CDLL(DRIVER)
    driver.cuIpcOpenMemHandle_v2.argtypes = (ctypes.c_void_p, _Handle, ctypes.c_uint)
    return driver


def _check(result: int, task: str) -> None:
    if result:
        raise UnavailableError(f"the driver could not {task}: error {result}", field="buffer")
