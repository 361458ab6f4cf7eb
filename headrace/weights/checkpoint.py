"""Checkpoint folders: reading Hugging Face weight files, as data only.

Owns file names, shard indexes and what a broken file is called. Never runs code from a folder: safetensors holds none,
and `.bin` files go through torch's weights-only reader, which builds tensors and containers and nothing else. Must not
know parameters or sessions.
"""

from __future__ import annotations

import time
import zipfile
from collections.abc import Collection, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

import msgspec
import torch

from headrace.config.json_bounds import MODEL_FILE, excess
from headrace.config.json_files import shown
from headrace.types.errors import CheckpointError
from headrace.types.weights import MAX_TENSOR_NAME, TensorInfo, shape_problem
from headrace.weights.files import FileState, Folder, OpenFile, changed
from headrace.weights.safetensors_file import FileTensor, read_header
from headrace.weights.saved import RECORD, rank_file, read_record
from headrace.weights.shard import ONLY_RANK, Shard
from headrace.weights.staging import TensorData, info_of, unreadable
from headrace.weights.weight_map import is_recomputed

_STEMS = {"safetensors": ("model", ".safetensors"), "bin": ("pytorch_model", ".bin")}
_MAX_INDEX_BYTES = 32 << 20
_MAX_PICKLE_BYTES = 8 << 20  # some 4 MB for 20,000 tensors
_CLOCK_TICK_NS = 20_000_000
_NAP_NS = 500_000

Result = TypeVar("Result")


