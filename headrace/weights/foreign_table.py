"""What a foreign payload may name, and what its functions make of their arguments: the closed table.

A function here checks its arguments one by one and makes a value of ours; the function that has its name elsewhere is
never looked up. Texts instead of values are hints about what is known and refused.

Owns the table. Must not know what a payload is as a whole.
"""

from __future__ import annotations

import math
import re
from typing import Any

import msgspec

from headrace.types.foreign import CudaHandle, ForeignTensor, NoMemory, SharedFile, Storage
from headrace.types.weights import ELEMENT_BYTES, MAX_TENSOR_NAME, shape_problem
from headrace.weights.foreign_machine import Known, Table, Unreadable, shown_kind, text_of

IPC_HANDLE_BYTES = 64
"""Of CUDA's handles of memory and of events."""

REF_COUNTERS = 10_000
"""Counters in a file of torch's CUDA reference counts. torch counts down wherever it is told to: it is checked here."""

NCCL_ID_BYTES = 128

MAX_SIZE = 1 << 63
"""Sizes, strides and offsets are below."""

_COUNTER_FILE = re.compile(r"/torch_[0-9A-Za-z_]{1,200}")


def typed(what: str, values: object, *kinds: type) -> tuple[Any, ...]:
    """The same values, if there are as many and each is exactly of its kind."""
    if type(values) is not tuple or len(values) != len(kinds):
        raise Unreadable(f"{what} is not of {len(kinds)} values")
    for value, kind in zip(values, kinds, strict=True):
        if kind is not object and type(value) is not kind:
            raise Unreadable(f"{what} has a {shown_kind(value)} for a {kind.__name__}")
    return values


def name_of(name: str) -> str:
    """The same name of a tensor, if it may be one."""
    if not name or len(name) > MAX_TENSOR_NAME:
        raise Unreadable(f"a tensor's name has {len(name)} characters")
    return name


def shape_of(shape: tuple[Any, ...]) -> tuple[int, ...]:
    """The same shape, if a tensor may have it."""
    problem = shape_problem(shape)
    if problem:
        raise Unreadable(f"a tensor {problem}")
    if math.prod(shape) >= MAX_SIZE // max(ELEMENT_BYTES.values()):
        raise Unreadable("a tensor has 2^60 elements or more")
    return shape


def dtype_of(known: Known) -> str:
    """The name of a dtype, as in "bfloat16"."""
    if known.module != "torch" or known.name not in ELEMENT_BYTES:
        raise Unreadable(f"{shown_kind(known)} is no dtype")
    return known.name


def _bounded(**values: int) -> None:
    for name, value in values.items():
        if not 0 <= value < MAX_SIZE:
            raise Unreadable(f"{name} is not a number from 0 to 2^63 - 1")


def _tensor(kind: Known, dtype: str, shape: Any, stride: Any, offset: int, storage: Storage) -> ForeignTensor:
    """A tensor over a storage, every element of which lies inside."""
    if kind not in _TENSOR_CLASSES:
        raise Unreadable(f"a tensor is a {shown_kind(kind)}: {_WHOLE_HINT}")
    shape = shape_of(shape)
    if len(stride) != len(shape) or shape_problem(stride):
        raise Unreadable("a tensor has strides that do not fit its shape")
    _bounded(storage_offset=offset)
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    needed = (offset + last + 1) * ELEMENT_BYTES[dtype] if math.prod(shape) else 0
    if needed > storage.num_bytes:
        raise Unreadable(f"a tensor needs {needed} bytes of its storage, which has {storage.num_bytes}")
    return ForeignTensor("", dtype, shape, stride, offset, storage)


# What the functions of the table make of their arguments.


class _Typed(msgspec.Struct, frozen=True):
    storage: Storage
    dtype: str


def _latin_1(arguments: tuple[Any, ...]) -> bytes:
    text, encoding = typed("_codecs.encode", arguments, str, str)
    if encoding != "latin1" or any(ord(letter) > 0xFF for letter in text):
        raise Unreadable("_codecs.encode is not of latin1")
    return bytes(text, "latin-1")


def _empty(kind: type) -> Any:
    def build(arguments: tuple[Any, ...]) -> object:
        if arguments:
            raise Unreadable(f"a {kind.__name__} is made of arguments")
        return kind()

    return build


