"""What a start makes of a model folder: its tokenizer, its ends of sequence, its tied and its quantized weights."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from headrace import Engine
from headrace.cli.main import main
from headrace.types.errors import CheckpointError, ConfigError, UnsupportedModelError
from tests.engine.builders import EOS_ID, SETTINGS

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
USER_ID = EOS_ID + 1
Starter = Callable[..., Engine]


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model_folder, tmp_path / "model")


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def check(folder: Path, *words: str) -> int:
    return main(["check", str(folder), "--device", "cpu", "--kv-pool-tokens", "4096", *words])


def test_a_folder_without_a_tokenizer_is_refused_unless_ids_are_all_there_is(
    folder: Path, start: Starter, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    for inprocess in (True, False):
        with pytest.raises(ConfigError, match=r"no tokenizer files.*give tokenizer, or skip_tokenizer_init") as caught:
            Engine(folder, inprocess=inprocess, **SETTINGS)
        assert caught.value.field == "tokenizer"
    for words in (["generate", str(folder), "hello"], ["check", str(folder)]):
        assert main([*words, "--device", "cpu", "--kv-pool-tokens", "4096"]) == 2
        assert "skip_tokenizer_init" in capsys.readouterr().err
    engine = start(folder, skip_tokenizer_init=True)
    (output,) = engine.generate(input_ids=[1, 2, 3], sampling_params={"max_new_tokens": 4, "ignore_eos": True})
    assert len(output.token_ids) == 4 and check(folder, "--skip-tokenizer-init") == 0


def test_ends_are_those_of_both_files_and_of_the_tokenizer(
    folder: Path, start: Starter, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(folder / "config.json", eos_token_id=[7, 7, 10**30, -1])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    edit(folder / "tokenizer_config.json", eos_token="<|user|>")
    with caplog.at_level(logging.INFO, "headrace"):
        engine = start(folder)
    line = "7 (config.json, generation_config.json); 9 (generation_config.json); 257 (the tokenizer's eos_token)"
    assert line in caplog.text
    assert engine.resolved.model.eos_token_ids == (7, 9, USER_ID)
    for end in (7, 9, USER_ID):
        params = {"max_new_tokens": 5, "logit_bias": {str(end): 100.0}}
        (output,) = engine.generate(input_ids=[1, 2], sampling_params=params)
        assert output.finish_reason == "stop" and list(output.token_ids) == [end]
        (output,) = engine.generate(input_ids=[1, 2], sampling_params={**params, "ignore_eos": True})
        assert len(output.token_ids) == 5
    assert check(folder) == 0 and "257 (the tokenizer's eos_token)" in capsys.readouterr().out


def test_a_model_without_an_end_warns(folder: Path, start: Starter, caplog: pytest.LogCaptureFixture) -> None:
    edit(folder / "config.json", eos_token_id=None)
    (folder / "generation_config.json").unlink(missing_ok=True)
    with caplog.at_level(logging.WARNING, "headrace"):
        start(folder, skip_tokenizer_init=True)
    assert "no file names an end of sequence" in caplog.text


def test_a_tied_model_may_hold_its_one_tensor_as_the_head(
    folder: Path, start: Starter, engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] = tensors.pop(EMBED)
    save_file(tensors, folder / "model.safetensors")
    other = start(folder)
    assert other.digest() == engine.digest() and check(folder) == 0
    other.update_weights_from_disk(folder, "again")
    assert other.digest() == engine.digest()
    doubled = [(name, 2 * tensor) for name, tensor in tensors.items()]
    other.update_weights_from_tensor(doubled, "doubled")
    assert torch.equal(other.get_weights_by_name(EMBED), 2 * tensors[HEAD])


@pytest.mark.parametrize("kind", ["declared", "fp8", "awq"])
def test_check_refuses_quantized_folders_as_a_start_does(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    if kind == "declared":
        edit(folder / "config.json", quantization_config={"quant_method": "fp8"})
    elif kind == "fp8":
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    else:
        tensors[name.replace("weight", "qweight")] = tensors.pop(name).to(torch.int32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises((CheckpointError, UnsupportedModelError)) as caught:
        Engine(folder, inprocess=True, **SETTINGS)
    assert check(folder) == 2
    assert " ".join(caught.value.message.split()) in capsys.readouterr().err


def test_check_answers_for_weights_that_are_not_there_yet(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "training_args.bin").write_bytes(b"x")
    assert check(folder) == 0


LOST = "x" * 300  # longer than a name may be: whoever looks at it is told so, root too


def test_a_folder_that_may_not_be_looked_at_is_refused_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases: list[tuple[str, dict[str, Any]]] = [("model", {}), ("tokenizer", {"tokenizer": f"/tmp/{LOST}"})]
    for name, settings in cases:
        with pytest.raises(ConfigError, match=f"{name} .* cannot be read: File name too long") as caught:
            Engine(folder if settings else f"/tmp/{LOST}", inprocess=True, **SETTINGS, **settings)
        assert caught.value.field == name
    assert check(folder / LOST) == check(folder, "--tokenizer", str(folder / LOST)) == 2

    def scandir(path: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "scandir", scandir)  # it may be entered, but not listed
    with pytest.raises(ConfigError, match="cannot be read: Permission denied") as caught:
        Engine(folder, inprocess=True, **SETTINGS)
    assert caught.value.field == "model" and check(folder) == 2
    assert "internal error" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("generation_config.json", "generation_config.json"),
        ("tokenizer_config.json", "tokenizer"),
        ("tokenizer.json", "tokenizer"),
        ("chat_template.jinja", "tokenizer"),
        ("additional_chat_templates", "tokenizer"),
    ],
)
def test_a_file_that_may_not_be_looked_at_is_not_taken_for_absent(folder: Path, name: str, field: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(LOST)
    with pytest.raises((CheckpointError, ConfigError), match=f"{name} cannot be read") as caught:
        Engine(folder, inprocess=True, **SETTINGS)
    assert caught.value.field == field


def test_vocabularies_that_may_not_be_looked_at_are_not_taken_for_absent(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").symlink_to(LOST)
    with pytest.raises(ConfigError, match=r"tokenizer.model cannot be read") as caught:
        Engine(folder, inprocess=True, **SETTINGS)
    assert caught.value.field == "tokenizer"
    (folder / "tokenizer.model").unlink()
    (folder / "vocab.json").write_text("{}")
    (folder / "merges.txt").symlink_to(LOST)
    with pytest.raises(ConfigError, match=r"merges.txt cannot be read"):
        Engine(folder, inprocess=True, **SETTINGS)
