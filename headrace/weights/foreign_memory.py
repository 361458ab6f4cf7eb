"""The memory that a foreign payload names, as tensors that may be staged.

Shared files were taken over from their sender (`headrace.weights.foreign_files`), and are opened where that says. Their
values are read, never mapped: of a file that is cut short nobody faults. CUDA memory is opened and given back by torch
itself, which counts down when the last tensor of it is gone.

Owns descriptors and mappings of foreign memory. Must not know payloads' bytes or sessions.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch

from headrace.parallel.device_sharing import device_uuid
from headrace.types.errors import WeightUpdateError
from headrace.types.foreign import FIELD, CudaHandle, ForeignTensor, NoMemory, Payload, SharedFile
from headrace.types.weights import ELEMENT_BYTES, TensorInfo
from headrace.weights.files import OpenFile
from headrace.weights.foreign_files import HEADER_BYTES, refused
from headrace.weights.safetensors_file import FileTensor
from headrace.weights.staging import TensorData, bytes_of


class ForeignMemory:
    """The tensors of a payload as `(name, data)`, which may be staged until `close`.

    CUDA memory is opened for the current stream, which waits for the sender; close it when that is done with it, under
    the same stream, which torch then waits for. `WeightUpdateError` where there is no such memory.
    """

    def __init__(self, payload: Payload) -> None:
        self.tensors: list[tuple[str, TensorData]] = []
        self._opened = ExitStack()
        self._files: dict[SharedFile, OpenFile] = {}
        self._whole: dict[SharedFile, torch.Tensor] = {}
        self._devices: dict[CudaHandle, torch.Tensor] = {}
        try:
            for shared, path in zip(dict.fromkeys(payload.files), payload.paths, strict=True):
                self._files[shared] = self._opened.enter_context(_opened(shared, Path(path)))
            for tensor in payload.tensors:
                self.tensors.append((tensor.name, self._data(tensor)))
            for bucket in payload.buckets:
                for part in bucket.tensors:
                    info = TensorInfo(part.name, part.shape, part.dtype)
                    self.tensors.append((part.name, self._part(bucket.memory, info, part.start)))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Use the memory no more. `tensors` is empty then."""
        self.tensors.clear()
        self._whole.clear()
        self._devices.clear()
        self._opened.close()

    def __enter__(self) -> ForeignMemory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _data(self, tensor: ForeignTensor) -> TensorData:
        if isinstance(tensor.storage, SharedFile) and _is_contiguous(tensor):
            start = HEADER_BYTES + tensor.offset * ELEMENT_BYTES[tensor.dtype]
            return FileTensor(self._files[tensor.storage], TensorInfo(tensor.name, tensor.shape, tensor.dtype), start)
        dtype = getattr(torch, tensor.dtype)
        memory = self._memory(tensor)
        whole = memory[: len(memory) // dtype.itemsize * dtype.itemsize].view(dtype)
        return whole.as_strided(tensor.shape, tensor.stride, tensor.offset)

    def _part(self, memory: ForeignTensor, info: TensorInfo, start: int) -> TensorData:
        """A tensor of a bucket, from byte `start` of its elements on."""
        if isinstance(memory.storage, SharedFile):
            return FileTensor(self._files[memory.storage], info, HEADER_BYTES + memory.offset + start)
        found = self._memory(memory)[memory.offset + start :][: info.num_bytes]
        dtype = getattr(torch, info.dtype)
        is_aligned = found.storage_offset() % dtype.itemsize == 0
        return (found if is_aligned else found.clone()).view(dtype).view(info.shape)

    def _memory(self, tensor: ForeignTensor) -> torch.Tensor:
        """All bytes of a tensor's storage."""
        match tensor.storage:
            case NoMemory():
                return torch.empty(0, dtype=torch.uint8, device="cpu")
            case SharedFile() as shared:
                if shared not in self._whole:
                    whole = torch.empty(shared.num_bytes, dtype=torch.uint8, device="cpu")
                    self._files[shared].read_into(bytes_of(whole).data, HEADER_BYTES)
                    self._whole[shared] = whole
                return self._whole[shared]
            case CudaHandle() as handle:
                if handle not in self._devices:
                    self._devices[handle] = _device_memory(handle)
                return self._devices[handle]


def _is_contiguous(tensor: ForeignTensor) -> bool:
    """Whether the elements lie in row-major order without gaps."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        if size != 1 and stride != expected:
            return 0 in tensor.shape
        expected *= size
    return True


def _opened(shared: SharedFile, path: Path) -> OpenFile:
    try:
        return OpenFile(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise refused(shared, f"cannot be opened as {path}: {error.strerror}") from None


def _device_memory(handle: CudaHandle) -> torch.Tensor:
    """All bytes of a storage on a device, in the sender's own memory. The current stream waits for what the sender has
    enqueued on it."""
    device = _ordinal(handle.device)
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        storage = torch.UntypedStorage._new_shared_cuda(
            device,
            handle.handle,
            handle.num_bytes,
            handle.storage_offset_bytes,
            handle.ref_counter_handle.encode(),
            handle.ref_counter_offset,
            handle.event_handle,
            handle.event_sync_required,
        )
    except RuntimeError as error:
        message = f"CUDA memory of device {handle.device} cannot be opened: {str(error).splitlines()[0]}"
        raise WeightUpdateError(message, field=FIELD) from None
    found = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return found.set_(storage, 0, (handle.num_bytes,), (1,))


def _ordinal(device: int | str) -> int:
    """This process's ordinal of a device: an ordinal is the sender's, and taken for ours."""
    count = torch.cuda.device_count()
    if isinstance(device, int) and device < count:
        return device
    for index in range(count):
        if device_uuid(index) == str(device).removeprefix("GPU-"):
            return index
    raise WeightUpdateError(f"device {device} is none of the {count} CUDA devices seen here", field=FIELD)
