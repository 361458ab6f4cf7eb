"""Checkpoint folders of trainers: tensors by name, read box by box from the shards that many ranks have written.

Two kinds: what `torch.distributed.checkpoint.save` writes (FSDP2, and Megatron-Core's `torch_dist`), and a file of
DTensors for each rank, `model_world_size_N_rank_R.pt`, as verl writes them. Owns their files and where a box of a
tensor is. Nothing in them is run: metadata goes through `headrace.rl.dcp_metadata`, tensors through the weights-only
reader of torch. Must not know models.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch

from headrace.rl.dcp_metadata import METADATA, StoredChunk, read_metadata
from headrace.types.errors import CheckpointError
from headrace.types.weights import TensorInfo
from headrace.weights.boxes import Box
from headrace.weights.checkpoint import load_weights_only
from headrace.weights.files import Folder, OpenFile
from headrace.weights.foreign_machine import MAX_BYTES
from headrace.weights.staging import dtype_name

CACHE_BYTES = 1 << 30
"""Of chunks that were read, while other boxes of them are asked for."""

_RANK_FILE = re.compile(r"model_world_size_(\d{1,6})_rank_(\d{1,6})\.pt")
_ITERATION = "latest_checkpointed_iteration.txt"


class TrainerFolder(Protocol):
    """Tensors of a checkpoint, by the names that it has for them."""

    tensors: dict[str, TensorInfo]

    def read(self, name: str, box: Box) -> torch.Tensor:
        """These elements, in the dtype that they are stored in. `CheckpointError` naming the file that is broken."""

    def fingerprint(self) -> str:
        """What changes when a file of the folder is written anew."""


def open_trainer_folder(path: Path) -> TrainerFolder:
    """A folder of either kind. `CheckpointError` naming what it is instead, and what to do."""
    folder = Folder(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder", field="source")
    if folder.state(METADATA) is not None:
        return DcpFolder(path)
    if any(_RANK_FILE.fullmatch(entry.name) for entry in path.iterdir()):
        return RankFiles(path)
    if folder.state(_ITERATION) is not None:
        return open_trainer_folder(path / _iteration(folder))
    legacy = next(iter(sorted(path.glob("mp_rank_*"))), None)
    if legacy is not None:
        message = f'{legacy} is of Megatron\'s format "torch", which stores objects of its own and is not read; have'
        raise CheckpointError(f"{message} Megatron save with --ckpt-format torch_dist", field="source")
    message = f"{path} holds no checkpoint of torch.distributed.checkpoint ({METADATA}), and no files"
    raise CheckpointError(f"{message} model_world_size_N_rank_R.pt", field="source")


def _iteration(folder: Folder) -> str:
    """The subfolder of a Megatron folder that its last iteration is in."""
    opened = folder.open(_ITERATION)
    assert opened is not None, "it has a state"
    with opened:
        text = opened.read(0, min(opened.state().size, 32)).decode("ascii", "replace").strip()
    if text == "release":
        return text
    if not text.isdigit():
        raise CheckpointError(f"{opened.path} names no iteration", field=_ITERATION)
    return f"iter_{int(text):07d}"


class DcpFolder:
    """A checkpoint of `torch.distributed.checkpoint`. A `TrainerFolder`."""

    def __init__(self, path: Path) -> None:
        self._folder = Folder(path)
        with self._opened(METADATA) as file:
            size = file.state().size
            if size > MAX_BYTES:
                raise CheckpointError(f"{file.path} has {size} bytes, at most {MAX_BYTES} are read", field=METADATA)
            self._stored = read_metadata(file.read(0, size), str(file.path))
        self.tensors = {name: TensorInfo(name, each.shape, each.dtype) for name, each in self._stored.items()}
        self._cache: OrderedDict[StoredChunk, torch.Tensor] = OrderedDict()

    def read(self, name: str, box: Box) -> torch.Tensor:
        stored = self._stored[name]
        found = torch.empty(box.shape, dtype=getattr(torch, stored.dtype))
        for chunk in stored.chunks:
            common = chunk.box.common(box) if chunk.box.num_elements and box.shape else chunk.box
            if common is not None:
                values = self._loaded(name, chunk, found.dtype)
                found[common.seen_from(box).slices] = values[common.seen_from(chunk.box).slices]
        return found

    def fingerprint(self) -> str:
        names = sorted({chunk.file for each in self._stored.values() for chunk in each.chunks})
        return _fingerprint(self._folder, [METADATA, *names])

    def _loaded(self, name: str, chunk: StoredChunk, dtype: torch.dtype) -> torch.Tensor:
        """A chunk, as long as there is room for it."""
        found = self._cache.get(chunk)
        if found is None:
            with self._opened(chunk.file) as file:
                if chunk.offset + chunk.length > file.state().size:
                    raise CheckpointError(f"{file.path} ends before {name} does", field=chunk.file)
                data: Any = load_weights_only(io.BytesIO(file.read(chunk.offset, chunk.length)), file.path)
            if not isinstance(data, torch.Tensor) or tuple(data.shape) != chunk.box.shape or data.dtype != dtype:
                message = f"{file.path}: what is stored of {name} is no {dtype_name(dtype)} of {list(chunk.box.shape)}"
                raise CheckpointError(message, field=chunk.file)
            found = self._cache[chunk] = data
            while len(self._cache) > 1 and sum(each.nbytes for each in self._cache.values()) > CACHE_BYTES:
                self._cache.popitem(last=False)
        self._cache.move_to_end(chunk)
        return found

    def _opened(self, name: str) -> OpenFile:
        opened = self._folder.open(name)
        if opened is None:
            raise CheckpointError(f"{self._folder.path / name} is missing", field=name)
        return opened


class _Part(msgspec.Struct, frozen=True):
    """A box of a tensor that a rank's file has."""

    box: Box
    values: torch.Tensor


