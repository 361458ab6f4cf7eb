"""What other engines' clients send as weights (SGLang's `serialized_named_tensors`), read into values.

A payload is `[(name, tensor), ...]`, where a tensor may be a `LocalSerializedTensor` (one payload for each rank), or
`{"flattened_tensor": tensor, "metadata": [FlattenedTensorMetadata, ...]}`, in the format of Python's object serializer.
`foreign_machine` runs that program, `foreign_table` says what it may name, and here is what it leaves. What comes out
is consistent with itself; what is not understood is a `WeightUpdateError` that says what. Whether there is such memory,
and what is in it, is another matter (`foreign_memory`).

Owns the shapes of payloads. Must not know sessions or torch, and opens nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import msgspec

from headrace.types.errors import WeightUpdateError
from headrace.types.foreign import FIELD, FlatBucket, FlatTensor, ForeignTensor, Payload, SharedFile
from headrace.types.weights import ELEMENT_BYTES, MAX_TENSORS
from headrace.weights.foreign_machine import Budget, Instance, Known, Machine, Unreadable, shown_kind
from headrace.weights.foreign_table import (
    MAX_SIZE,
    METADATA,
    NCCL_TABLE,
    TABLE,
    dtype_of,
    name_of,
    shape_of,
    typed,
)


def read_payload(data: bytes, rank: int = 0) -> Payload:
    """The payload of `rank`, checked. Nothing is imported, called or opened. `WeightUpdateError` says what it is that
    was not understood."""
    try:
        budget = Budget(len(data))
        return _payload(Machine(data, TABLE, budget).run(), rank, budget)
    except Unreadable as error:
        raise WeightUpdateError(f"the payload is not understood: {error}", field=FIELD) from None


def read_nccl_id(data: bytes) -> bytes:
    """The 128 bytes of an NCCL id, as vLLM's trainers publish it. `WeightUpdateError` for whatever else."""
    try:
        found = Machine(data, NCCL_TABLE, Budget(len(data))).run()
    except Unreadable as error:
        raise WeightUpdateError(f"the NCCL id is not understood: {error}", field="nccl_unique_id") from None
    if type(found) is not bytes:
        raise WeightUpdateError(f"the NCCL id is a {shown_kind(found)}", field="nccl_unique_id")
    return found


# What the value that a program leaves means.


def _payload(value: object, rank: int, budget: Budget) -> Payload:
    if type(value) is dict:
        bucket = _bucket(value)
        names, storages = [tensor.name for tensor in bucket.tensors], [bucket.memory.storage]
        payload = Payload(buckets=(bucket,))
    elif type(value) in (list, tuple):
        tensors = _tensors(value, rank, budget)
        names, storages = [tensor.name for tensor in tensors], [tensor.storage for tensor in tensors]
        payload = Payload(tensors=tensors)
    else:
        raise Unreadable(f"it is a {shown_kind(value)}, neither a list of named tensors nor a flattened bucket")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise Unreadable(f"the tensor {twice[0]} comes twice")
    sent = {id(storage): storage for storage in storages if isinstance(storage, SharedFile)}
    return msgspec.structs.replace(payload, files=tuple(sent.values()))


def _tensors(items: Any, rank: int, budget: Budget) -> tuple[ForeignTensor, ...]:
    if len(items) > MAX_TENSORS:
        raise Unreadable(f"it has {len(items)} tensors, at most {MAX_TENSORS} may be")
    found = []
    for item in items:
        name, value = typed("a named tensor", item, str, object)
        if isinstance(value, Instance):
            value = _of_rank(value, rank, budget)
        if not isinstance(value, ForeignTensor):
            raise Unreadable(f"the tensor {name_of(name)} is a {shown_kind(value)}")
        found.append(msgspec.structs.replace(value, name=name_of(name)))
    return tuple(found)


def _of_rank(instance: Instance, rank: int, budget: Budget) -> object:
    """The tensor of one rank: the bytes are a payload of their own, without ranks."""
    values = (instance.state or {}).get("values")
    if type(values) is not list or not 0 <= rank < len(values) or type(values[rank]) is not bytes:
        raise Unreadable(f"a {instance.known.name} has no bytes for rank {rank}")
    budget.reread(len(values[rank]))
    return Machine(values[rank], TABLE, budget).run()


def _bucket(value: dict[str, Any]) -> FlatBucket:
    memory, metadata = value.get("flattened_tensor"), value.get("metadata")
    if value.keys() != {"flattened_tensor", "metadata"} or not isinstance(metadata, list | tuple):
        raise Unreadable("a flattened bucket has other keys than flattened_tensor and a list metadata")
    if not isinstance(memory, ForeignTensor) or memory.dtype != "uint8" or memory.stride != (1,):
        raise Unreadable("the flattened_tensor of a bucket is not a contiguous tensor of uint8")
    if len(metadata) > MAX_TENSORS:
        raise Unreadable(f"a bucket has {len(metadata)} tensors, at most {MAX_TENSORS} may be")
    tensors = tuple(_flat_tensor(item) for item in metadata)
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.end)):
        if tensor.start < end:
            raise Unreadable(f"the tensor {tensor.name} begins at byte {tensor.start}, the one before it ends at {end}")
        end = tensor.end
    if end > memory.shape[0]:
        raise Unreadable(f"a bucket of {memory.shape[0]} bytes has a tensor that ends at byte {end}")
    return FlatBucket(memory, tensors)


def _flat_tensor(item: object) -> FlatTensor:
    state = item.state if isinstance(item, Instance) and item.known.fields == METADATA else None
    if state is None:
        raise Unreadable(f"the metadata of a bucket has a {shown_kind(item)}")
    keys = ("name", "shape", "dtype", "start_idx", "end_idx", "numel")
    values = tuple(state[key] for key in keys)
    name, shape, dtype, start, end, num_elements = typed(
        "a tensor of a bucket", values, str, tuple, Known, int, int, int
    )
    found = FlatTensor(name_of(name), shape_of(shape), dtype_of(dtype), start, end)
    count = math.prod(found.shape)
    num_bytes = count * ELEMENT_BYTES[found.dtype]
    # SGLang says the number of bytes, its name notwithstanding; others the number of elements.
    if not 0 <= start <= end < MAX_SIZE or end - start != num_bytes or num_elements not in (count, num_bytes):
        message = f"the tensor {found.name} of {num_bytes} bytes and {count} elements has bytes {start} to {end}"
        raise Unreadable(f"{message} and numel {num_elements}")
    return found
