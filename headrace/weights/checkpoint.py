"""Checkpoint folders: reading and writing Hugging Face weight files, as data only.

Owns file names, shard indexes and what a broken file is called. Never runs code from a folder: safetensors holds none,
and `.bin` files go through torch's weights-only reader, which builds tensors and containers and nothing else. Must not
know parameters or sessions.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from headrace.types.errors import CheckpointError
from headrace.types.weights import TensorInfo
from headrace.weights.staging import dtype_name
from headrace.weights.store import WeightStore
from headrace.weights.weight_map import is_derived

MAX_SHARD_BYTES = 4 << 30
_STEMS = {"safetensors": ("model", ".safetensors"), "bin": ("pytorch_model", ".bin")}
_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def iterate_checkpoint(folder: Path, load_format: str = "auto") -> Iterator[tuple[str, torch.Tensor]]:
    """(HF name, CPU tensor) of every tensor in a folder, file by file; safetensors are mapped, not read at once.

    `load_format` is "auto" (safetensors if there are any), "safetensors" or "bin". Buffers that every engine recomputes
    (`rotary_emb.inv_freq`) are left out. Raises `CheckpointError` naming the file or tensor that is missing or corrupt.
    """
    for path, names in _files(folder, load_format):
        reader = _iterate_safetensors if path.suffix == ".safetensors" else _iterate_bin
        yield from reader(path, names)


def read_manifest(folder: Path, load_format: str = "auto") -> list[TensorInfo]:
    """What `iterate_checkpoint` will yield, in the same order; of safetensors only headers are read. Same errors."""
    found: list[TensorInfo] = []
    for path, names in _files(folder, load_format):
        found += _safetensors_infos(path, names) if path.suffix == ".safetensors" else _bin_infos(path, names)
    return found


def save_checkpoint(store: WeightStore, folder: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> list[Path]:
    """Write the live weights as safetensors in HF layout, engine dtype; tied names are left out. Returns the files.

    One `model.safetensors`, or shards with an index when the weights are larger than `max_shard_bytes`. Each file
    appears whole or not at all; the index comes last. `config.json` is the caller's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(store, max_shard_bytes)
    written: list[Path] = []
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file_name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        partial = folder / f".{file_name}.partial"
        save_file({name: store.read(name) for name in names}, partial, metadata={"format": "pt"})
        os.replace(partial, folder / file_name)
        written.append(folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": store.num_bytes}, "weight_map": weight_map}
        written.append(folder / "model.safetensors.index.json")
        partial = folder / ".model.safetensors.index.json.partial"
        partial.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, written[-1])
    return written


def _shards(store: WeightStore, max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, rule in store.weight_map.rules_by_name.items():
        size = torch.Size(rule.shape).numel() * store.dtype.itemsize
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _files(folder: Path, load_format: str) -> list[tuple[Path, list[str] | None]]:
    """The weight files of a folder, each with the names to take from it (None: all)."""
    if load_format not in ("auto", "safetensors", "bin"):
        raise CheckpointError(f"load_format {load_format!r} names no weight files", field="load_format")
    formats = ("safetensors", "bin") if load_format == "auto" else (load_format,)
    looked_for: list[str] = []
    for kind in formats:
        stem, suffix = _STEMS[kind]
        single, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
        if single.is_file():
            return [(single, None)]
        if index.is_file():
            return _indexed_files(index)
        looked_for += [single.name, index.name]
    raise CheckpointError(f"{folder} has no weights: looked for {', '.join(looked_for)}", field=str(folder))


def _indexed_files(index: Path) -> list[tuple[Path, list[str] | None]]:
    try:
        parsed: Any = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{index} cannot be read: {error}", field=index.name) from None
    weight_map = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map", field=index.name)
    names_of: dict[str, list[str]] = {}
    for name, file_name in weight_map.items():
        # A path here could name any file of the machine.
        if not isinstance(file_name, str) or file_name in ("", ".", "..") or Path(file_name).name != file_name:
            raise CheckpointError(
                f"{index}: {name} is said to be in {file_name!r}, which is not a file name", field=index.name
            )
        names_of.setdefault(file_name, []).append(name)
    expected_suffix = Path(index.name.removesuffix(".index.json")).suffix
    for file_name in names_of:
        if Path(file_name).suffix != expected_suffix:
            raise CheckpointError(f"{index} names {file_name}, which is not a {expected_suffix} file", field=index.name)
        if not (index.parent / file_name).is_file():
            raise CheckpointError(f"{index.parent / file_name} is missing, named by {index.name}", field=file_name)
    return [(index.parent / file_name, names) for file_name, names in names_of.items()]


def _wanted(path: Path, present: list[str], names: list[str] | None) -> list[str]:
    """The names to take from a file that holds `present`."""
    absent = sorted(set(names or ()) - set(present))
    if absent:
        raise CheckpointError(f"{path} lacks {absent[0]}, which the index says it holds", field=absent[0])
    return [name for name in (present if names is None else names) if not is_derived(name)]


def _iterate_safetensors(path: Path, names: list[str] | None) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in _wanted(path, list(file.keys()), names):
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}", field=path.name) from None


def _safetensors_infos(path: Path, names: list[str] | None) -> list[TensorInfo]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            found = []
            for name in _wanted(path, list(file.keys()), names):
                view = file.get_slice(name)
                dtype = view.get_dtype()
                found.append(TensorInfo(name, tuple(view.get_shape()), _SAFETENSORS_DTYPES.get(dtype, dtype)))
            return found
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}", field=path.name) from None


def _iterate_bin(path: Path, names: list[str] | None) -> Iterator[tuple[str, torch.Tensor]]:
    tensors = _read_bin(path)
    for name in _wanted(path, list(tensors), names):
        yield name, tensors[name]


def _bin_infos(path: Path, names: list[str] | None) -> list[TensorInfo]:
    tensors = _read_bin(path)
    wanted = _wanted(path, list(tensors), names)
    return [TensorInfo(name, tuple(tensors[name].shape), dtype_name(tensors[name].dtype)) for name in wanted]


def _read_bin(path: Path) -> dict[str, torch.Tensor]:
    if not zipfile.is_zipfile(path):  # the format before torch 1.6, or a broken file; only the zip format can be mapped
        raise CheckpointError(f"{path} is not a whole torch checkpoint of the zip format", field=path.name)
    try:
        parsed: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the bytes are foreign and torch's reader raises classes of a module we never import
        raise CheckpointError(f"{path} cannot be read weights-only: {error}", field=path.name) from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} does not hold a dict of tensors", field=path.name)
    for name, value in parsed.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{path}: {name!r} is not a named tensor", field=path.name)
    return parsed
