"""The command line of the kernel builder. What it builds needs a device."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.cli.flags import given
from headrace.config import EngineConfig
from tools.kernels import SET_HERE, describe, main, parse


def test_shapes_models_and_engine_settings_are_taken() -> None:
    words = ["build", "--shape", "qwen3-0.6b", "--shape", "qwen3-8b", "--model", "m", "--out", "d"]
    arguments = parse([*words, "--numerics", "invariant", "--page-size", "32", "--no-cuda-graphs"])
    assert (arguments.shape, arguments.model, arguments.out) == (["qwen3-0.6b", "qwen3-8b"], ["m"], Path("d"))
    assert given(arguments, EngineConfig, skip=SET_HERE) == {
        "numerics": "invariant",
        "page_size": 32,
        "cuda_graphs": False,
    }


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["build", "--out", "d"], "at least one"),
        (["build", "--shape", "tiny"], "--out"),
        (["build", "--shape", "huge", "--out", "d"], "huge"),
        (["build", "--shape", "tiny", "--out", "d", "--kernel-cache", "e"], "--kernel-cache"),
        ([], "command"),
    ],
)
def test_a_wrong_command_line_ends_with_2(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(words)
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err


def test_a_bad_setting_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--shape", "tiny", "--out", str(tmp_path), "--page-size", "0"]) == 2
    assert "page_size must be in" in capsys.readouterr().err


def test_the_size_of_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "triton" / "KEY").mkdir(parents=True)
    (tmp_path / "triton" / "KEY" / "k.cubin").write_bytes(bytes(1_500_000))
    assert describe(tmp_path) == f"1 kernels, 1.5 MB in {tmp_path}"
