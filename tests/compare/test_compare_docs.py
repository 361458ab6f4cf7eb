"""What docs/compare.md shows: its commands parse, its file is one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from headrace.cli.flags import given
from headrace.cli.main import parse
from headrace.compare.options import CompareOptions
from headrace.compare.trajectories import Trajectory, read_trajectories
from tests.arch.source import ROOT

TEXT = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_commands_parse() -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(lines) == 3
    for line in lines:
        arguments = parse(shlex.split(line)[1:])
        assert arguments.command == "compare" and arguments.against
        CompareOptions.from_dict(given(arguments, CompareOptions))


def test_the_file_is_read_and_its_keys_are_named(tmp_path: Path) -> None:
    path = tmp_path / "plain.jsonl"
    path.write_text(blocks("json")[0])
    first, second = read_trajectories(path)
    assert [version for _, version in first.sampled()] == ["step-12"] * 3
    assert list(second.sampled()) == [(0, "a"), (2, "b")]
    named = {key for row in re.findall(r"^\| (`.*?) \|", TEXT, re.MULTILINE) for key in re.findall(r"`(\w+)`", row)}
    assert named == set(Trajectory.__struct_fields__) - {"line"}
