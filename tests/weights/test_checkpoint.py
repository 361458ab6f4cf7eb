"""Checkpoint folders: what transformers writes is read, what is written transformers reads, what is broken is named."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from headrace.types.errors import CheckpointError
from headrace.types.weights import TensorInfo
from headrace.weights.checkpoint import Checkpoint
from headrace.weights.staging import info_of
from tests.weights.saving import save_checkpoint
from tests.weights.tiny import make_map, make_store, make_tensors, manifest_of, update

INDEX = "model.safetensors.index.json"


def save_sharded(folder: Path, *, kind: str = "safetensors", num_shards: int = 3) -> dict[str, torch.Tensor]:
    tensors = make_tensors(make_map(), 1)
    names = list(tensors)
    stem, suffix = ("model", ".safetensors") if kind == "safetensors" else ("pytorch_model", ".bin")
    weight_map: dict[str, str] = {}
    for number in range(num_shards):
        file_name = f"{stem}-{number + 1:05d}-of-{num_shards:05d}{suffix}"
        part = {name: tensors[name] for name in names[number::num_shards]}
        if kind == "safetensors":
            save_file(part, folder / file_name)
        else:
            torch.save(part, folder / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("load_format", ["auto", "named"])
@pytest.mark.parametrize("sharded", [True, False])
def test_single_and_sharded_files_load(tmp_path: Path, kind: str, load_format: str, sharded: bool) -> None:
    if sharded:
        tensors = save_sharded(tmp_path, kind=kind)
    else:
        tensors = make_tensors(make_map(), 1)
        if kind == "safetensors":
            save_file(tensors, tmp_path / "model.safetensors")
        else:
            torch.save(tensors, tmp_path / "pytorch_model.bin")
    chosen = kind if load_format == "named" else "auto"
    store = make_store(make_map())
    store.load(Checkpoint(tmp_path, chosen).tensors())
    assert store.digest() == make_store(make_map(), tensors).digest()
    checkpoint = Checkpoint(tmp_path, chosen)
    found = [info_of(name, data) for name, data in checkpoint.tensors()]
    assert checkpoint.manifest() == found == [TensorInfo(i.name, i.shape, "float32") for i in found]
    assert len(found) == len(tensors)


def test_an_update_from_disk_follows_the_manifest_it_read(tmp_path: Path) -> None:
    tensors = save_sharded(tmp_path)
    store = make_store(make_map(), make_tensors(make_map(), 9))
    checkpoint = Checkpoint(tmp_path)
    store.begin(checkpoint.manifest(), "shadow", False)
    for index, (_, tensor) in enumerate(checkpoint.tensors()):
        store.stage(index, tensor).advance(1.0)
    store.commit()
    assert store.digest() == make_store(make_map(), tensors).digest()


@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 4000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_loads_again(tmp_path: Path, max_shard_bytes: int, dtype: torch.dtype) -> None:
    weight_map = make_map(tied=True)
    store = make_store(weight_map, make_tensors(weight_map, 1), dtype)
    written = save_checkpoint(store, tmp_path / "new", max_shard_bytes=max_shard_bytes)
    assert sorted(path.name for path in written) == sorted(os.listdir(tmp_path / "new"))
    assert (len(written) > 2) == (max_shard_bytes == 4000)
    again = make_store(weight_map, dtype=dtype)
    again.load(Checkpoint(tmp_path / "new").tensors())
    assert again.digest() == store.digest()


def qwen3_map_and_model(tied: bool) -> tuple[Qwen3ForCausalLM, dict[str, torch.Tensor]]:
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(3)
    model = Qwen3ForCausalLM(config)
    return model, {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_what_is_saved_and_its_files_are_read(tmp_path: Path, tied: bool) -> None:
    from headrace.weights import ParamSpec, WeightMap, whole_rows

    model, state = qwen3_map_and_model(tied)
    aliases = {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if name not in aliases}
    weight_map = WeightMap(
        [ParamSpec(name, shape) for name, shape in shapes.items()],
        [whole_rows(name, name, 0, shape) for name, shape in shapes.items()],
        aliases,
    )
    model.save_pretrained(tmp_path / "theirs")
    store = make_store(weight_map)
    store.load(Checkpoint(tmp_path / "theirs").tensors())
    store.load(state.items())  # with the tied head sent as well
    save_checkpoint(store, tmp_path / "ours")
    model.config.save_pretrained(tmp_path / "ours")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def corrupt(folder: Path, fault: str) -> None:
    """Break a sharded checkpoint in one way."""
    index, shard = folder / INDEX, folder / "model-00002-of-00003.safetensors"
    parsed = json.loads(index.read_text())
    if fault == "missing shard":
        shard.unlink()
    elif fault == "truncated":
        shard.write_bytes(shard.read_bytes()[:-7])
    elif fault == "cut header":
        shard.write_bytes(shard.read_bytes()[:20])
    elif fault == "empty file":
        shard.write_bytes(b"")
    elif fault == "garbage":
        shard.write_bytes(b"\xff" * 4000)
    elif fault == "not json":
        index.write_text("{")
    elif fault == "binary index":
        index.write_bytes(b"\xff\xfe\x00")
    elif fault == "nested index":
        index.write_text("[" * 100_000 + "]" * 100_000)
    elif fault == "no weight_map":
        index.write_text("[]")
    elif fault == "tensor not in shard":
        parsed["weight_map"]["model.norm.weight.extra"] = shard.name
        index.write_text(json.dumps(parsed))
    else:
        parsed["weight_map"]["model.norm.weight"] = {
            "outside": "../x.safetensors",
            "absolute": "/etc/passwd",
            "other kind": "x.bin",
            "number": 3,
        }[fault]
        index.write_text(json.dumps(parsed))


@pytest.mark.parametrize(
    ("fault", "field"),
    [
        ("missing shard", "model-00002-of-00003.safetensors"),
        ("truncated", "model-00002-of-00003.safetensors"),
        ("cut header", "model-00002-of-00003.safetensors"),
        ("empty file", "model-00002-of-00003.safetensors"),
        ("garbage", "model-00002-of-00003.safetensors"),
        ("not json", INDEX),
        ("binary index", INDEX),
        ("nested index", INDEX),
        ("no weight_map", INDEX),
        ("tensor not in shard", "model.norm.weight.extra"),
        ("outside", INDEX),
        ("absolute", INDEX),
        ("other kind", INDEX),
        ("number", INDEX),
    ],
)
def test_a_broken_checkpoint_is_named(tmp_path: Path, fault: str, field: str) -> None:
    save_sharded(tmp_path)
    corrupt(tmp_path, fault)
    for read in (lambda: list(Checkpoint(tmp_path).tensors()), lambda: Checkpoint(tmp_path).manifest()):
        with pytest.raises(CheckpointError) as caught:
            read()
        assert caught.value.field == field and field in caught.value.message


def test_tensors_that_do_not_fit_the_model_are_named(tmp_path: Path) -> None:
    tensors = make_tensors(make_map(), 1)
    for change, message in (
        ({"model.norm.weight": torch.zeros(13)}, r"model.norm.weight has shape \[13\]"),
        ({"model.norm.weight": torch.zeros(12, dtype=torch.int8)}, "model.norm.weight has dtype int8"),
        ({"model.surprise": torch.zeros(1)}, "model.surprise is not a tensor"),
    ):
        save_file(tensors | change, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            make_store(make_map()).load(Checkpoint(tmp_path).tensors())
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="lacks 1 tensor.*model.norm.weight"):
        make_store(make_map()).load(Checkpoint(tmp_path).tensors())


def test_derived_buffers_of_old_checkpoints_are_left_out(tmp_path: Path) -> None:
    tensors = make_tensors(make_map(), 1)
    save_file(
        tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}, tmp_path / "model.safetensors"
    )
    assert sorted(name for name, _ in Checkpoint(tmp_path).tensors()) == sorted(tensors)
    assert sorted(info.name for info in Checkpoint(tmp_path).manifest()) == sorted(tensors)


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="looked for model.safetensors, .*pytorch_model.bin"):
        list(Checkpoint(tmp_path).tensors())
    torch.save(make_tensors(make_map(), 1), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="looked for model.safetensors"):
        list(Checkpoint(tmp_path, "safetensors").tensors())
    with pytest.raises(CheckpointError, match="load_format"):
        list(Checkpoint(tmp_path, "gguf").tensors())


class Evil:
    """Reading this with an object decoder would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (str(self.path),))