class Checkpoint:
    """The weights of a folder, as they are when it is opened; that they stay so is checked to the end.

    `load_format` is "auto" (safetensors if there are any), "safetensors", "bin", or "sharded": the parameters that a
    save of as many ranks wrote for this one, by their own names. For `root` see `Folder`. Buffers that every engine
    recomputes (`rotary_emb.inv_freq`) are left out. Everything raises `CheckpointError` naming the file or tensor that
    is missing, corrupt or outside the root, or the file that changed while it was read: whoever writes a folder anew
    replaces it as a whole, or has nobody read it meanwhile.
    """

    def __init__(
        self, folder: Path, load_format: str = "auto", root: Path | None = None, shard: Shard = ONLY_RANK
    ) -> None:
        if load_format not in ("auto", "sharded", *_STEMS):
            raise CheckpointError(f"load_format {load_format!r} names no weight files", field="load_format")
        self._shard = shard if load_format == "sharded" else None
        self._formats = tuple(_STEMS) if load_format == "auto" else (load_format,)
        self._folder = Folder(folder, root)
        self._states, self._files = self._look()
        self._headers: dict[str, dict[str, tuple[TensorInfo, int]]] = {}  # of safetensors files, once they were read

    def manifest(self) -> list[TensorInfo]:
        """What `tensors` yields, in the same order; of safetensors only headers are read."""
        return _finished(self.manifest_in_slices())

    def manifest_in_slices(self) -> Generator[None, None, list[TensorInfo]]:
        """As `manifest`, resting after a millisecond or so; a `.bin` file is read in one go."""
        yield from self._settled()
        manifest: list[TensorInfo] = []
        for file_name in self._files:
            with self._opened(file_name) as file:
                found = yield from self._found(file)
                manifest += [info_of(name, data) for name, data in found]
            yield
        return manifest

    def tensors(self) -> Iterator[tuple[str, TensorData]]:
        """(HF name, tensor) of every tensor, file by file, each to be copied before the next is asked for. It ends well
        only if no file has changed since the folder was opened."""
        _finished(self._settled())
        self._require_unchanged()
        for file_name in self._files:
            with self._opened(file_name) as file:
                for name, data in _finished(self._found(file)):
                    yield name, data
                    self._require_state(file)
        self._require_unchanged()

    def _settled(self) -> Generator[None, None, None]:
        """Wait until no other write can come within the tick of the file system's clock that the last one was in, and
        would not show."""
        changed_ns = max(state.changed_ns for state in self._states.values())
        while 0 <= (age := time.time_ns() - changed_ns) < _CLOCK_TICK_NS:
            time.sleep(min(_CLOCK_TICK_NS - age, _NAP_NS) * 1e-9)
            yield

    @contextmanager
    def _opened(self, file_name: str) -> Iterator[OpenFile]:
        """A file, which is and stays as it was."""
        try:
            with self._folder.open(file_name) or self._gone(file_name) as file:
                self._require_state(file)
                yield file
        except CheckpointError:  # a file half written looks broken
            self._require_unchanged()
            raise

    def _found(self, file: OpenFile) -> Generator[None, None, Iterator[tuple[str, TensorData]]]:
        """The tensors of one file that are wanted. A header is read once."""
        names = self._files[file.path.name]
        if file.path.suffix != ".safetensors":
            tensors = _read_bin(file)
            self._require_state(file)
            return ((name, tensors[name]) for name in _wanted(file.path, tensors, names))
        header = self._headers.get(file.path.name)
        if header is None:
            header = yield from read_header(file)
            self._require_state(file)
            self._headers[file.path.name] = header
        return ((name, FileTensor(file, *header[name])) for name in _wanted(file.path, header, names))

    def _require_state(self, file: OpenFile) -> None:
        if file.state() != self._states[file.path.name]:
            raise changed(file.path)

    def _require_unchanged(self) -> None:
        try:
            states, _ = self._look()
        except CheckpointError:
            states = {}
        for name in self._states | states:
            if self._states.get(name) != states.get(name):
                raise changed(self._folder.path / name)

    def _gone(self, file_name: str) -> NoReturn:
        raise changed(self._folder.path / file_name)

    def _look(self) -> tuple[dict[str, FileState], dict[str, list[str] | None]]:
        """The state of every file that plays a part, and the weight files, each with the names to take (None: all)."""
        if self._shard is not None:
            return self._look_for_rank(self._shard)
        looked_for: list[str] = []
        for kind in self._formats:
            stem, suffix = _STEMS[kind]
            single, index = f"{stem}{suffix}", f"{stem}{suffix}.index.json"
            state = self._folder.state(single)
            if state is not None:
                return {single: state}, {single: None}
            opened = self._folder.open(index)
            if opened is not None:
                with opened:
                    names_of = _read_index(opened)
                    return {index: opened.state(), **self._shard_states(names_of, opened.path)}, dict(names_of)
            looked_for += [single, index]
        folder = self._folder.path
        message = f"{folder} has no weights: looked for {', '.join(looked_for)}"
        if self._folder.state(RECORD) is not None:
            message += "; a sharded save is loaded at a start with load_format='sharded', and nothing else reads it"
        raise CheckpointError(message, field=str(folder))

    def _look_for_rank(self, shard: Shard) -> tuple[dict[str, FileState], dict[str, list[str] | None]]:
        record, path = read_record(self._folder), self._folder.path
        if record.layout != "sharded" or record.num_ranks != shard.num_all:
            what = f"of {record.num_ranks} rank(s)" if record.layout == "sharded" else "in Hugging Face layout"
            message = f"{path} is a save {what}, and is to be loaded as one of {shard.num_all} rank(s)"
            raise CheckpointError(message, field="load_format")
        name = rank_file(shard.number, shard.num_all)
        return self._shard_states([RECORD, name], path / RECORD), {name: None}

    def _shard_states(self, names: Iterable[str], index: Path) -> dict[str, FileState]:
        states = {}
        for name in names:
            state = self._folder.state(name)
            if state is None:
                raise CheckpointError(f"{index.parent / name} is missing, named by {index.name}", field=name)
            states[name] = state
        return states


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _read_index(index: OpenFile) -> dict[str, list[str]]:
    """By file name, the tensors that an index says it holds."""
    path = index.path
    try:
        size = index.state().size
        if size > _MAX_INDEX_BYTES:
            raise ValueError(f"it has {size} bytes")
        raw = index.read(0, size)
        too_much = excess(raw, MODEL_FILE)
        if too_much is not None:
            raise ValueError(f"it has {too_much} or more")
        weight_map = msgspec.json.decode(raw, type=_Index).weight_map
        longest = max(map(len, (*weight_map, *weight_map.values())), default=0)
        if longest > MAX_TENSOR_NAME:
            raise ValueError(f"it holds a name of {longest} characters")
    except (ValueError, RecursionError, msgspec.MsgspecError) as error:
        message = f"{path} cannot be read as an index with a weight_map: {error}"
        raise CheckpointError(message, field=path.name) from None
    if not weight_map:
        raise CheckpointError(f"{path} has an empty weight_map", field=path.name)
    expected_suffix = Path(path.name.removesuffix(".index.json")).suffix
    names_of: dict[str, list[str]] = {}
    for name, file_name in weight_map.items():
        names_of.setdefault(file_name, []).append(name)
    for file_name, names in names_of.items():
        # A path here could name any file of the machine.
        if file_name in ("", ".", "..") or Path(file_name).name != file_name or "\0" in file_name:
            message = f"{path}: {names[0]} is said to be in {file_name!r}, which is not a file name"
            raise CheckpointError(message, field=path.name)
        if Path(file_name).suffix != expected_suffix:
            raise CheckpointError(f"{path} names {file_name}, which is not a {expected_suffix} file", field=path.name)
    return names_of


