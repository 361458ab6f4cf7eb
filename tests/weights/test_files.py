"""Files of a checkpoint that change while they are read, and what lies outside the folder that may be read."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from headrace.types.errors import CheckpointError
from headrace.weights.checkpoint import Checkpoint
from headrace.weights.files import Folder
from tests.weights.tiny import Tensors, live_bits, make_map, make_store, make_tensors

NUM_SHARDS = 3
INDEX = "model.safetensors.index.json"


def shard(number: int) -> str:
    return f"model-{number + 1:05d}-of-{NUM_SHARDS:05d}.safetensors"


def save(folder: Path, seed: int, *, sharded: bool = True, numbers: tuple[int, ...] = (0, 1, 2)) -> Tensors:
    """A checkpoint, or some of its shards."""
    folder.mkdir(exist_ok=True)
    tensors = make_tensors(make_map(), seed)
    if not sharded:
        save_file(tensors, folder / "model.safetensors")
        return tensors
    weight_map = {name: shard(place % NUM_SHARDS) for place, name in enumerate(tensors)}
    for number in numbers:
        save_file(
            {name: tensors[name] for name, file in weight_map.items() if file == shard(number)}, folder / shard(number)
        )
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def rewrite(path: Path, content: bytes) -> None:
    """In place: the same inode."""
    with path.open("r+b") as file:
        file.truncate(0)
        file.write(content)


def replaced(folder: Path) -> None:
    save(folder.with_name("next"), 2, numbers=(2,))
    os.replace(folder.with_name("next") / shard(2), folder / shard(2))


def swapped(folder: Path) -> None:
    save(folder.with_name("next"), 2)
    os.rename(folder, folder.with_name("former"))
    os.rename(folder.with_name("next"), folder)


def backdated(folder: Path) -> None:
    path = folder / shard(2)
    before = path.stat()
    rewrite(path, path.read_bytes()[:-1] + b"\1")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "cut short": lambda folder: os.truncate(folder / shard(2), 300),
    "emptied": lambda folder: os.truncate(folder / shard(0), 0),
    "rewritten": lambda folder: rewrite(folder / shard(2), (folder / shard(2)).read_bytes()),
    "touched up with its old times": backdated,
    "one shard replaced": replaced,
    "one shard gone": lambda folder: (folder / shard(2)).unlink(),
    "folder swapped": swapped,
    "folder gone": shutil.rmtree,
    "index rewritten": lambda folder: rewrite(folder / INDEX, (folder / INDEX).read_bytes()),
    "one file beside the shards": lambda folder: save(folder, 2, sharded=False),
}


@pytest.mark.parametrize("after", [-1, 0, 1, 7, 10**6])
@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_that_changes_is_refused(tmp_path: Path, change: str, after: int) -> None:
    """Before the first tensor, after some, after the last but before the end."""
    folder = tmp_path / "step"
    tensors = save(folder, 1)
    checkpoint = Checkpoint(folder)
    manifest = checkpoint.manifest()
    at = min(after, len(manifest) - 1)
    store = make_store(make_map(), make_tensors(make_map(), 9))
    before = live_bits(store)
    store.begin(manifest, "shadow", False)
    if after < 0:
        CHANGES[change](folder)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        for index, (_, data) in enumerate(checkpoint.tensors()):
            store.stage(index, data).advance(60.0)
            if index == at:
                CHANGES[change](folder)
    store.abort()
    assert live_bits(store) == before
    assert len(tensors) == len(manifest)


@pytest.mark.parametrize("change", CHANGES)
def test_a_start_from_a_folder_that_changes_fails(tmp_path: Path, change: str) -> None:
    folder = tmp_path / "step"
    save(folder, 1)

    def tensors() -> object:
        for number, pair in enumerate(Checkpoint(folder).tensors()):
            yield pair
            if number == 3:
                CHANGES[change](folder)

    store = make_store(make_map())
    with pytest.raises(CheckpointError, match="changed while it was read"):
        store.load(tensors())  # type: ignore[arg-type]
    assert store.state == "needs_weights"


def test_a_write_in_the_same_tick_of_the_clock_shows(tmp_path: Path) -> None:
    """A file system's clock stands still for milliseconds: what is written within them bears one time."""
    for number in range(20):
        save(tmp_path, number, sharded=False)
        checkpoint = Checkpoint(tmp_path)
        checkpoint.manifest()
        content = (tmp_path / "model.safetensors").read_bytes()
        rewrite(tmp_path / "model.safetensors", content)
        with pytest.raises(CheckpointError, match="changed while it was read"):
            list(checkpoint.tensors())