def test_a_bin_file_cannot_run_code(tmp_path: Path) -> None:
    made = tmp_path / "made"
    torch.save({"a": Evil(made)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read weights-only"):
        list(Checkpoint(tmp_path).tensors())
    assert not made.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "does not hold a dict"),
        ({"a": 3}, "'a' is not a named tensor"),
        ({3: torch.zeros(2)}, "3 is not a named tensor"),
    ],
)
def test_a_bin_file_holds_named_tensors(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        list(Checkpoint(tmp_path).tensors())


@pytest.mark.parametrize("keep", [0, 10, 600, -40])
def test_a_broken_bin_file_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(make_tensors(make_map(), 1), path)
    path.write_bytes(path.read_bytes()[:keep])
    for read in (lambda: list(Checkpoint(tmp_path).tensors()), lambda: Checkpoint(tmp_path).manifest()):
        with pytest.raises(CheckpointError, match="pytorch_model.bin"):
            read()


def test_saved_files_hold_engine_bits_and_no_tied_copy(tmp_path: Path) -> None:
    weight_map = make_map(tied=True)
    store = make_store(weight_map, make_tensors(weight_map, 1), torch.bfloat16)
    update(store, make_tensors(weight_map, 2))
    save_checkpoint(store, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) == set(weight_map.rules_by_name)
    assert manifest_of(saved) == manifest_of({name: store.read(name) for name in saved})
    assert all(torch.equal(tensor, store.read(name)) for name, tensor in saved.items())


def write_header(folder: Path, header: bytes, num_data: int = 0) -> None:
    data = struct.pack("<Q", len(header)) + header + bytes(num_data)
    (folder / "model.safetensors").write_bytes(data)


def header_of(shape: bytes, offsets: bytes = b"0,0") -> bytes:
    return b'{"a":{"dtype":"F32","shape":[' + shape + b'],"data_offsets":[' + offsets + b"]}}"


@pytest.mark.parametrize(
    "header",
    [
        header_of(b",".join([b"4611686018427387903"] * 400_000)),
        header_of(b",".join([b"9" * 4000] * 2000)),
        header_of(b"9" * 1_000_000),
        header_of(b"-1"),
        header_of(b"9223372036854775808,0"),
        header_of(b"1", b"0,9223372036854775808"),
        header_of(b"1", b"-4,0"),
        header_of(b"1,1,1,1,1,1,1,1,1", b"0,4"),
        b'{"' + b"a" * 2000 + header_of(b"0")[3:],
        b" " * (33 << 20),
    ],
    ids=[
        "dimensions",
        "digits",
        "one integer",
        "negative",
        "2^63",
        "offset",
        "offset -4",
        "nine",
        "name",
        "mb",
    ],
)
def test_a_header_is_bounded_before_it_is_reckoned_with(tmp_path: Path, header: bytes) -> None:
    write_header(tmp_path, header, 4)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(tmp_path).manifest()
    assert caught.value.field == "model.safetensors" and len(caught.value.message) < 1000


@pytest.mark.parametrize("text", ["[]", "{}", "1"])
def test_too_many_parts_are_counted_and_not_made(tmp_path: Path, text: str) -> None:
    header = b'{"a":[' + b",".join([text.encode()] * 3_000_000) + b"]}"
    write_header(tmp_path, header)
    with pytest.raises(CheckpointError, match=r"(lists and objects|values) or more"):
        Checkpoint(tmp_path).manifest()
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / INDEX).write_bytes(b'{"weight_map":{},' + header[1:])
    with pytest.raises(CheckpointError, match=r"(lists and objects|values) or more"):
        Checkpoint(tmp_path)


