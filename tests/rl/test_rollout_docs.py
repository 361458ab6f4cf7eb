"""What docs/rollouts.md shows works: each block runs with the demo's policy, the command parses, tables are true."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import get_args

import pytest

from headrace.cli.main import parse
from headrace.rl.conversations import Status, read_conversations
from headrace.rl.demo import TOOL_POLICY
from headrace.rl.tools import Fault
from tests.arch.source import ROOT

TEXT = (ROOT / "docs" / "rollouts.md").read_text(encoding="utf-8")
SETTINGS = f'{str(TOOL_POLICY)!r}, inprocess=True, num_threads=1, device="cpu", dtype="float32", kv_pool_tokens=16384'


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return [block.replace('"Qwen/Qwen3-0.6B"', SETTINGS) for block in found]


@pytest.mark.parametrize("number", range(3))
def test_blocks_run(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(blocks("python")) == 3
    exec(compile(blocks("python")[number], "docs/rollouts.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out
    for path in tmp_path.glob("*.jsonl"):
        assert {each.status for each in read_conversations(path)} <= {"done", "turns", "length", "cut"}


def test_the_command_parses() -> None:
    (line,) = [line for block in blocks("sh") for line in block.splitlines()]
    arguments = parse(shlex.split(line)[1:])
    assert (arguments.command, arguments.tools) == ("demo", True)


def test_tables_name_every_status_and_fault() -> None:
    named = {word for row in re.findall(r"^\| (`.*?) \|", TEXT, re.MULTILINE) for word in re.findall(r"`(\w+)`", row)}
    assert {*get_args(Status), *get_args(Fault)} - {"new", ""} <= named