def _finished(slices: Generator[None, None, Result]) -> Result:
    """What slices return, without a rest between them."""
    while True:
        try:
            next(slices)
        except StopIteration as end:
            result: Result = end.value
            return result


def _wanted(path: Path, present: Collection[str], names: list[str] | None) -> list[str]:
    """The names to take from a file that holds `present`."""
    absent = sorted(set(names or ()) - set(present))
    if absent:
        raise CheckpointError(f"{path} lacks {absent[0]}, which the index says it holds", field=absent[0])
    return [name for name in (present if names is None else names) if not is_recomputed(name)]


def _require_small_pickle(stream: BinaryIO) -> None:
    """What is not tensor data becomes objects, one for a byte, and a compressed record is of any size."""
    with zipfile.ZipFile(stream) as records:
        for record in records.infolist():
            if record.file_size > record.compress_size:
                raise ValueError(f"{shown(record.filename)} is compressed")
            is_data = "/data/" in record.filename
            if not is_data and record.file_size > _MAX_PICKLE_BYTES:
                raise ValueError(f"{shown(record.filename)} has {record.file_size} bytes")


def load_weights_only(stream: BinaryIO, path: Path, mapped: Path | None = None) -> Any:
    """What `torch.save` has put in a file, or a part of one, that ends with it. `mapped`: the very file, whose tensors
    are then read when they are used. `CheckpointError` naming the file for all but tensors and containers."""
    if not zipfile.is_zipfile(stream):  # the format before torch 1.6, or a broken file
        raise CheckpointError(f"{path} is not a whole torch checkpoint of the zip format", field=path.name)
    try:
        _require_small_pickle(stream)
        stream.seek(0)
        source: Any = mapped or stream
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped is not None)
    except Exception as error:  # the bytes are foreign and torch's reader raises classes of a module we never import
        raise CheckpointError(f"{path} cannot be read weights-only: {error}", field=path.name) from None


def _read_bin(file: OpenFile) -> dict[str, torch.Tensor]:
    """The tensors of a `.bin` file, all in memory: its format has no other reader that could not fault."""
    path = file.path
    parsed = load_weights_only(file.stream, path)
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} does not hold a dict of tensors", field=path.name)
    for name, value in parsed.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{path}: {name!r} is not a named tensor", field=path.name)
        if len(name) > MAX_TENSOR_NAME:
            raise CheckpointError(f"{path}: a tensor's name has {len(name)} characters", field=path.name)
        problem = unreadable(value) or shape_problem(value.shape)
        if problem:
            raise CheckpointError(f"{path}: {name} {problem}", field=name)
    return parsed
