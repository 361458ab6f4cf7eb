"""What docs/training.md shows works: each block runs, as one process or as two ranks, and each command parses."""

from __future__ import annotations

import re
import shlex

import pytest

from headrace import Engine, serve
from headrace.cli.main import parse
from headrace.rl.demo import POLICY
from tests.arch.source import ROOT
from tests.rl.rank_processes import run_ranks

TEXT = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
MODEL = "Qwen/Qwen3-0.6B"


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return [block.replace(MODEL, str(POLICY)) for block in found]


def test_one_process_pushes(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(blocks("python")[0], "docs/training.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.splitlines()[-1] == "step-2"


def test_ranks_push() -> None:
    _, fsdp, megatron, turn = blocks("python")
    with Engine(str(POLICY), inprocess=True, num_threads=1, context_length=64) as engine:
        scenarios = {
            "fsdp": ("run_block", {"block": fsdp}),
            "megatron": ("run_megatron_block", {"block": megatron, "folder": str(POLICY), "url": serve(engine).url}),
            "turn": ("run_megatron_block", {"block": turn, "folder": str(POLICY), "url": serve(engine).url}),
        }
        answers = run_ranks(2, scenarios)
        assert (engine.version, engine.status().state) == ("", "released"), "its turn is over"
    assert answers == {"fsdp": ["1", "1"], "megatron": ["step-1", "step-1"], "turn": ["1", "1"]}


def test_commands_parse() -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert [parse(shlex.split(line)[1:]).command for line in lines] == ["merge", "merge"]