def test_a_header_of_many_tensors_is_read(tmp_path: Path) -> None:
    entries = {
        f"model.layers.{i}.mlp.experts.{i}.weight": {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}
        for i in range(20_000)
    }
    write_header(tmp_path, json.dumps(entries).encode())
    assert len(Checkpoint(tmp_path).manifest()) == 20_000


@pytest.mark.parametrize(
    "index",
    [
        b'{"weight_map": {"' + b"a" * 2000 + b'": "m.safetensors"}}',
        b'{"weight_map": {"a": "' + b"a" * 2000 + b'.safetensors"}}',
        b" " * (33 << 20),
    ],
    ids=["name", "file name", "mb"],
)
def test_an_index_is_bounded_before_it_is_read(tmp_path: Path, index: bytes) -> None:
    (tmp_path / INDEX).write_bytes(index)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(tmp_path)
    assert caught.value.field == INDEX and len(caught.value.message) < 1000


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({"a": torch.zeros(1).expand([1] * 9)}, "9 dimensions"),
        ({"a" * 2000: torch.zeros(1)}, "2000 characters"),
        ({"a": torch.zeros(1), "x": list(range(3_000_000))}, "bytes"),
    ],
    ids=["dimensions", "name", "pickle"],
)
def test_a_bin_file_is_bounded(tmp_path: Path, tensors: dict[str, Any], what: str) -> None:
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=what):
        Checkpoint(tmp_path).manifest()


def test_a_bin_file_with_compressed_records_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(100_000)}, tmp_path / "stored.bin")
    with (
        zipfile.ZipFile(tmp_path / "stored.bin") as stored,
        zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as compressed,
    ):
        for name in stored.namelist():
            compressed.writestr(name, stored.read(name))
    with pytest.raises(CheckpointError, match="is compressed"):
        Checkpoint(tmp_path).manifest()
