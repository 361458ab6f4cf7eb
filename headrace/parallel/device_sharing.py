"""Memory of a device as another process of this machine sees it. Owns the driver's handles and what is mapped of them.

A handle names a whole allocation of the driver, of which a buffer is a part. What is mapped stays allocated, whatever
its owner does, until it is closed here. It is mapped for the device that reads it, wherever it lies. See "Interprocess
Communication" in the CUDA driver's reference (`cuIpc*`).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from headrace.config.cuda_driver import cuda_driver
from headrace.types.errors import UnavailableError
from headrace.types.weights import DeviceArea, DeviceRef

_HANDLE_BYTES = 64
_BUFFER_ID = 7  # CU_POINTER_ATTRIBUTE_BUFFER_ID
_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * _HANDLE_BYTES),)


@functools.cache
def device_uuid(device: torch.device | int) -> str:
    """What tells a device from all others, in every process."""
    return str(torch.cuda.get_device_properties(device).uuid)


def readable_devices(device: torch.device) -> tuple[str, ...]:
    """The UUIDs of the devices whose memory kernels on `device` can read, that itself first."""
    own = torch.cuda.current_device() if device.index is None else device.index
    others = (number for number in range(torch.cuda.device_count()) if number != own)
    return tuple(map(device_uuid, (own, *(each for each in others if torch.cuda.can_device_access_peer(own, each)))))


def same_context() -> Callable[[], None]:
    """What makes the device's context of this thread that of another thread, to be called there."""
    context = ctypes.c_void_p()
    _check(cuda_driver().cuCtxGetCurrent(ctypes.byref(context)), "tell its context")
    return lambda: _check(cuda_driver().cuCtxSetCurrent(context), "take a context")


class SharedDeviceMemory:
    """Memory of our own that others may map by `ref`, or in this very process with `shares_process`.

    It is the driver's, not of torch's allocator, whose segments may be of a kind that cannot be shared, and hold what
    is none of theirs.
    """

    def __init__(self, size: int, device: torch.device, *, shares_process: bool) -> None:
        """Raises `UnavailableError` if the device has no room, or the driver does not share it."""
        self._address = ctypes.c_ulonglong()
        self._device = device
        with torch.cuda.device(device):
            torch.cuda.current_stream().query()  # a thread that has used no device has no context yet
            allocated = cuda_driver().cuMemAlloc_v2(ctypes.byref(self._address), ctypes.c_size_t(size))
            _check(allocated, f"give {size} bytes")
            handle = b"" if shares_process else self._export()
        self._bytes = bytes_at(self._address.value, size, device)
        self._stream: torch.cuda.Stream | None = None
        area = DeviceArea(handle, self._address.value if shares_process else 0, size)
        self.ref = DeviceRef((area,))

    def _export(self) -> bytes:
        try:
            return handle_of(self._address.value)
        except UnavailableError:
            self._free()
            raise

    def view(self, offset: int, size: int) -> torch.Tensor:
        """These bytes, to be written on the stream that is the caller's now: where his own work on them is enqueued."""
        self._stream = torch.cuda.current_stream(self._bytes.device)
        return self._bytes[offset : offset + size]

    def flush(self) -> None:
        """Wait for what was enqueued to write them."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.synchronize()

    def close(self) -> None:
        """Give the memory back. Nobody else may read it any more. Idempotent."""
        self.flush()
        self._bytes = self._bytes.new_empty(0)
        self._free()

    def _free(self) -> None:
        address, self._address = self._address, ctypes.c_ulonglong()
        if address.value:
            with torch.cuda.device(self._device):
                torch.cuda.current_stream().query()
                _check(cuda_driver().cuMemFree_v2(address), "take memory back")


def allocation_of(address: int) -> tuple[int, int]:
    """Where the driver's allocation begins that an address of this process is in, and its size. Raises
    `UnavailableError` if it is in none."""
    base, size = ctypes.c_ulonglong(), ctypes.c_size_t()
    found = cuda_driver().cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), ctypes.c_ulonglong(address))
    _check(found, "find an allocation")
    return base.value, size.value


def allocation_id(address: int) -> int:
    """The number of the allocation that an address of this process is in, which no later one has; 0 of none."""
    number = ctypes.c_ulonglong()
    asked = cuda_driver().cuPointerGetAttribute(ctypes.byref(number), _BUFFER_ID, ctypes.c_ulonglong(address))
    return 0 if asked else number.value


def handle_of(base: int) -> bytes:
    """What another process maps an allocation by. Raises `UnavailableError` for those that the driver does not share,
    as those that torch expands."""
    handle = _Handle()
    exported = cuda_driver().cuIpcGetMemHandle(ctypes.byref(handle), ctypes.c_ulonglong(base))
    _check(exported, "share memory of the device")
    return bytes(bytearray(handle))


class BytesAt:
    """Bytes that `device` reads `offset` into memory, and are nobody's here. torch hears of them only where it is to:
    most are moved by a kernel of ours, and to make a tensor takes as long as all else that is done with them.

    `mapped` is another process's memory, which a thread maps meanwhile: waited for only where an address is asked for,
    which raises `UnavailableError` if there is none. None: `offset` is an address of this process.
    """

    __slots__ = ("_mapped", "_offset", "device", "nbytes")

    def __init__(self, mapped: Future[MappedMemory] | None, offset: int, nbytes: int, device: torch.device) -> None:
        self._mapped, self._offset, self.nbytes, self.device = mapped, offset, nbytes, device

    def data_ptr(self) -> int:
        """As a tensor's."""
        return self._offset if self._mapped is None else self._mapped.result().address + self._offset

    def view(self, dtype: torch.dtype) -> torch.Tensor:
        """As a tensor's that is flat."""
        return bytes_at(self.data_ptr(), self.nbytes, self.device).view(dtype)


class MappedMemory:
    """An area of another's memory, mapped here: `address`, for whatever the thread's device does with it, though it may
    lie on another one, and nothing after `close`."""

    def __init__(self, area: DeviceArea) -> None:
        """Raises `UnavailableError` if the owner is gone, or the driver does not map it for the thread's device."""
        base, handle = ctypes.c_ulonglong(), _Handle.from_buffer_copy(area.handle)
        _check(_open_handle()(ctypes.byref(base), handle, _LAZY_PEER_ACCESS), "map another's memory")
        self._base = base.value
        self.address = self._base + area.offset

    def close(self) -> None:
        """Unmap it. What was enqueued that reads it has to be done. Idempotent."""
        base, self._base = self._base, 0
        if base:
            _check(cuda_driver().cuIpcCloseMemHandle(ctypes.c_ulonglong(base)), "unmap another's memory")


@functools.cache
def _open_handle() -> Any:
    """The driver's function, told that it takes a handle itself, not its address."""
    function = cuda_driver().cuIpcOpenMemHandle_v2
    function.argtypes = (ctypes.c_void_p, _Handle, ctypes.c_uint)
    return function


def bytes_at(address: int, size: int, device: torch.device) -> torch.Tensor:
    """Bytes at an address, as torch sees them: they are not its own."""
    storage = torch._C._construct_storage_from_data_pointer(address, device, size)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (size,), (1,))


def _check(result: int, task: str) -> None:
    if result:
        raise UnavailableError(f"the driver could not {task}: error {result}", field="buffer")
