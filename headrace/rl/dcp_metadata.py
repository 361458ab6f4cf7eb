"""The metadata of a checkpoint of `torch.distributed.checkpoint`, which Megatron-Core's `torch_dist` format is as well:
which tensors it has, and where their chunks are.

It is a program that makes Python objects. `headrace.weights.foreign_machine` reads it with a table of names of its own:
nothing is imported or called on its behalf. Owns that table, and what is believed of it. Must not know torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import msgspec

from headrace.types.errors import CheckpointError
from headrace.types.weights import ELEMENT_BYTES, MAX_TENSOR_NAME, shape_problem
from headrace.weights.boxes import Box, find_overlap
from headrace.weights.foreign_machine import Budget, Instance, Known, Machine, Unreadable

METADATA = ".metadata"
MAX_OPCODES = 1 << 25
"""A chunk takes some 60: half a million of them."""

_TORCH = "torch.distributed.checkpoint"


class StoredChunk(msgspec.Struct, frozen=True):
    """A box of a tensor: `length` bytes of a file from `offset` on are what `torch.save` made of it."""

    box: Box
    file: str
    offset: int
    length: int


class StoredTensor(msgspec.Struct, frozen=True):
    """A tensor of a checkpoint; its chunks cover it, each element once."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[StoredChunk, ...]


def _size(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    (sizes,) = arguments if len(arguments) == 1 else (None,)
    if type(sizes) is not tuple or any(type(size) is not int for size in sizes):
        raise Unreadable("a torch.Size is not of integers")
    found: tuple[int, ...] = sizes
    return found


def _nothing(arguments: tuple[Any, ...]) -> None:
    """A value that means nothing here."""


def _fields(module: str, name: str, fields: str, more: str = "", **extra: Any) -> Known:
    return Known(f"{_TORCH}.{module}", name, fields=frozenset(fields.split()), more=frozenset(more.split()), **extra)


_KNOWN = (
    _fields("metadata", "Metadata", "state_dict_metadata storage_data", "planner_data storage_meta version mcore_data"),
    _fields("metadata", "TensorStorageMetadata", "properties size chunks"),
    _fields("metadata", "TensorProperties", "", num_values=5),
    _fields("metadata", "ChunkStorageMetadata", "offsets sizes"),
    _fields("metadata", "BytesStorageMetadata", ""),
    _fields("metadata", "MetadataIndex", "fqn", "offset index", is_key=True),
    _fields("metadata", "StorageMeta", "", "checkpoint_id save_id load_id modules"),
    _fields("filesystem", "_StorageInfo", "relative_path offset length", "transform_descriptors"),
    Known(f"{_TORCH}.metadata", "_MEM_FORMAT_ENCODING", build=_nothing),
    Known("torch.serialization", "_get_layout", build=_nothing),
    Known("torch", "Size", build=_size),
    *(Known("torch", name) for name in (*ELEMENT_BYTES, "strided", "complex128", "float8_e4m3fnuz", "float8_e5m2fnuz")),
    *(
        Known(module, f"{kind}Path", build=_nothing)
        for module in ("pathlib", "pathlib._local")
        for kind in ("Posix", "Windows", "PurePosix", "PureWindows")
    ),
    Known("collections", "OrderedDict", build=lambda _: {}),
)
TABLE = {(known.module, known.name): known for known in _KNOWN}
"""All that metadata may name."""


def read_metadata(data: bytes, where: str) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint, by name. `where` is for messages.

    `CheckpointError` for metadata that names or holds anything else than what `torch.distributed.checkpoint.save`
    writes, and for a tensor of which chunks overlap or lack a part.
    """
    try:
        root = Machine(data, TABLE, Budget(len(data), MAX_OPCODES)).run()
        return dict(_tensors(root))
    except Unreadable as error:
        message = f"{where} is no metadata of torch.distributed.checkpoint as this version reads it: {error}"
        raise CheckpointError(message, field=METADATA) from None


def _tensors(root: object) -> Iterator[tuple[str, StoredTensor]]:
    state = _state(root, "Metadata")
    places = _places(state["storage_data"])
    for name, entry in _pairs(state["state_dict_metadata"]):
        if type(name) is not str or len(name) > MAX_TENSOR_NAME:
            raise Unreadable("a tensor has a name that is none")
        if isinstance(entry, Instance) and entry.known.name == "BytesStorageMetadata":
            continue
        fields = _state(entry, "TensorStorageMetadata")
        shape, dtype = _shape(fields["size"]), _dtype(fields["properties"])
        if type(fields["chunks"]) is not list:
            raise Unreadable(f"{name} has no list of chunks")
        chunks = tuple(_chunk(name, each, places) for each in fields["chunks"])
        boxes = [chunk.box for chunk in chunks if chunk.box.num_elements]
        is_whole = all(box.is_inside(shape) for box in boxes) and sum(box.num_elements for box in boxes) == math.prod(
            shape
        )
        if not is_whole or (shape and find_overlap(boxes) is not None):
            raise Unreadable(f"the chunks of {name} are not all of it, once")
        yield name, StoredTensor(shape, dtype, chunks)


def _places(table: object) -> dict[tuple[str, tuple[int, ...] | None], tuple[str, int, int]]:
    """Where chunks are, by the tensor's name and the chunk's offset in it."""
    places = {}
    for key, info in _pairs(table):
        index, place = _state(key, "MetadataIndex"), _state(info, "_StorageInfo")
        file, offset, length = place["relative_path"], place["offset"], place["length"]
        if type(file) is not str or PurePath(file).name != file or file in ("", ".", "..") or "\0" in file:
            raise Unreadable("a chunk is in what is no file of the folder")
        if type(index["fqn"]) is not str:
            raise Unreadable("a chunk is of a tensor that has no name")
        if type(offset) is not int or type(length) is not int or min(offset, length) < 0:
            raise Unreadable(f"a chunk of {file} has no place in it")
        if place.get("transform_descriptors"):
            raise Unreadable(f"{file} is compressed or encrypted: save it without transforms")
        offsets = index.get("offset")
        places[index["fqn"], None if offsets is None else _shape(offsets)] = (file, offset, length)
    return places


def _chunk(name: str, entry: object, places: dict[Any, tuple[str, int, int]]) -> StoredChunk:
    fields = _state(entry, "ChunkStorageMetadata")
    box = Box(_shape(fields["offsets"]), _shape(fields["sizes"]))
    if len(box.start) != len(box.shape):
        raise Unreadable(f"a chunk of {name} has sizes of {len(box.shape)} axes and offsets of {len(box.start)}")
    place = places.get((name, box.start)) or places.get((name, None))
    if place is None:
        raise Unreadable(f"the chunk of {name} at {list(box.start)} is in no file")
    return StoredChunk(box, *place)


def _state(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, Instance) or value.known.name != name or value.state is None:
        raise Unreadable(f"there is no {name} where one should be")
    state: dict[str, Any] = value.state
    return state


def _pairs(value: object) -> Iterator[tuple[Any, Any]]:
    if type(value) is not dict:
        raise Unreadable("there is no dict where one should be")
    return iter(value.items())


def _shape(value: object) -> tuple[int, ...]:
    if type(value) is not tuple or shape_problem(value):
        raise Unreadable("there is no shape where one should be")
    return value


def _dtype(properties: object) -> str:
    if not isinstance(properties, Instance) or type(properties.state) is not tuple:
        raise Unreadable("a tensor has no properties")
    dtype = properties.state[0]
    if not isinstance(dtype, Known) or dtype.module != "torch":
        raise Unreadable("a tensor has no dtype")
    return dtype.name
