"""The scripts in `examples/` run as they stand and show what they say."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.arch.source import ROOT, child_environment


def _run(script: str, *runner: str) -> str:
    environment = child_environment()
    command = [sys.executable, *runner, str(ROOT / "examples" / script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_generate_and_score() -> None:
    output = _run("generate_and_score.py")
    differences = [float(value) for value in re.findall(r"max difference (\S+)", output)]
    assert len(differences) == 4 and max(differences) < 1e-4


def test_verl_engine() -> None:
    output = _run("verl_engine.py", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert re.findall(r"version (\d) of \d+ tensors: '", output) == ["0", "1"]


def test_push_while_generating() -> None:
    output = _run("push_while_generating.py")
    assert output.endswith("live version: tuned\n")
    spans = re.findall(r"request \d: \{'default': (\d+), 'tuned': (\d+)\}", output)
    assert len(spans) == 8
    assert all(int(old) > 0 and int(new) > 0 and int(old) + int(new) == 256 for old, new in spans)
