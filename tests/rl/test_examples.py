"""The scripts in `examples/` run as they stand and show what they say."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import sys

import pytest
from torch import distributed

from headrace import Engine, serve
from headrace.rl.demo import POLICY
from tests.arch.source import ROOT
from tests.free_ports import free_port
from tests.rl.trainer_ranks import run_ranks


def _run_here(script: str, *arguments: str) -> str:
    """What it prints, in this process, which has imported all that it needs."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    return out.getvalue()


def test_grpo() -> None:
    source = (ROOT / "examples" / "grpo.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 60
    (step,) = re.findall(r"step 1: reward (\S+), trainer and engine differ by (\S+) at most", _run_here("grpo.py", "1"))
    assert 0 < float(step[0]) < 1 and float(step[1]) < 1e-4


def test_server_and_trainer() -> None:
    with Engine(POLICY, inprocess=True, num_threads=1) as engine:
        output = _run_here("server_and_trainer.py", serve(engine).url)
        assert engine.version == "2"
    assert re.findall(r"tensors live as version (\d): '<answer>", output) == ["0", "1", "2"]


def test_tools() -> None:
    output = _run_here("tools.py")
    (calling,) = re.findall(r"(\d+) of 64 ask the calculator", output)
    assert len(re.findall(r"calls \['\{.*? -> \d+'", output)) > 0 and int(calling) > 0
    assert "one reply: " in output


def test_score_with_a_teacher() -> None:
    first, second = re.findall(r"student: (\S+) nats|itself: (\S+) nats", _run_here("score_with_a_teacher.py"))
    assert float(first[0]) > 1 and abs(float(second[1])) < 1e-3


def test_generate_and_score() -> None:
    output = _run_here("generate_and_score.py")
    differences = [float(value) for value in re.findall(r"max difference (\S+)", output)]
    assert len(differences) == 4 and max(differences) < 1e-4


def run_as_rank(rank: int, script: str, port: int) -> str:
    """What it prints as a rank of two of torchrun, of which it knows what is in the environment."""
    distributed.destroy_process_group()
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | {key: str(of) for key, of in place.items()}
    return _run_here(script)


def test_verl_engine() -> None:
    leading, following = run_ranks(2, run_as_rank, "verl_engine.py", free_port())
    assert re.findall(r"version (\d) of \d+ tensors: '", leading) == ["0", "1"] and following == ""


def test_push_while_generating() -> None:
    output = _run_here("push_while_generating.py")
    assert output.endswith("live version: tuned\n")
    spans = re.findall(r"request \d: \{'default': (\d+), 'tuned': (\d+)\}", output)
    assert len(spans) == 8
    assert all(int(old) > 0 and int(new) > 0 and int(old) + int(new) == 256 for old, new in spans)