def test_a_trainer_that_writes_all_the_time_never_mixes_two_steps(tmp_path: Path) -> None:
    """Rewritten in place and replaced, as fast as it goes: what is read to the end is one step."""
    steps = [make_store(make_map(), make_tensors(make_map(), seed)).digest() for seed in (1, 2)]
    contents = []
    for seed in (1, 2):
        save(tmp_path, seed, sharded=False)
        contents.append((tmp_path / "model.safetensors").read_bytes())
    is_over = threading.Event()

    def write() -> None:
        while not is_over.is_set():
            for number, content in enumerate(contents):
                if number:
                    rewrite(tmp_path / "model.safetensors", content)
                else:
                    (tmp_path / "fresh").write_bytes(content)
                    os.replace(tmp_path / "fresh", tmp_path / "model.safetensors")
                is_over.wait(0.015)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(60):
            store = make_store(make_map())
            try:
                store.load(Checkpoint(tmp_path).tensors())
            except CheckpointError:
                continue
            assert store.digest() in steps
    finally:
        is_over.set()
        writer.join()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sparse", "meta", "quantized", "nested"])
def test_a_bin_file_with_a_tensor_that_has_no_plain_values_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    tensors = make_tensors(make_map(), 1)
    name = "model.norm.weight"
    change: Callable[[torch.Tensor], torch.Tensor] = {
        "sparse": lambda tensor: tensor.to_sparse(),
        "meta": lambda tensor: tensor.to("meta"),
        "quantized": lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        "nested": lambda tensor: torch.nested.nested_tensor([tensor], layout=torch.jagged),
    }[kind]
    tensors[name] = change(tensors[name])
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=f"{name} is|cannot be read weights-only"):
        Checkpoint(tmp_path).manifest()


def test_a_bin_file_that_changes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(make_tensors(make_map(), 1), path)
    for cut in (100, -200):
        torch.save(make_tensors(make_map(), 1), path)
        checkpoint = Checkpoint(tmp_path)
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(CheckpointError, match="changed while it was read"):
            checkpoint.manifest()


def link(folder: Path, name: str, target: str | Path) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to(target)


@pytest.mark.parametrize("absolute", [True, False])
def test_links_that_lead_out_of_the_root_are_refused(tmp_path: Path, absolute: bool) -> None:
    folder, secret = tmp_path / "root" / "step", tmp_path / "secret"
    (tmp_path / "root").mkdir()
    save(folder, 1)
    save(secret, 2)
    link(folder, shard(1), (secret if absolute else Path("../../secret")) / shard(1))
    assert len(list(Checkpoint(folder).tensors())) == len(make_map().rules_by_name)  # a caller's own path
    with pytest.raises(CheckpointError, match="leads out of"):
        Checkpoint(folder, root=tmp_path / "root")
    link(folder, INDEX, secret / INDEX)
    with pytest.raises(CheckpointError, match="leads out of"):
        Checkpoint(folder, root=tmp_path / "root")
    shutil.rmtree(folder)
    folder.symlink_to(secret)
    with pytest.raises(CheckpointError, match="leads out of"):
        Checkpoint(folder, root=tmp_path / "root")
    with pytest.raises(CheckpointError, match="is outside"):
        Checkpoint(secret, root=tmp_path / "root")


