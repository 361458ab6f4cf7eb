"""Payloads as other engines' clients make them: with torch's own sharing, and stand-ins for the classes they name."""

from __future__ import annotations

import ctypes
import io
import pickle
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing
from torch.multiprocessing import reductions

BUCKET_HOMES = (
    "sglang.srt.weight_sync.tensor_bucket",
    "sglang.srt.model_executor.model_runner",
    "nemo_rl.models.generation.sglang.utils.train_utils",
)
LOCAL_HOMES = (
    "sglang.srt.model_executor.model_runner",
    "sglang.srt.model_executor.weight_updater",
    "sglang.srt.model_executor.model_runner_components.weight_updater",
)
CUDA_HOMES = (
    "sglang.srt.utils.patch_torch",
    "sglang.srt.patch_torch",
    "nemo_rl.models.generation.sglang.utils.train_utils",
)
NCCL_HOMES = (
    "vllm.distributed.device_communicators.pynccl_wrapper",
    "sglang.srt.distributed.device_communicators.pynccl_wrapper",
)
UUID = "GPU-0a1b2c3d-1111-2222-3333-444455556666"


@contextmanager
def standing_in(home: str, thing: Any) -> Iterator[Any]:
    """`thing`, a class or function, as if it were of the module `home`, for as long as it is written."""
    names = [home.rsplit(".", depth)[0] for depth in range(home.count("."), 0, -1)] + [home]
    made = {name: types.ModuleType(name) for name in names if name not in sys.modules}
    sys.modules.update(made)
    thing.__module__, thing.__qualname__ = home, thing.__name__
    setattr(sys.modules[home], thing.__name__, thing)
    try:
        yield thing
    finally:
        for name in made:
            del sys.modules[name]


@contextmanager
def sharing(strategy: str) -> Iterator[None]:
    """torch's sharing strategy, for a while."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy(strategy)
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


def serialized(value: object, protocol: int | None = None, strategy: str = "file_system") -> bytes:
    """What SGLang's `MultiprocessingSerializer` makes of a value."""
    with sharing(strategy):
        stream = io.BytesIO()
        ForkingPickler(stream, protocol).dump(value)
        return stream.getvalue()


class Reduced:
    """Is written as a call of `function`, which the reader of the bytes is to make."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self._reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self._reduced


def flattened(tensors: dict[str, torch.Tensor], home: str = BUCKET_HOMES[0], protocol: int | None = None) -> bytes:
    """A flattened bucket of these tensors, as SGLang's `FlattenedTensorBucket` lays it out."""

    @dataclass
    class FlattenedTensorMetadata:
        name: str
        shape: torch.Size
        dtype: torch.dtype
        start_idx: int
        end_idx: int
        numel: int

    with standing_in(home, FlattenedTensorMetadata):
        flats = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors.values()]
        metadata, at = [], 0
        for (name, tensor), flat in zip(tensors.items(), flats, strict=True):
            end = at + len(flat)
            metadata.append(FlattenedTensorMetadata(name, tensor.shape, tensor.dtype, at, end, len(flat)))
            at = end
        memory = torch.cat(flats) if flats else torch.empty(0, dtype=torch.uint8)
        return serialized({"flattened_tensor": memory, "metadata": metadata}, protocol)


def local(tensors: dict[str, list[bytes | None]], home: str = LOCAL_HOMES[0], protocol: int | None = None) -> bytes:
    """Named tensors of which each rank has bytes of its own, as verl sends them."""

    @dataclass
    class LocalSerializedTensor:
        values: list[bytes | None]

    with standing_in(home, LocalSerializedTensor):
        return serialized([(name, LocalSerializedTensor(values)) for name, values in tensors.items()], protocol)


def cuda_arguments(tensor: torch.Tensor, **changes: object) -> tuple[object, ...]:
    """What torch's `reduce_tensor` says of a CUDA tensor, for one that looks like this."""
    found: dict[str, object] = {
        "tensor_cls": type(tensor), "tensor_size": tensor.size(), "tensor_stride": tensor.stride(),
        "tensor_offset": tensor.storage_offset(), "storage_cls": torch.storage.TypedStorage, "dtype": tensor.dtype,
        "storage_device": 0, "storage_handle": b"\x02c" + bytes(range(64)),
        "storage_size_bytes": tensor.untyped_storage().nbytes(), "storage_offset_bytes": 512,
        "requires_grad": tensor.requires_grad, "ref_counter_handle": b"/torch_77_1234_5", "ref_counter_offset": 7,
        "event_handle": bytes(64), "event_sync_required": True,
    }  # fmt: skip
    assert found.keys() >= changes.keys()
    return tuple((found | changes).values())


def cuda_call(tensor: torch.Tensor, **changes: object) -> Reduced:
    """A CUDA tensor as torch itself writes it."""
    return Reduced(reductions.rebuild_cuda_tensor, *cuda_arguments(tensor, **changes))


def patched_cuda(tensor: torch.Tensor, home: str = CUDA_HOMES[0]) -> bytes:
    """A CUDA tensor as SGLang's patch of torch writes it: with the device's UUID."""

    def _rebuild_cuda_tensor_modified(*arguments: object) -> None:
        raise AssertionError("called")

    with standing_in(home, _rebuild_cuda_tensor_modified) as function:
        arguments = cuda_arguments(tensor, storage_device=UUID)
        return serialized([("weight", Reduced(function, *arguments))])


def nccl_id(data: bytes, home: str = NCCL_HOMES[0], protocol: int = 4) -> bytes:
    """What vLLM's trainer puts into the store for the other ranks."""

    class ncclUniqueId(ctypes.Structure):
        _fields_ = [("internal", ctypes.c_byte * len(data))]

    with standing_in(home, ncclUniqueId) as kind:
        return pickle.dumps(kind.from_buffer_copy(data), protocol)
