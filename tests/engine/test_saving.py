"""Live weights written to folders and stores: what others read of them, what happens meanwhile, what is refused."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from headrace import (
    AsyncEngine,
    CheckpointError,
    ConfigError,
    DeadlineError,
    Engine,
    HeadraceError,
    RequestError,
    SamplingParams,
    SaveReport,
    UnavailableError,
    UpdateConflictError,
    check_saved_model,
)
from headrace.config import shares
from headrace.engine import saving
from headrace.weights.save_folder import FolderTarget
from headrace.weights.save_target import NewFile
from tests.engine.builders import SETTINGS, byte_tokenizer, model_of, named_tensors
from tests.parity.models import make_model

PROMPT = [1, 2, 3]
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=8, ignore_eos=True)
Start = Callable[..., Engine]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small tensors come in several parts."""
    monkeypatch.setattr(saving, "PART_BYTES", 4096)


class Gate:
    """Holds a save up before each of its writes, once it is closed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_open = threading.Event()
        self.is_reached = threading.Event()
        write = NewFile.write

        def held(file: NewFile, data: bytes | memoryview) -> None:
            self.is_reached.set()
            assert self.is_open.wait(60)
            write(file, data)

        monkeypatch.setattr(NewFile, "write", held)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    found = Gate(monkeypatch)
    yield found
    found.is_open.set()


class Saving:
    """A save in another thread."""

    def __init__(self, save: Callable[[], SaveReport]) -> None:
        self._save = save
        self.outcome: SaveReport | HeadraceError | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def join(self) -> SaveReport | HeadraceError:
        self._thread.join(60)
        assert self.outcome is not None
        return self.outcome

    def _run(self) -> None:
        try:
            self.outcome = self._save()
        except HeadraceError as error:
            self.outcome = error


def tokens_of(engine: Engine) -> list[int]:
    return engine.generate(input_ids=PROMPT, sampling_params=GREEDY)[0].token_ids


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral")


@pytest.mark.parametrize(
    ("family", "dtype", "tied"),
    [("llama", "float32", False), ("llama", "bfloat16", True), *((family, "bfloat16", False) for family in FAMILIES)],
)
def test_transformers_reads_what_was_saved(family: str, dtype: str, tied: bool, tmp_path: Path) -> None:
    """Tensor by tensor, with the configuration as it was, in the dtype that the engine has."""
    model = make_model(family, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "model")
    settings = {**SETTINGS, "dtype": dtype, "skip_tokenizer_init": True}
    with Engine(tmp_path / "model", inprocess=True, **settings) as engine:
        report = engine.save_model(tmp_path / "saved", max_shard_bytes=30_000)
        digests, tokens = engine.digest(), tokens_of(engine)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    kind = getattr(torch, dtype)
    expected = {name: tensor.to(kind) for name, tensor in model.state_dict().items()}
    assert found.state_dict().keys() == expected.keys()
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == kind and torch.equal(tensor, expected[name]), name
    record = check_saved_model(tmp_path / "saved")
    assert record.digests == digests and len(digests) == report.num_tensors
    assert report.num_bytes == sum(load.nbytes for load in load_all(tmp_path / "saved").values())
    with Engine(tmp_path / "saved", inprocess=True, **settings) as engine:
        assert engine.digest() == digests and tokens_of(engine) == tokens


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_tokenizer_and_generation_settings_go_with_it(model_folder: Path, start: Start, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    engine = start(tokenizer=str(tmp_path / "tokenizer"))
    engine.save_model(tmp_path / "saved")
    found = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert found.encode("héllo") == tokenizer.encode("héllo") and found.chat_template == tokenizer.chat_template
    ours, theirs = (GenerationConfig.from_pretrained(each) for each in (tmp_path / "saved", model_folder))
    assert ours.to_dict() == theirs.to_dict()
    record = check_saved_model(tmp_path / "saved")
    on_disk = {str(each.relative_to(tmp_path / "saved")) for each in (tmp_path / "saved").rglob("*") if each.is_file()}
    assert on_disk == {*record.files, "headrace.json"}
    assert any(name.startswith("additional_chat_templates/") for name in on_disk)


def test_parameters_as_they_lie_are_loaded_again(start: Start, tmp_path: Path) -> None:
    engine = start()
    engine.update_weights_from_tensor(named_tensors(model_of(5)), "pushed")
    report = engine.save_sharded_model(tmp_path / "saved")
    assert report.version == "pushed" and report.num_tensors == len(engine.digest())
    again = start(tmp_path / "saved", load_format="sharded")
    assert again.digest() == engine.digest() == check_saved_model(tmp_path / "saved").digests
    assert tokens_of(again) == tokens_of(engine)
    again.release_memory_occupation(["weights"])
    again.resume_memory_occupation(restore="disk")
    assert again.digest() == engine.digest()


def test_another_layout_is_not_loaded_as_parameters(start: Start, model_folder: Path, tmp_path: Path) -> None:
    engine = start()
    engine.save_model(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="in Hugging Face layout"):
        start(tmp_path / "hf", load_format="sharded")
    with pytest.raises(CheckpointError, match=r"headrace\.json"):
        start(model_folder, load_format="sharded")
    engine.save_sharded_model(tmp_path / "sharded")
    with pytest.raises(CheckpointError, match="no weights.*load_format='sharded'"):
        start(tmp_path / "sharded")
    with pytest.raises(CheckpointError, match="load_format='sharded'"):
        engine.update_weights_from_disk(tmp_path / "sharded", "never")
    record = tmp_path / "sharded" / "headrace.json"
    record.write_text(record.read_text().replace('"num_ranks": 1', '"num_ranks": 2'))
    with pytest.raises(CheckpointError, match=r"of 2 rank\(s\)"):
        start(tmp_path / "sharded", load_format="sharded")


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_store_takes_a_save_and_the_next(kind: str, start: Start, tmp_path: Path) -> None:
    engine = start()
    url = f"{kind}://{tmp_path}/steps/1"
    store = fsspec.filesystem(kind)
    for version, seed in (("a", 3), ("b", 4)):
        engine.update_weights_from_tensor(named_tensors(model_of(seed)), version)
        report = engine.save_remote_model(url, max_shard_bytes=40_000)
        assert (report.path, report.version) == (url, version)
        here = tmp_path / f"fetched-{version}"
        store.get(f"{tmp_path}/steps/1/", f"{here}/", recursive=True)
        assert check_saved_model(here).digests == engine.digest()
        found = AutoModelForCausalLM.from_pretrained(here).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in named_tensors(model_of(seed)))
    names = [name for name in store.find(f"{tmp_path}/steps/1") if name.endswith(".safetensors")]
    assert len(names) > 1 and len({name.rpartition("/")[2].split("-")[1] for name in names}) == 1


def test_what_a_failed_save_put_into_a_store_is_removed(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, store = start(), fsspec.filesystem("memory")
    url = "memory://headrace/failed"
    engine.save_remote_model(url)
    before = store.find("/headrace/failed")
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "open", broken_after(type(store).open, 1))
        with pytest.raises(UnavailableError, match="OSError: the store is gone") as caught:
            engine.save_remote_model(url, max_shard_bytes=40_000)
    assert caught.value.field == "url"
    assert store.find("/headrace/failed") == before
    store.pipe_file("/headrace/failed/model-0123456789abcdef-00001-of-00002.safetensors", b"of one that was killed")
    engine.save_remote_model(url)
    assert len(store.find("/headrace/failed")) == len(before)
    store.pipe_file("/headrace/failed/mine", b"")
    with pytest.raises(RequestError, match="mine") as refused:
        engine.save_remote_model(url)
    assert refused.value.field == "url"


def broken_after(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    calls: list[None] = []

    def call(*arguments: Any, **keywords: Any) -> Any:
        calls.append(None)
        if len(calls) > count:
            raise OSError("the store is gone")
        return function(*arguments, **keywords)

    return call


def test_without_fsspec_a_url_is_refused_by_name(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ConfigError, match="remote") as caught:
        engine.save_remote_model("memory://nowhere")
    assert caught.value.field == "url"


def test_what_can_be_no_save_is_refused(engine: Engine, tmp_path: Path) -> None:
    for call, field in (
        (lambda: engine.save_model("a\0b"), "path"),
        (lambda: engine.save_model("/"), "path"),
        (lambda: engine.save_model(tmp_path / "x", max_shard_bytes=0), "max_shard_bytes"),
        (lambda: engine.save_model(tmp_path / "x", timeout=0), "timeout"),
        (lambda: engine.save_remote_model("no-url"), "url"),
        (lambda: engine.save_remote_model("nobodys-protocol://x"), "url"),
    ):
        with pytest.raises(HeadraceError) as caught:
            call()
        assert caught.value.field == field and caught.value.status == 400
    assert not os.listdir(tmp_path)


def test_a_folder_with_something_else_in_it_is_left(engine: Engine, model_folder: Path) -> None:
    before = sorted(os.listdir(model_folder))
    with pytest.raises(RequestError, match="no save wrote"):
        engine.save_model(model_folder)
    assert sorted(os.listdir(model_folder)) == before


def test_generation_goes_on_meanwhile(start: Start, gate: Gate, tmp_path: Path) -> None:
    """And its tokens are what they are without a save."""
    engine = start(numerics="invariant")
    alone = tokens_of(engine)
    save = Saving(lambda: engine.save_model(tmp_path / "saved"))
    assert gate.is_reached.wait(60)
    assert tokens_of(engine) == alone
    pieces = engine.stream(input_ids=PROMPT, sampling_params=SamplingParams(max_new_tokens=200, ignore_eos=True))
    next(pieces)
    assert save.outcome is None
    gate.is_open.set()
    report = save.join()
    assert isinstance(report, SaveReport)
    pieces.close()
    check_saved_model(tmp_path / "saved")


@pytest.mark.parametrize("mode", ["shadow", "inplace"])
def test_weights_that_change_meanwhile_fail_the_save(start: Start, gate: Gate, tmp_path: Path, mode: Any) -> None:
    """The old save stays; the next one is of the new weights, whatever the failed one has written."""
    engine = start()
    gate.is_open.set()
    engine.save_model(tmp_path / "saved")
    old = engine.digest()
    gate.is_open.clear()
    gate.is_reached.clear()
    save = Saving(lambda: engine.save_model(tmp_path / "saved", max_shard_bytes=20_000))
    assert gate.is_reached.wait(60)
    engine.update_weights_from_tensor(named_tensors(model_of(9)), "new", mode=mode)
    gate.is_open.set()
    error = save.join()
    assert isinstance(error, UpdateConflictError) and error.retryable and error.field == "version"
    assert check_saved_model(tmp_path / "saved").digests == old
    report = engine.save_model(tmp_path / "saved", max_shard_bytes=20_000)
    assert (report.version, report.num_reused) == ("new", 0)
    assert check_saved_model(tmp_path / "saved").digests == engine.digest() != old
    assert os.listdir(tmp_path) == ["saved"]


def test_a_second_save_there_is_refused_and_the_first_goes_on(start: Start, gate: Gate, tmp_path: Path) -> None:
    engine = start()
    save = Saving(lambda: engine.save_model(tmp_path / "saved"))
    assert gate.is_reached.wait(60)
    with pytest.raises(UpdateConflictError, match="under way"):
        engine.save_sharded_model(tmp_path / "saved")
    gate.is_open.set()
    assert isinstance(save.join(), SaveReport)
    check_saved_model(tmp_path / "saved")


def test_a_save_that_is_late_leaves_files_for_the_next(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = start()
    write, sizes = NewFile.write, []

    def slow(file: NewFile, data: bytes | memoryview) -> None:
        sizes.append(len(data))
        if len(sizes) > 30:
            time.sleep(1.0)
        write(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(NewFile, "write", slow)
        with pytest.raises(DeadlineError) as caught:
            engine.save_model(tmp_path / "saved", max_shard_bytes=20_000, timeout=1.0)
    assert caught.value.field == "timeout" and not (tmp_path / "saved").exists()
    report = engine.save_model(tmp_path / "saved", max_shard_bytes=20_000)
    assert report.num_reused > 0
    assert check_saved_model(tmp_path / "saved").digests == engine.digest()
    assert os.listdir(tmp_path) == ["saved"]


def test_a_save_that_is_cancelled_lets_go_of_everything(gate: Gate, model_folder: Path, tmp_path: Path) -> None:
    async def run() -> None:
        async with AsyncEngine(model_folder, inprocess=True, **SETTINGS) as engine:
            gate.is_open.set()
            await engine.save_model(tmp_path / "before")
            num_open = len(os.listdir("/proc/self/fd"))
            gate.is_open.clear()
            gate.is_reached.clear()
            save = asyncio.create_task(engine.save_model(tmp_path / "saved"))
            while not gate.is_reached.is_set():
                await asyncio.sleep(0.01)
            save.cancel()
            await asyncio.sleep(0.05)
            gate.is_open.set()
            with pytest.raises(asyncio.CancelledError):
                await save
            assert len(os.listdir("/proc/self/fd")) == num_open
            assert (await engine.save_model(tmp_path / "saved")).num_files

    asyncio.run(run())
    check_saved_model(tmp_path / "saved")


def test_a_save_that_is_cancelled_when_it_is_being_finished_is_done(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On the engine's loop, as a server asks for it."""
    engine, finish = start(), FolderTarget.finish
    is_reached, is_open = threading.Event(), threading.Event()

    def held(*arguments: Any) -> None:
        is_reached.set()
        assert is_open.wait(60)
        finish(*arguments)

    async def cancelled() -> SaveReport:
        save = asyncio.ensure_future(engine.asynchronous.save_model(tmp_path / "saved"))
        while not is_reached.is_set():
            await asyncio.sleep(0.01)
        save.cancel()
        await asyncio.sleep(0.05)
        is_open.set()
        return await save

    monkeypatch.setattr(FolderTarget, "finish", held)
    assert engine.asynchronous.runtime.wait(cancelled()).num_files
    check_saved_model(tmp_path / "saved")


