"""What other engines' clients hand over as weights, as values: where memory is, and which tensors are in it.

They are made, and checked, by `headrace.weights.foreign`. No tensors, no I/O.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from headrace.types.weights import TensorInfo

FIELD = "serialized_named_tensors"
"""Of a call, what holds them: the field that errors name."""


class SharedFile(msgspec.Struct, frozen=True, tag=True):
    """Memory of torch's `file_system` sharing: `handle` names a file of /dev/shm, as in "/torch_123_456_0", of a header
    and then `num_bytes`. `manager` is the path of the socket of the sender's torch_shm_manager."""

    manager: str
    handle: str
    num_bytes: int


class CudaHandle(msgspec.Struct, frozen=True, tag=True):
    """Memory of a CUDA device in another process, as torch hands it over.

    `device` is the sender's ordinal or the device's UUID; `handle` that of the allocation, in which `num_bytes` begin
    at `storage_offset_bytes`. The sender keeps them until counter `ref_counter_offset` of the file `ref_counter_handle`
    is counted down; where `event_sync_required` they are good once the event of `event_handle` has happened.
    """

    device: int | str
    handle: bytes
    num_bytes: int
    storage_offset_bytes: int
    ref_counter_handle: str
    ref_counter_offset: int
    event_handle: bytes
    event_sync_required: bool


class NoMemory(msgspec.Struct, frozen=True, tag=True):
    """That of tensors without elements, which have no handle."""

    num_bytes: Literal[0] = 0


Storage = SharedFile | CudaHandle | NoMemory


class ForeignTensor(msgspec.Struct, frozen=True):
    """A tensor somewhere else. `dtype` is as in "bfloat16"; `stride` and `offset` count elements, and every element
    lies inside `storage`. `name` is "" where the payload gives none."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    storage: Storage


class FlatTensor(msgspec.Struct, frozen=True):
    """A tensor in a bucket: row-major, from byte `start` to before byte `end`, as many as shape and dtype say."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    end: int


class FlatBucket(msgspec.Struct, frozen=True):
    """Many tensors one after another in a contiguous one of uint8. No two share a byte."""

    memory: ForeignTensor
    tensors: tuple[FlatTensor, ...]


class Payload(msgspec.Struct, frozen=True):
    """What came: tensors of their own, and buckets. No name comes twice.

    `files` are the shared files as often as they were sent: torch's sender counts a file up for each time, and the
    receiver has to count it down as often. Where whoever received it has done so, `paths` are where each of them, told
    once, may be opened. `of_ranks` are what ranks 1, 2, ... of an engine read instead, each on its own device, the same
    tensors; none: all read this one.
    """

    tensors: tuple[ForeignTensor, ...] = ()
    buckets: tuple[FlatBucket, ...] = ()
    files: tuple[SharedFile, ...] = ()
    paths: tuple[str, ...] = ()
    of_ranks: tuple[Payload, ...] = ()

    @property
    def has_cuda_memory(self) -> bool:
        """Some of this payload's own tensors are on a CUDA device."""
        return any(isinstance(storage, CudaHandle) for storage in self.storages())

    def storages(self) -> list[Storage]:
        """Those of all tensors and buckets."""
        return [tensor.storage for tensor in self.tensors] + [bucket.memory.storage for bucket in self.buckets]

    def manifest(self) -> list[TensorInfo]:
        """All tensors: first those of their own, then those of the buckets."""
        found = [TensorInfo(tensor.name, tensor.shape, tensor.dtype) for tensor in self.tensors]
        return found + [TensorInfo(part.name, part.shape, part.dtype) for each in self.buckets for part in each.tensors]