def test_links_that_stay_below_the_root_are_followed(tmp_path: Path) -> None:
    """As in the cache of the Hugging Face hub, and with links by absolute paths."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.parent.mkdir()
    blobs.mkdir()
    save(snapshot, 1)
    for number in range(NUM_SHARDS):
        os.rename(snapshot / shard(number), blobs / str(number))
        (snapshot / shard(number)).symlink_to(Path("../../blobs") / str(number) if number else blobs / "0")
    (tmp_path / "latest").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "latest"):
        store = make_store(make_map())
        store.load(Checkpoint(folder, root=tmp_path).tensors())
        assert store.digest() == make_store(make_map(), make_tensors(make_map(), 1)).digest()


def test_a_folder_that_is_swapped_for_a_link_is_never_read_outside(tmp_path: Path) -> None:
    root, secret = tmp_path / "root", tmp_path / "secret"
    root.mkdir()
    folder, parked, decoy = root / "step", root / "parked", root / "decoy"
    save(folder, 1)
    save(secret, 2)
    decoy.symlink_to(secret)
    allowed = make_store(make_map(), make_tensors(make_map(), 1)).digest()
    is_over = threading.Event()

    def swap() -> None:
        while not is_over.is_set():
            os.rename(folder, parked)
            os.rename(decoy, folder)
            os.rename(folder, decoy)
            os.rename(parked, folder)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _ in range(150):
            store = make_store(make_map())
            try:
                store.load(Checkpoint(folder, root=root).tensors())
            except CheckpointError:
                continue
            assert store.digest() == allowed
    finally:
        is_over.set()
        thread.join()


def test_links_in_a_circle_and_pipes_and_folders_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "up").symlink_to("folder/..")
    for root in (None, tmp_path):
        folder = Folder(tmp_path, root)
        with pytest.raises(CheckpointError, match="cannot be opened"):
            folder.open("a")
        assert folder.open("pipe") is None
        assert folder.open("nothing") is None
        for name in ("folder", "up"):
            try:
                assert folder.open(name) is None
            except CheckpointError as error:
                assert "cannot be opened" in error.message


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "other").symlink_to(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for root in (None, tmp_path):
        checkpoint = Checkpoint(tmp_path / "other", root=root)
        list(checkpoint.tensors())
        tensors = checkpoint.tensors()
        next(tensors)
        del tensors
        with pytest.raises(CheckpointError):
            Checkpoint(tmp_path / "nothing", root=root)
    assert len(os.listdir("/proc/self/fd")) == before


HEADERS = [
    b"[]",
    b"{",
    b'{"a": 1}',
    b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}}',
    b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}',
    b'{"a": {"dtype": "F32", "shape": [1e30], "data_offsets": [0, 8]}}',
    b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 99999999999]}}',
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "F32", "shape": [1],'
    b' "data_offsets": [4, 8]}}',
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
    b'{"a": {"dtype": 3, "shape": [2], "data_offsets": [0, 8]}}',
    b'{"\\ud800": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
    b"[" * 100_000,
    b"\xff\xfe",
    b"",
]


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("length", [None, 0, 1 << 20, (1 << 64) - 1])
def test_a_hostile_safetensors_header_is_refused(tmp_path: Path, header: bytes, length: int | None) -> None:
    size = len(header) if length is None else length
    (tmp_path / "model.safetensors").write_bytes(size.to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match="not a whole safetensors file") as caught:
        Checkpoint(tmp_path).manifest()
    assert msg_encodable(caught.value.message)


def msg_encodable(text: str) -> bool:
    return bool(text.encode())


@pytest.mark.parametrize("place", ["name", "file"])
@pytest.mark.parametrize("kind", ["index", "bin"])
def test_names_that_no_answer_could_hold_are_refused_in_other_words(tmp_path: Path, kind: str, place: str) -> None:
    if kind == "index":
        entry = {"\ud800": shard(0)} if place == "name" else {"a": "\udcff.safetensors"}
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": entry}))
    elif place == "name":
        torch.save({"\ud800": 3}, tmp_path / "pytorch_model.bin")
    else:
        torch.save({"a": torch.ones(2).to_sparse(), "\ud800": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(tmp_path).manifest()
    assert msg_encodable(caught.value.message) and (caught.value.field + "x").encode()


def test_what_is_not_finite_is_refused_by_name_unless_it_is_let_in(tmp_path: Path) -> None:
    tensors = save(tmp_path, 1, sharded=False)
    name = list(tensors)[4]
    for value in (float("nan"), float("inf"), float("-inf")):
        bad = {**tensors, name: tensors[name].clone()}
        bad[name].view(-1)[-1] = value
        save_file(bad, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity in float32") as caught:
            make_store(make_map()).load(Checkpoint(tmp_path).tensors())
        assert caught.value.field == name
        make_store(make_map(), check_finite=False).load(Checkpoint(tmp_path).tensors())
    large = {**tensors, name: torch.full_like(tensors[name], 1e38)}
    save_file(large, tmp_path / "model.safetensors")
    make_store(make_map()).load(Checkpoint(tmp_path).tensors())  # sums overflow, elements do not
    with pytest.raises(CheckpointError, match="infinity in float16"):
        make_store(make_map(), dtype=torch.float16).load(Checkpoint(tmp_path).tensors())
