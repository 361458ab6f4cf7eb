"""The memory that a foreign payload names: opening it, and giving it back to its sender as torch would.

Shared files (torch's `file_system` sharing): a regular file of ours directly in /dev/shm, named as torch names them.
Its first 64 bytes are torch's header, which begins with a 32-bit count of who uses the file: whoever counts it down to
zero unlinks it. The sender counts up once more for each time it sends, and the receiver counts that down again, so not
to count would keep every update's memory until the sender ends. `ForeignMemory.close` counts down, in one atomic
operation as torch does, and unlinks at zero. The sender's torch_shm_manager is never asked: it unlinks what is left
when the sender is gone. Values are read from the file, never mapped: of a file that is cut short nobody faults.

CUDA memory is opened and given back by torch itself, which counts down when the last tensor of it is gone.

Owns descriptors, counts and mappings of foreign memory. Must not know payloads' bytes or sessions.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
import stat
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch

from headrace.types.errors import CheckpointError, WeightUpdateError
from headrace.types.foreign import FIELD, CudaHandle, ForeignTensor, NoMemory, Payload, SharedFile
from headrace.types.weights import ELEMENT_BYTES, TensorInfo
from headrace.weights.device_sharing import device_uuid
from headrace.weights.files import OpenFile
from headrace.weights.safetensors_file import FileTensor
from headrace.weights.staging import TensorData, bytes_of

HEADER_BYTES = 64
"""Before the values, in a shared file of torch."""

MAX_COUNT = 1 << 20
"""Users of a shared file; a file that says more is none of torch's."""

_FOLDER = Path("/dev/shm")
_NAME = re.compile(r"/torch_[0-9]{1,10}_[0-9]{1,20}_[0-9]{1,20}")
_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY

_FUTEX_CALLS = {"x86_64": 202, "aarch64": 98}
_FUTEX_WAKE_OP = 5
_ADD_MINUS_ONE = 1 << 28 | 0xFFF << 12


class ForeignMemory:
    """The tensors of a payload as `(name, data)`, which may be staged until `close`.

    CUDA memory is opened for the current stream, which waits for the sender; close it when that is done with it, under
    the same stream, which torch then waits for. `WeightUpdateError` where there is no such memory. Of ranks that read
    the same files one `counts_down`.
    """

    def __init__(self, payload: Payload, *, counts_down: bool = True) -> None:
        self._counts_down = counts_down
        self.tensors: list[tuple[str, TensorData]] = []
        self._opened = ExitStack()
        self._files: dict[SharedFile, OpenFile] = {}
        self._whole: dict[SharedFile, torch.Tensor] = {}
        self._devices: dict[CudaHandle, torch.Tensor] = {}
        try:
            for shared in payload.files:
                self._open(shared)
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
        """Give all memory back to its senders. `tensors` is empty then."""
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

    def _open(self, shared: SharedFile) -> None:
        """Open a file, if it is not open yet, and count it down in the end: once for each time that it was sent."""
        if shared not in self._files:
            self._files[shared] = self._opened.enter_context(_shared_file(shared))
        if self._counts_down:
            self._opened.callback(_count_down, self._files[shared])

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


def _shared_file(shared: SharedFile) -> OpenFile:
    """A file of torch's sharing, open and checked."""
    if not _NAME.fullmatch(shared.handle):
        raise _refused(shared, "is not named as torch names shared memory")
    path = _FOLDER / shared.handle[1:]
    try:
        file = OpenFile(path, os.open(path, _FLAGS))
    except OSError as error:
        raise _refused(
            shared, f"cannot be opened: {error.strerror}. Is its sender on this host, and still there?"
        ) from None
    try:
        _check(shared, os.fstat(file.stream.fileno()))
        if not 1 <= _count(file) <= MAX_COUNT:
            raise _refused(shared, f"says that {_count(file)} use it")
    except BaseException:
        file.stream.close()
        raise
    return file


def _check(shared: SharedFile, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        raise _refused(shared, "is not a regular file of this user")
    if found.st_size < HEADER_BYTES + shared.num_bytes:
        raise _refused(shared, f"has {found.st_size} bytes, not {HEADER_BYTES} and {shared.num_bytes}")
    if platform.machine() not in _FUTEX_CALLS:
        raise _refused(shared, f"cannot be given back on {platform.machine()}")


def _count(file: OpenFile) -> int:
    return int.from_bytes(file.read(0, 4), "little", signed=True)


def _count_down(file: OpenFile) -> None:
    """One user of the file less. The last one takes its name away; its memory goes with the last that has it open."""
    try:
        with mmap.mmap(file.stream.fileno(), HEADER_BYTES) as header:
            _add_minus_one(header)
        if _count(file) <= 0:
            file.path.unlink(missing_ok=True)
    except (OSError, ValueError, CheckpointError):
        return  # its sender cut it short: there is no count any more


def _add_minus_one(header: mmap.mmap) -> None:
    """Atomically, among processes: a futex call that wakes nobody, and changes a word on its way."""
    word = ctypes.c_int32.from_buffer(header)
    at = ctypes.c_void_p(ctypes.addressof(word))
    call = ctypes.c_long(_FUTEX_CALLS[platform.machine()])
    library = ctypes.CDLL(None, use_errno=True)
    failed = library.syscall(call, at, _FUTEX_WAKE_OP, 0, ctypes.c_void_p(0), at, _ADD_MINUS_ONE) < 0
    del word  # which holds the mapping
    if failed:
        raise OSError(ctypes.get_errno(), "futex")


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


def _refused(shared: SharedFile, problem: str) -> WeightUpdateError:
    return WeightUpdateError(f"shared memory {shared.handle} {problem}", field=FIELD)
