"""Two processes of one trainer share an engine, which the first has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.arch.source import ROOT
from tests.frameworks.trl.training import CLOSE_LOGPROB
from tests.free_ports import free_port

pytestmark = pytest.mark.timeout(600)


def run_ranks(folder: Path) -> list[dict[str, Any]]:
    """What each process says at its end."""
    command = [sys.executable, "-m", "tests.frameworks.trl.rank_runs", str(folder)]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "1"}
    started = []
    for rank in range(2):
        env = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=ROOT, env=env, **pipes))
    try:
        ended = [process.communicate(timeout=500) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], [stderr[-3000:] for _, stderr in ended]
    lines = [next(line for line in out.splitlines() if line.startswith("RESULT")) for out, _ in ended]
    return [json.loads(line[6:]) for line in lines]


def test_two_processes(tmp_path: Path) -> None:
    first, second = run_ranks(tmp_path)
    assert first["kind"] == second["kind"] == "DistributedType.MULTI_CPU"  # accelerate shards nothing on CPUs
    assert (first["processes"], second["processes"]) == (2, 2)
    assert first["versions"] == second["versions"] == ["0", "1", "2"] and first["version"] == "2"
    assert len(first["differences"]) == 3 and max(first["differences"]) <= CLOSE_LOGPROB
