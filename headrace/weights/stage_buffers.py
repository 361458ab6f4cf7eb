"""Buffers that tensors are staged from, as the memory of a replica reads them. Owns what is mapped of another process.

On a device a buffer stays mapped until its update is over: an update comes in many stage commands, out of few buffers,
and mapping one, or pinning it, takes as long as copying a gigabyte.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from headrace.ipc import SharedBuffer
from headrace.types.errors import UnavailableError
from headrace.types.weights import BufferRef, DeviceRef
from headrace.weights.device_sharing import MappedMemory
from headrace.weights.memory import StageBuffer


class DeviceBuffers:
    """The buffers of one update whose weights are on `device`. `settle` waits for what was enqueued that reads them."""

    def __init__(self, device: torch.device, settle: Callable[[], None]) -> None:
        self._device = device
        self._settle = settle
        self._open: dict[BufferRef | DeviceRef, _Kept] = {}

    def open(self, ref: BufferRef | DeviceRef) -> StageBuffer:
        """A buffer, mapped now or before. Raises `RequestError` or `UnavailableError`."""
        if ref not in self._open:
            if isinstance(ref, DeviceRef):
                self._open[ref] = _Mapped(ref, self._settle, self._device)
            else:
                self._open[ref] = _Pinned(ref, self._settle)
        return self._open[ref]

    def close(self) -> None:
        """Unmap all of them."""
        self._settle()
        while self._open:
            self._open.popitem()[1].unmap()


class _Kept(ABC):
    """Bytes uint8 [size] that stay mapped from one job to the next."""

    def __init__(self, settle: Callable[[], None]) -> None:
        self._settle = settle
        self.bytes = torch.empty(0, dtype=torch.uint8, device="cpu")

    def part(self, offset: int, size: int) -> torch.Tensor:
        """These bytes."""
        return self.bytes[offset : offset + size]

    def close(self) -> None:
        """Its job is over, and who filled it may fill it again."""
        self._settle()  # a job that was done leaves nothing to wait for

    @abstractmethod
    def unmap(self) -> None:
        """Its update is over."""


class _Mapped(_Kept):
    def __init__(self, ref: DeviceRef, settle: Callable[[], None], device: torch.device) -> None:
        super().__init__(settle)
        self._memory = MappedMemory(ref, device)
        self.bytes = self._memory.bytes

    def unmap(self) -> None:
        self.bytes = self.bytes.new_empty(0)
        self._memory.close()


class _Pinned(_Kept):
    """Shared memory of the host, pinned: the device reads it by itself, while the host goes on."""

    def __init__(self, ref: BufferRef, settle: Callable[[], None]) -> None:
        super().__init__(settle)
        self._memory = SharedBuffer.open(ref, writable=True)  # what is mapped to be read alone cannot be pinned
        self.bytes = torch.frombuffer(self._memory.view, dtype=torch.uint8)
        self._address = self.bytes.data_ptr()
        error = int(torch.cuda.cudart().cudaHostRegister(self._address, ref.size, 0))  # type: ignore[no-untyped-call]
        if error:
            self._release()
            raise UnavailableError(f"{ref.size} bytes of shared memory cannot be pinned: error {error}", field="buffer")

    def unmap(self) -> None:
        torch.cuda.cudart().cudaHostUnregister(self._address)  # type: ignore[no-untyped-call]
        self._release()

    def _release(self) -> None:
        self.bytes = self.bytes.new_empty(0)
        self._memory.close()
