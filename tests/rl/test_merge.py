"""`headrace merge`: checkpoints that trainers' ranks have written become the folders that transformers would write."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import AutoModelForCausalLM, PreTrainedModel

from headrace import Engine, check_saved_model
from headrace.cli.main import main
from headrace.rl import trainer_folders
from headrace.rl.dcp_metadata import read_metadata
from headrace.rl.merge import merge
from headrace.rl.push import tensor_digests
from headrace.types.errors import CheckpointError, ConfigError, HeadraceError, RequestError
from tests.parity.models import make_model, save_model
from tests.rl.megatron_reference import Mesh, Naming, file_tensors, rank_chunks
from tests.rl.rank_processes import run_ranks
from tests.rl.rank_scenarios import SETTINGS

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("qwen3", {"tie_word_embeddings": True}),
    "experts": ("qwen3_moe", {"mlp_only_layers": [1]}),
}
MESHES = {"four ranks": [4], "two by two": [2, 2]}


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    scratch = tmp_path_factory.mktemp("models")
    made = {name: make_model(family, **overrides) for name, (family, overrides) in MODELS.items()}
    return {name: save_model(model, scratch / name) for name, model in made.items()}


@pytest.fixture(scope="module")
def saved(homes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What four ranks save, by model and mesh."""
    scratch = tmp_path_factory.mktemp("saved")
    outs = {f"{model} {mesh}": scratch / f"{model} {mesh}" for model in MODELS for mesh in MESHES}
    scenarios: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, out in outs.items():
        out.mkdir()
        model, _, mesh = name.partition(" ")
        arguments = {"folder": str(homes[model]), "mesh_shape": MESHES[mesh], "out": str(out)}
        scenarios[name] = "save_sharded", arguments
    run_ranks(4, scenarios)
    return outs


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: each for file in sorted(folder.glob("*.safetensors")) for name, each in load_file(file).items()}