def test_weights_that_are_not_there_are_not_saved(start: Start, tmp_path: Path) -> None:
    engine = start()
    engine.weights_checker("reset_tensors")
    with pytest.raises(HeadraceError) as caught:
        engine.save_model(tmp_path / "saved")
    assert type(caught.value).__name__ == "NeedsWeightsError"
    assert not (tmp_path / "saved").exists()


def test_a_saved_folder_is_held_against_its_digests_before_it_is_taken(start: Start, tmp_path: Path) -> None:
    engine = start()
    engine.save_model(tmp_path / "saved")
    old = engine.digest()
    engine.update_weights_from_tensor(named_tensors(model_of(5)), "other")
    engine.update_weights_from_disk(tmp_path / "saved", "again", verify=True)
    assert engine.digest() == old
    path = tmp_path / "saved" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        engine.update_weights_from_disk(tmp_path / "saved", "broken", verify=True)
    assert caught.value.field == "model.safetensors"
    assert (engine.version, engine.digest()) == ("again", old)
    with pytest.raises(CheckpointError, match=r"headrace\.json"):
        engine.update_weights_from_disk(engine.resolved.folder, "unsaved", verify=True)


@pytest.mark.parametrize("layout", [{"tp_size": 2}, {"pp_size": 2}], ids=["shares", "stages"])
def test_several_ranks_save_whole_tensors_and_each_its_own(
    tmp_path: Path, layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("qwen3", num_key_value_heads=2, vocab_size=112)
    model.save_pretrained(tmp_path / "model")
    settings = {**SETTINGS, "skip_tokenizer_init": True, "inprocess": True}
    with Engine(tmp_path / "model", **layout, **settings) as engine:
        assert engine.save_model(tmp_path / "hf").num_tensors == len(engine.digest())
        report = engine.save_sharded_model(tmp_path / "sharded")
        digests, tokens = engine.digest(), tokens_of(engine)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    record = check_saved_model(tmp_path / "sharded")
    assert (record.num_ranks, record.digests, record.version) == (2, digests, report.version)
    files = [load_file(tmp_path / "sharded" / f"model-rank-{rank}-of-2.safetensors") for rank in range(2)]
    shapes = [{name: tensor.shape for name, tensor in each.items()} for each in files]
    assert shapes[0] == shapes[1] if "tp_size" in layout else not shapes[0].keys() & shapes[1].keys()
    settings["load_format"] = "sharded"
    with Engine(tmp_path / "sharded", **layout, **settings) as engine:
        assert engine.digest() == digests and tokens_of(engine) == tokens
    with pytest.raises(CheckpointError, match=r"of 2 rank\(s\)"):
        Engine(tmp_path / "sharded", **settings)
    if "tp_size" in layout:
        monkeypatch.setattr(shares, "VOCABULARY_BLOCK", 64)  # as of another version
        with pytest.raises(CheckpointError, match=r"embed has shape \[56, .*expected \[64, .*the version of Headrace"):
            Engine(tmp_path / "sharded", **layout, **settings)
