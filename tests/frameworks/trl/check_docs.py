"""What docs/trl.md shows works: its blocks run as one program, on the policy that knows tools."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from headrace.cli.main import parse
from headrace.rl.demo import TOOL_POLICY
from tests.arch.source import ROOT

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(500)]
TEXT = (ROOT / "docs" / "trl.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """AsyncGRPO's `train` is defined only: check_servers runs the same."""
    monkeypatch.chdir(tmp_path)
    program = "\n".join(blocks("python")).replace("Qwen/Qwen3-0.6B", str(TOOL_POLICY))
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(program, "docs/trl.md", "exec"), names)
    assert "version 2 after 3 pushes" in capsys.readouterr().out
    assert [each["step"] for each in names["trainer"].state.log_history if "reward" in each]


def test_the_policy_of_the_source_tree_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first block, with what the page says to set where there is no GPU."""
    (tmp_path / "headrace").symlink_to(ROOT / "headrace")
    monkeypatch.chdir(tmp_path)
    (told,) = re.findall(r'^`(MODEL = "[\w/]+")`, with `(max_steps=\d+)` and `(logging_steps=\d+)`', TEXT, re.MULTILINE)
    model, steps, logging = told
    program = re.sub("^MODEL = .*$", model, blocks("python")[0], flags=re.MULTILINE)
    program = program.replace("max_steps=3,", f"{steps}, {logging}, seed=1,")
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(program, "docs/trl.md", "exec"), names)
    assert "version 39 after 40 pushes" in capsys.readouterr().out
    rewards = [each["reward"] for each in names["trainer"].state.log_history if "reward" in each]
    assert len(rewards) == 10 and sum(rewards[-3:]) > sum(rewards[:3]) + 0.2, rewards


def test_commands_parse() -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("headrace")]
    assert [parse(shlex.split(line)[1:]).command for line in lines] == ["serve"]