def tensors_of(home: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder under the names of files."""
    return file_tensors(AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32))[1]


def require_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], each) for name, each in expected.items())


@pytest.mark.parametrize("kind", ["dcp", "ranks"])
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("model", MODELS)
def test_shards_of_fsdp_become_a_folder_that_is_served(
    homes: dict[str, Path], saved: dict[str, Path], tmp_path: Path, model: str, mesh: str, kind: str
) -> None:
    source, out, expected = saved[f"{model} {mesh}"] / kind, tmp_path / "out", tensors_of(homes[model])
    report = merge(source, out, homes[model], max_shard_bytes=50_000)
    assert report.num_tensors == len(expected) and report.num_files > 4
    require_equal(weights_of(out), expected)
    assert check_saved_model(out).files.keys() == {each.name for each in out.iterdir()} - {"headrace.json"}
    with Engine(model=str(out), dtype="float32", skip_tokenizer_init=True, **SETTINGS) as engine:
        assert engine.digest() == tensor_digests(expected.items(), "float32")


def save_alone(state: dict[str, Any], folder: Path) -> None:
    """As `torch.distributed.checkpoint` saves in one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(state, checkpoint_id=folder, no_dist=True)


def stacked(model: PreTrainedModel, naming: Naming, is_homogeneous: bool) -> dict[str, Any]:
    """A model as Megatron-Core's `torch_dist` names it: experts stacked, and layers too where all are alike."""
    ((params, _),) = rank_chunks(model, Mesh(), naming)
    found: dict[str, Any] = {}
    groups: dict[str, list[torch.Tensor]] = {}
    for name, tensor in params.items():
        if ".experts." in name:
            head, _, tail = name.partition(".mlp.experts.")
            groups.setdefault(f"{head}.mlp.experts.experts.{tail[-18:].split('.')[-2]}.weight", []).append(tensor)
        else:
            found[name] = tensor
    found |= {name: torch.stack(each) for name, each in groups.items()}
    if not is_homogeneous:
        return found
    layers: dict[str, list[torch.Tensor]] = {}
    for name in [name for name in found if name.startswith("decoder.layers.")]:
        layers.setdefault(".".join(["decoder.layers", *name.split(".")[3:]]), []).append(found.pop(name))
    return found | {name: torch.stack(each) for name, each in layers.items()}


@pytest.mark.parametrize(
    ("family", "is_homogeneous"),
    [("llama", True), ("qwen2", False), ("qwen3", True), ("qwen3_moe", True), ("moe", False)],
)
def test_a_torch_dist_checkpoint_of_megatron(tmp_path: Path, family: str, is_homogeneous: bool) -> None:
    dense: dict[str, list[int]] = {"qwen3_moe": [], "moe": [1]}
    overrides: dict[str, Any] = {"mlp_only_layers": dense[family]} if family in dense else {}
    model = make_model("qwen3_moe" if family == "moe" else family, **overrides)
    state: dict[str, Any] = stacked(model, Naming(is_homogeneous, False, 64), is_homogeneous)
    state["decoder.layers.self_attention.core_attention._extra_state"] = 5
    state["optimizer.state.exp_avg.embedding.word_embeddings.weight"] = torch.ones(3)
    save_alone(state, tmp_path / "iter_0000012")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12\n")
    home = save_model(model, tmp_path / "huggingface")
    merge(tmp_path, tmp_path / "out", dtype="bfloat16")
    expected = {name: each.bfloat16() for name, each in tensors_of(home).items()}
    require_equal(weights_of(tmp_path / "out"), expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.fixture
def source(saved: dict[str, Path], tmp_path: Path) -> Path:
    """A folder of two kinds that may be broken."""
    return Path(shutil.copytree(saved["tied four ranks"], tmp_path / "source"))


def refusal(source: Path, out: Path, home: Path | None) -> HeadraceError:
    with pytest.raises(HeadraceError) as caught:
        merge(source, out, home)
    assert not out.exists()
    return caught.value


def test_an_interrupted_merge_goes_on_and_a_finished_one_is_replaced(
    homes: dict[str, Path], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out, expected = source / "dcp", tmp_path / "out", tensors_of(homes["tied"])
    rounded = {name: each.bfloat16() for name, each in expected.items()}
    read = trainer_folders.DcpFolder.read

    def interrupt() -> None:
        reads: list[str] = []

        def failing(self: Any, name: str, box: Any) -> torch.Tensor:
            reads.append(name)
            if len(reads) == 12:
                raise CheckpointError("the disk is gone", field=name)
            return read(self, name, box)

        with monkeypatch.context() as patch:
            patch.setattr(trainer_folders.DcpFolder, "read", failing)
            with pytest.raises(CheckpointError, match="gone"):
                merge(folder, out, homes["tied"], max_shard_bytes=20_000, dtype="bfloat16")

    assert merge(folder, out, homes["tied"]).num_reused == 0
    interrupt()
    require_equal(weights_of(out), expected)  # what was there is as it was
    report = merge(folder, out, homes["tied"], max_shard_bytes=20_000, dtype="bfloat16")
    assert 0 < report.num_reused < report.num_files
    require_equal(weights_of(out), rounded)
    interrupt()
    os.utime(folder / ".metadata", (1, 1))  # as if it was saved anew
    assert merge(folder, out, homes["tied"], max_shard_bytes=20_000, dtype="bfloat16").num_reused == 0
    assert not [each.name for each in tmp_path.iterdir() if "headrace" in each.name]


def test_a_small_cache_is_only_slower(
    homes: dict[str, Path], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_folders, "CACHE_BYTES", 0)
    merge(source / "dcp", tmp_path / "out", homes["tied"])
    require_equal(weights_of(tmp_path / "out"), tensors_of(homes["tied"]))


def test_what_is_missing_or_broken_is_named(homes: dict[str, Path], source: Path, tmp_path: Path) -> None:
    home, out = homes["tied"], tmp_path / "out"
    assert refusal(source / "nowhere", out, home).field == "source"
    assert refusal(source, out, home).field == "source"
    error = refusal(source / "dcp", out, None)
    assert isinstance(error, ConfigError) and error.field == "model"
    assert "no tensor of a Qwen3Moe" in refusal(source / "dcp", out, homes["experts"]).message
    (source / "dcp" / "__2_0.distcp").rename(tmp_path / "aside")
    assert refusal(source / "dcp", out, home).field == "__2_0.distcp"
    (source / "dcp" / "__2_0.distcp").write_bytes((tmp_path / "aside").read_bytes()[:1000])
    assert refusal(source / "dcp", out, home).field == "__2_0.distcp"
    (source / "ranks" / "model_world_size_4_rank_2.pt").unlink()
    assert refusal(source / "ranks", out, home).field == "model_world_size_4_rank_2.pt"
    (source / "ranks" / "model_world_size_2_rank_0.pt").touch()
    assert "files of [2, 4] ranks" in refusal(source / "ranks", out, home).message
    (tmp_path / "legacy" / "mp_rank_00").mkdir(parents=True)
    assert "torch_dist" in refusal(tmp_path / "legacy", out, home).message


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    model = make_model("qwen3")
    home, whole = save_model(model, tmp_path / "home"), dict(model.state_dict())
    norm = "model.norm.weight"
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "missing": ({name: each for name, each in whole.items() if name != norm}, norm),
        "unknown": ({**whole, "model.layers.0.mlp.extra.weight": torch.ones(2)}, "model.layers.0.mlp.extra.weight"),
        "misshapen": ({**whole, norm: torch.ones(3)}, norm),
        "not finite": ({**whole, norm: torch.full((48,), torch.nan)}, norm),
        "integers": ({**whole, norm: torch.ones(48, dtype=torch.int64)}, norm),
        "twice": ({**whole, **{f"ema.{name}": each for name, each in whole.items()}}, "source"),
    }
    for case, (state, field) in cases.items():
        save_alone(state, tmp_path / case)
        assert refusal(tmp_path / case, tmp_path / "out", home).field == field, case
    with pytest.raises(RequestError):
        merge(tmp_path / "not finite", home, home)  # not a folder that a save wrote


class Exploit:
    """Its pickle would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_that_is_stored_is_run(homes: dict[str, Path], source: Path, tmp_path: Path) -> None:
    trap, metadata = tmp_path / "trap", source / "dcp" / ".metadata"
    data = metadata.read_bytes()
    metadata.write_bytes(pickle.dumps(Exploit(trap)))
    error = refusal(source / "dcp", tmp_path / "out", homes["tied"])
    assert error.field == ".metadata" and "pathlib" in error.message
    metadata.write_bytes(data)
    torch.save({"model.norm.weight": Exploit(trap)}, source / "ranks" / "model_world_size_4_rank_1.pt")
    assert refusal(source / "ranks", tmp_path / "out", homes["tied"]).field == "model_world_size_4_rank_1.pt"
    assert not trap.exists()


def test_mutated_metadata_is_refused_or_read(source: Path) -> None:
    data, chance, num_refused = (source / "dcp" / ".metadata").read_bytes(), random.Random(5), 0
    for _ in range(150):
        broken = bytearray(data)
        for _ in range(chance.randint(1, 3)):
            place = chance.randrange(len(broken))
            kind = chance.randrange(3)
            if kind == 0:
                broken[place] = chance.randrange(256)
            elif kind == 1:
                del broken[place : place + chance.randint(1, 9)]
            else:
                broken[place:place] = chance.randbytes(chance.randint(1, 4))
        try:
            read_metadata(bytes(broken), "mutated")
        except CheckpointError:
            num_refused += 1
    assert num_refused > 100


def test_the_command_reports_and_refuses(
    homes: dict[str, Path], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", str(source / "ranks"), str(tmp_path / "out"), "--model", str(homes["tied"])]
    assert main([*words, "--dtype", "float16", "--max-shard-bytes", "100000"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["path"] == str(tmp_path / "out") and report["num_tensors"] == len(tensors_of(homes["tied"]))
    assert main([*words[:-1], str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