def _size(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    return shape_of(typed("torch.Size", arguments, tuple)[0])


def _device(arguments: tuple[Any, ...]) -> int:
    """The ordinal of a CUDA device."""
    kind, index = typed("torch.device", arguments, str, int)
    if kind != "cuda":
        raise Unreadable("a torch.device is no CUDA device")
    return int(index)


def _shared_file(arguments: tuple[Any, ...]) -> SharedFile:
    arguments, dtype = (arguments[:4], arguments[4]) if len(arguments) == 5 else (arguments, None)
    kind, manager, handle, size = typed("rebuild_storage_filename", arguments, Known, bytes, bytes, int)
    element = 1 if dtype is None else ELEMENT_BYTES[dtype_of(*typed("a storage's dtype", (dtype,), Known))]
    _bounded(size=size * element)
    if kind not in _STORAGE_CLASSES or max(len(manager), len(handle)) > 255:
        raise Unreadable("rebuild_storage_filename makes no storage")
    return SharedFile(text_of(manager), text_of(handle, "ascii"), size * element)


def _empty_storage(arguments: tuple[Any, ...]) -> NoMemory:
    (kind,) = typed("rebuild_storage_empty", arguments, Known)
    if kind not in _STORAGE_CLASSES:
        raise Unreadable("rebuild_storage_empty makes no storage")
    return NoMemory()


def _typed_storage(arguments: tuple[Any, ...]) -> _Typed:
    storage, dtype = typed("rebuild_typed_storage", arguments, object, Known)
    if not isinstance(storage, SharedFile | NoMemory):
        raise Unreadable(f"rebuild_typed_storage has a {shown_kind(storage)} for a storage")
    return _Typed(storage, dtype_of(dtype))


def _cpu_tensor(arguments: tuple[Any, ...]) -> ForeignTensor:
    kind, found, metadata = typed("rebuild_tensor", arguments, Known, _Typed, tuple)
    offset, shape, stride, _ = typed("rebuild_tensor's metadata", metadata, int, tuple, tuple, bool)
    return _tensor(kind, found.dtype, shape, stride, offset, found.storage)


def _parameter(arguments: tuple[Any, ...]) -> object:
    data, _, hooks = typed("_rebuild_parameter", arguments, ForeignTensor, bool, dict)
    if hooks:
        raise Unreadable("a parameter has hooks")
    return data


def _cuda_tensor(arguments: tuple[Any, ...]) -> ForeignTensor:
    kinds = (Known, tuple, tuple, int, Known, Known, object, object, int, int, bool, object, int, object, bool)
    found = typed("rebuild_cuda_tensor", arguments, *kinds)
    kind, shape, stride, offset, storage_kind, dtype, device, handle, num_bytes, start, _, *counting = found
    if storage_kind not in _STORAGE_CLASSES or type(device) not in (int, str):
        raise Unreadable("rebuild_cuda_tensor makes no storage on a device")
    if handle is None or num_bytes == 0:
        return _tensor(kind, dtype_of(dtype), shape, stride, offset, NoMemory())
    counter_file, counter, event, is_synced = counting
    if any(type(value) is not bytes for value in (handle, counter_file, event)):
        raise Unreadable("rebuild_cuda_tensor has a handle that is not of bytes")
    if not _is_plain(handle):
        raise Unreadable(_SEGMENT_HINT)
    if len(event) > IPC_HANDLE_BYTES or (is_synced and len(event) != IPC_HANDLE_BYTES):
        raise Unreadable(f"rebuild_cuda_tensor has an event of {len(event)} bytes")
    _bounded(storage_size_bytes=num_bytes, storage_offset_bytes=start)
    counter_name = text_of(counter_file, "ascii")
    if not _COUNTER_FILE.fullmatch(counter_name) or not 0 <= counter < REF_COUNTERS:
        raise Unreadable(f"rebuild_cuda_tensor counts at {counter} in a file that is none of torch's counters")
    if (type(device) is int and not 0 <= device < 1 << 15) or (type(device) is str and len(device) > 64):
        raise Unreadable("rebuild_cuda_tensor names a device that is none")
    storage = CudaHandle(device, handle, num_bytes, start, counter_name, counter, event, is_synced)
    return _tensor(kind, dtype_of(dtype), shape, stride, offset, storage)


def _is_plain(handle: bytes) -> bool:
    """Whether a handle is of one plain allocation: CUDA's own, which newer torch puts a version and "c" in front of."""
    return len(handle) == IPC_HANDLE_BYTES or (len(handle) == 2 + IPC_HANDLE_BYTES and handle[1:2] == b"c")


def _nccl_id(arguments: tuple[Any, ...]) -> bytes:
    kind, state = typed("_ctypes._unpickle", arguments, Known, tuple)
    fields, found = typed("an ncclUniqueId", state, dict, bytes)
    if kind.name != "ncclUniqueId" or fields or len(found) != NCCL_ID_BYTES:
        raise Unreadable(f"an ncclUniqueId is not of {NCCL_ID_BYTES} bytes and nothing else")
    return bytes(found)


# The closed table.

_REDUCTIONS = "torch.multiprocessing.reductions"
METADATA = frozenset({"name", "shape", "dtype", "start_idx", "end_idx", "numel"})
_SEGMENT_HINT = (
    "a CUDA handle is not of one plain allocation: set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False in the trainer"
)
_CLIENT_HINT = "send weights with headrace.client"
_STRATEGY_HINT = (
    f'which no other process can open: torch.multiprocessing.set_sharing_strategy("file_system"), or {_CLIENT_HINT}'
)
_VALUES_HINT = f"a tensor with its values: use torch's ForkingPickler, or {_CLIENT_HINT}"
_PLAIN_HINT = "send plain tensors"
_WHOLE_HINT = f"{_PLAIN_HINT} (of a DTensor its full_tensor())"


def _table(*entries: Known) -> dict[tuple[str, str], Known | str]:
    return {(entry.module, entry.name): entry for entry in entries}


_TENSOR_CLASSES = (Known("torch", "Tensor"), Known("torch.nn.parameter", "Parameter"))
_STORAGE_CLASSES = (Known("torch.storage", "UntypedStorage"), Known("torch.storage", "TypedStorage"))

TABLE: Table = {
    **_table(*_TENSOR_CLASSES, *_STORAGE_CLASSES, *(Known("torch", name) for name in ELEMENT_BYTES)),
    **_table(
        Known("torch", "Size", _size),
        Known("torch", "device", _device),
        Known("collections", "OrderedDict", _empty(dict)),
        Known("__builtin__", "bytes", _empty(bytes)),
        Known("_codecs", "encode", _latin_1),
        Known("torch._utils", "_rebuild_parameter", _parameter),
        Known(_REDUCTIONS, "rebuild_tensor", _cpu_tensor),
        Known(_REDUCTIONS, "rebuild_typed_storage", _typed_storage),
        Known(_REDUCTIONS, "rebuild_storage_filename", _shared_file),
        Known(_REDUCTIONS, "rebuild_storage_empty", _empty_storage),
        Known(_REDUCTIONS, "rebuild_cuda_tensor", _cuda_tensor),
        Known("sglang.srt.utils.patch_torch", "_rebuild_cuda_tensor_modified", _cuda_tensor),
        Known("sglang.srt.patch_torch", "_rebuild_cuda_tensor_modified", _cuda_tensor),
        Known("nemo_rl.models.generation.sglang.utils.train_utils", "_rebuild_cuda_tensor_modified", _cuda_tensor),
    ),
    **_table(
        *(
            Known(module, "LocalSerializedTensor", fields=frozenset({"values"}))
            for module in (
                "sglang.srt.model_executor.model_runner",
                "sglang.srt.model_executor.weight_updater",
                "sglang.srt.model_executor.model_runner_components.weight_updater",
            )
        ),
        *(
            Known(module, "FlattenedTensorMetadata", fields=METADATA)
            for module in (
                "sglang.srt.weight_sync.tensor_bucket",
                "sglang.srt.model_executor.model_runner",
                "nemo_rl.models.generation.sglang.utils.train_utils",
            )
        ),
    ),
    (_REDUCTIONS, "rebuild_storage_fd"): _STRATEGY_HINT,
    ("multiprocessing.resource_sharer", "DupFd"): _STRATEGY_HINT,
    (_REDUCTIONS, "rebuild_meta_tensor"): "a tensor without values",
    (_REDUCTIONS, "rebuild_nested_tensor"): f"a nested tensor: {_PLAIN_HINT}",
    (_REDUCTIONS, "rebuild_sparse_coo_tensor"): f"a sparse tensor: {_PLAIN_HINT}",
    (_REDUCTIONS, "rebuild_sparse_compressed_tensor"): f"a sparse tensor: {_PLAIN_HINT}",
    ("torch._utils", "_rebuild_tensor_v2"): _VALUES_HINT,
    ("torch._utils", "_rebuild_tensor_v3"): _VALUES_HINT,
    ("torch._tensor", "_rebuild_from_type_v2"): f"a subclass of tensors: {_WHOLE_HINT}",
    ("torch.storage", "_load_from_bytes"): f"which would load whatever it is given: {_CLIENT_HINT}",
}

NCCL_TABLE: Table = _table(
    Known("_ctypes", "_unpickle", _nccl_id),
    Known("vllm.distributed.device_communicators.pynccl_wrapper", "ncclUniqueId"),
    Known("sglang.srt.distributed.device_communicators.pynccl_wrapper", "ncclUniqueId"),
)
