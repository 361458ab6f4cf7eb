"""Folders of saved weights: which tensors are in which file, the bytes around them, and the record that proves them.

Owns names and formats. Writes nothing (`headrace.weights.save_target`), and must not know live memory (no torch).

A save is of one of two layouts. "hf": tensors under their Hugging Face names, in `model.safetensors` or in shards with
an index. "sharded": for each rank `model-rank-R-of-N.safetensors`, its parameters as they lie. Either has a `Record`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Literal

import msgspec

from headrace.config.json_bounds import MODEL_FILE, excess
from headrace.types.errors import CheckpointError
from headrace.types.weights import TensorInfo
from headrace.weights.files import WEIGHT_ENDINGS, Folder, OpenFile

RECORD = "headrace.json"
INDEX = "model.safetensors.index.json"
LENGTH_BYTES = 8
"""Before a safetensors header: its length, little-endian."""

DTYPES = {
    "F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "C64": "complex64", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
}  # fmt: skip
"""The safetensors format's dtypes."""

_NAMES = {name: tag for tag, name in DTYPES.items()}
_ALIGNMENT = 8
_MAX_RECORD_BYTES = 32 << 20
_BLOCK_BYTES = 1 << 20


class SavedFile(msgspec.Struct, frozen=True):
    """A file of a save."""

    size: int
    sha256: str

    @classmethod
    def of(cls, data: bytes) -> SavedFile:
        """A file that holds this."""
        return cls(len(data), hashlib.sha256(data).hexdigest())


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What a save wrote: its files, and the digest of each tensor (`Engine.digest`) as it was live.

    `num_ranks` of a "sharded" one is that of the engine that can load it.
    """

    version: str
    layout: Literal["hf", "sharded"]
    num_ranks: int = 1
    digests: dict[str, str]
    files: dict[str, SavedFile] = {}


class WeightFile(msgspec.Struct, frozen=True):
    """A safetensors file to be written: these tensors, back to back; with a `rank`, parameters of that rank."""

    name: str
    tensors: tuple[TensorInfo, ...]
    rank: int | None = None

    def head(self) -> bytes:
        """All of the file that is ahead of its tensors."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for info in self.tensors:
            start, end = end, end + info.num_bytes
            entries[info.name] = {"dtype": _NAMES[info.dtype], "shape": info.shape, "data_offsets": (start, end)}
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % _ALIGNMENT)
        return len(header).to_bytes(LENGTH_BYTES, "little") + header


def hf_files(tensors: Sequence[TensorInfo], max_shard_bytes: int, mark: str = "") -> list[WeightFile]:
    """Shards of at most so many bytes, unless one tensor has more; one file where that is enough. With a `mark` in
    their names they are never one file: an index says which are meant."""
    shards: list[list[TensorInfo]] = [[]]
    used = 0
    for info in tensors:
        if shards[-1] and used + info.num_bytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(info)
        used += info.num_bytes
    if len(shards) == 1 and not mark:
        return [WeightFile("model.safetensors", tuple(tensors))]
    stem = f"model-{mark}-" if mark else "model-"
    names = (f"{stem}{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1))
    return [WeightFile(name, tuple(shard)) for name, shard in zip(names, shards, strict=True)]


def rank_file(rank: int, num_ranks: int) -> str:
    """The name of a rank's file."""
    return f"model-rank-{rank}-of-{num_ranks}.safetensors"


def rank_files(parameters: Sequence[Sequence[TensorInfo]]) -> list[WeightFile]:
    """A file for each rank, of its parameters."""
    return [WeightFile(rank_file(rank, len(parameters)), tuple(held), rank) for rank, held in enumerate(parameters)]


def index_of(files: Iterable[WeightFile]) -> bytes:
    """The index of several files in the "hf" layout."""
    places = {info.name: (file.name, info.num_bytes) for file in files for info in file.tensors}
    sizes = {"total_size": sum(size for _, size in places.values())}
    index = {"metadata": sizes, "weight_map": {name: file for name, (file, _) in places.items()}}
    return json.dumps(index, indent=2).encode() + b"\n"


def read_record(folder: Folder) -> Record:
    """The record of a folder. `CheckpointError` for one that has none, or another."""
    opened = folder.open(RECORD)
    if opened is None:
        message = f"{folder.path} has no {RECORD}: no save of Headrace wrote it, or not to its end"
        raise CheckpointError(message, field=RECORD)
    with opened:
        return record_of(opened)


def record_of(file: OpenFile) -> Record:
    """The record that a file holds. `CheckpointError` if it is none."""
    size = file.state().size
    raw = file.read(0, min(size, _MAX_RECORD_BYTES))
    try:
        if size > _MAX_RECORD_BYTES:
            raise ValueError(f"it has {size} bytes")
        return parse_record(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.path} is no record of a save: {error}", field=RECORD) from None


def parse_record(raw: bytes) -> Record:
    """A record. Raises `ValueError` or `RecursionError` for what is none."""
    too_much = excess(raw, MODEL_FILE)
    if too_much is not None:
        raise ValueError(f"it has {too_much} or more")
    record = msgspec.json.decode(raw, type=Record)
    for name in record.files:
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts or "\0" in name:
            raise ValueError(f"{name!r} is no file of it")
    return record


def shown_record(record: Record) -> bytes:
    """A record as its file holds it."""
    return msgspec.json.format(msgspec.json.encode(record)) + b"\n"


def hash_of(file: OpenFile) -> SavedFile:
    """What a file holds now."""
    total, size = hashlib.sha256(), file.state().size
    for start in range(0, size, _BLOCK_BYTES):
        total.update(file.read(start, min(_BLOCK_BYTES, size - start)))
    return SavedFile(size, total.hexdigest())


def check_saved_model(path: str | Path, root: str | Path = "") -> Record:
    """Hold every file of a saved folder against the digests that the save recorded; returns the record.

    `CheckpointError` naming a file that is missing, that differs, or that holds weights and is not of the save. With a
    `root` nothing outside it is read.
    """
    folder = Folder(Path(path).expanduser(), Path(root) if root else None)
    record = read_record(folder)
    for name, expected in record.files.items():
        opened = folder.open(name)
        if opened is None:
            raise CheckpointError(f"{folder.path / name} is missing", field=name)
        with opened:
            found = hash_of(opened)
        if found != expected:
            what = "size" if found.size != expected.size else "SHA-256"
            raise CheckpointError(f"{opened.path} has another {what} than was saved", field=name)
    for entry in sorted(folder.path.iterdir()):
        if entry.name.endswith(WEIGHT_ENDINGS) and entry.name not in record.files:
            raise CheckpointError(f"{entry} is a weight file that is not of the save", field=entry.name)
    return record
