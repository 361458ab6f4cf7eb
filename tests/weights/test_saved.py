"""What a save writes: layouts, headers, the record, and the check of a folder against it."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from headrace.types.errors import CheckpointError
from headrace.types.weights import TensorInfo
from headrace.weights.save_folder import FolderTarget
from headrace.weights.save_target import write_whole
from headrace.weights.saved import (
    RECORD,
    Record,
    WeightFile,
    check_saved_model,
    hf_files,
    index_of,
    rank_files,
)

TENSORS = {
    "embed.weight": torch.arange(24, dtype=torch.float32).view(6, 4),
    "norm.weight": torch.arange(3, dtype=torch.bfloat16),
    "scale": torch.tensor(5.0),
    "half": torch.arange(8, dtype=torch.float16).view(2, 2, 2),
}
INFOS = [
    TensorInfo(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), f"{number:032x}")
    for number, (name, tensor) in enumerate(TENSORS.items())
]
RECORDED = Record(version="v1", layout="hf", digests={info.name: info.digest for info in INFOS})


def bytes_of(name: str) -> bytes:
    return TENSORS[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def save(target: FolderTarget, files: list[WeightFile], record: Record = RECORDED) -> list[str]:
    """Write them all; returns the names of those that were written and not found whole."""
    written = []
    try:
        saved = target.begin(record, files)
        for file in files:
            if file.name not in saved:
                data = file.head() + b"".join(bytes_of(info.name) for info in file.tensors)
                saved[file.name] = write_whole(target, file.name, data)
                target.note(msgspec.structs.replace(record, files=saved))
                written.append(file.name)
        target.finish(msgspec.structs.replace(record, files=saved), [])
    finally:
        target.close()
    return written


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(FolderTarget(tmp_path / "saved"), hf_files(INFOS, 40))
    return tmp_path / "saved"


def test_files_are_what_safetensors_reads(folder: Path) -> None:
    found = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_tensors_are_cut_into_shards_of_at_most_so_many_bytes() -> None:
    files = hf_files(INFOS, 40)
    assert [[info.name for info in file.tensors] for file in files] == [
        ["embed.weight"],  # which has more by itself
        ["norm.weight", "scale", "half"],
    ]
    assert [file.name for file in files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.loads(index_of(files))
    assert index["metadata"]["total_size"] == sum(info.num_bytes for info in INFOS)
    assert index["weight_map"] == {info.name: file.name for file in files for info in file.tensors}
    assert [file.name for file in hf_files(INFOS, 1 << 20)] == ["model.safetensors"]
    assert [file.name for file in hf_files(INFOS, 1 << 20, "m")] == ["model-m-00001-of-00001.safetensors"]
    assert [(file.name, file.rank) for file in rank_files([INFOS, INFOS])] == [
        ("model-rank-0-of-2.safetensors", 0),
        ("model-rank-1-of-2.safetensors", 1),
    ]


def test_a_folder_that_is_as_it_was_saved_is_found_right(folder: Path) -> None:
    record = check_saved_model(folder)
    assert (record.version, record.digests) == ("v1", RECORDED.digests)
    assert len(record.files) == 2


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
@pytest.mark.parametrize("how", ["flipped", "shorter", "longer", "gone", "a folder"])
def test_a_file_that_differs_is_named(folder: Path, name: str, how: str) -> None:
    path = folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= how == "flipped"
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how != "gone":
        path.write_bytes({"flipped": data, "shorter": data[:-1], "longer": data + b"\0"}[how])
    with pytest.raises(CheckpointError) as caught:
        check_saved_model(folder)
    assert caught.value.field == name


def test_weights_that_are_not_of_the_save_are_named(folder: Path) -> None:
    """A loader would take them for the save's."""
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        check_saved_model(folder)
    assert caught.value.field == "model.safetensors"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"{" * 100_000,
        b'{"version": "v", "layout": "other", "digests": {}}',
        b'{"version": "v", "layout": "hf", "digests": {"a": 1}}',
        b'{"version": "v", "layout": "hf", "digests": {}, "files": {"/etc/passwd": {"size": 1, "sha256": ""}}}',
        b'{"version": "v", "layout": "hf", "digests": {}, "files": {"a/../../b": {"size": 1, "sha256": ""}}}',
        b'{"version": "v", "layout": "hf", "digests": {}, "files": {"a\\u0000": {"size": 1, "sha256": ""}}}',
    ],
)
def test_a_record_that_is_none_is_refused(folder: Path, raw: bytes) -> None:
    (folder / RECORD).write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        check_saved_model(folder)
    assert caught.value.field == RECORD


def test_a_folder_without_a_record_is_no_save(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_saved_model(tmp_path)
    assert caught.value.field == RECORD