class RankFiles:
    """Files of DTensors, one of each rank. A `TrainerFolder`. Tensors are mapped, and read when they are asked for."""

    def __init__(self, path: Path) -> None:
        self._folder = Folder(path)
        self._names = self._find(path)
        self._parts: dict[str, list[_Part]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for rank, name in enumerate(self._names):
            for key, tensor in self._load(name):
                self._add(name, rank, key, tensor)
        for key, parts in self._parts.items():
            shape = self.tensors[key].shape
            if sum(each.box.num_elements for each in parts) != torch.Size(shape).numel():
                raise CheckpointError(f"the files of {path} do not have all of {key}", field=key)

    def read(self, name: str, box: Box) -> torch.Tensor:
        found = torch.empty(box.shape, dtype=getattr(torch, self.tensors[name].dtype))
        for part in self._parts[name]:
            common = part.box.common(box) if box.shape else part.box
            if common is not None:
                found[common.seen_from(box).slices] = part.values[common.seen_from(part.box).slices]
        return found

    def fingerprint(self) -> str:
        return _fingerprint(self._folder, self._names)

    def _find(self, path: Path) -> list[str]:
        """The file of every rank, in their order."""
        found = {
            match[0]: (int(match[1]), int(match[2]))
            for entry in path.iterdir()
            if (match := _RANK_FILE.fullmatch(entry.name))
        }
        sizes = {size for size, _ in found.values()}
        if len(sizes) > 1:
            raise CheckpointError(f"{path} has files of {sorted(sizes)} ranks: keep those of one save", field="source")
        names = {rank: name for name, (_, rank) in found.items()}
        (size,) = sizes
        for rank in range(size):
            if rank not in names:
                name = f"model_world_size_{size}_rank_{rank}.pt"
                raise CheckpointError(f"{path / name} is missing", field=name)
        return [names[rank] for rank in range(size)]

    def _load(self, name: str) -> Iterator[tuple[str, Any]]:
        import torch.distributed.tensor  # torch's reader takes DTensors only then

        path = self._folder.path / name
        opened = self._folder.open(name)
        assert opened is not None, "it was listed"
        with opened:
            state = load_weights_only(opened.stream, path, path)
        if not isinstance(state, dict):
            raise CheckpointError(f"{path} does not hold a dict of tensors", field=name)
        for key, tensor in state.items():
            if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
                raise CheckpointError(f"{path}: {key!r} is not a named tensor", field=name)
            yield key, tensor.detach()

    def _add(self, file: str, rank: int, key: str, tensor: Any) -> None:
        info = TensorInfo(key, tuple(tensor.shape), dtype_name(tensor.dtype))
        if self.tensors.setdefault(key, info) != info:
            raise CheckpointError(f"{file} has {key} in another shape or dtype than files before it", field=key)
        is_sharded = hasattr(tensor, "placements")
        box = _held(file, rank, key, tensor) if is_sharded else Box.whole(info.shape)
        values = tensor.to_local() if is_sharded else tensor
        if tuple(values.shape) != box.shape:
            message = f"{file}: the part of {key} on rank {rank} has shape {list(values.shape)}, not {list(box.shape)}"
            raise CheckpointError(message, field=key)
        parts = self._parts.setdefault(key, [])
        if box.num_elements and all(part.box != box for part in parts):  # not a copy of another rank's
            parts.append(_Part(box, values))


def _held(file: str, rank: int, key: str, tensor: Any) -> Box:
    """Which box of a DTensor a rank has: on each axis of the mesh a chunk, as `torch.chunk` makes them, or all."""
    mesh = tensor.device_mesh.mesh
    places = (mesh == rank).nonzero()
    if len(places) != 1:
        raise CheckpointError(f"{file}: the mesh of {key} does not have rank {rank}, once", field=key)
    start, shape = [0] * tensor.ndim, list(tensor.shape)
    for axis, place in enumerate(tensor.placements):
        if type(place).__name__ == "Shard" and 0 <= place.dim < tensor.ndim:
            part = -(-shape[place.dim] // mesh.shape[axis])
            first = min(int(places[0][axis]) * part, shape[place.dim])
            start[place.dim] += first
            shape[place.dim] = min(part, shape[place.dim] - first)
        elif not place.is_replicate():
            message = (
                f"{file}: {key} is placed as {place}, which is not read: save it as torch.distributed.checkpoint does"
            )
            raise CheckpointError(message, field=key)
    return Box(tuple(start), tuple(shape))


def _fingerprint(folder: Folder, names: Sequence[str]) -> str:
    total = hashlib.sha256()
    for name in names:
        state = folder.state(name)
        if state is None:
            raise CheckpointError(f"{folder.path / name} is missing", field=name)
        total.update(f"{name} {state.size} {state.mtime_ns}\n".encode())
    return total.hexdigest()
