"""Runs of verl, unmodified, with Headrace as its rollout backend: each command is one of docs/verl.md, as it stands.

FSDP2 on two ranks over gloo, float32, two replicas. What stands in for GPUs is `examples/verl/cpu.py`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
RUN_SECONDS = 1500
LARGEST_DIFFERENCE = 1e-5

pytestmark = pytest.mark.timeout(RUN_SECONDS + 60)


def commands() -> tuple[str, str, list[str]]:
    """What prepares a run, the environment, and a command for each trainer mode."""
    text = (ROOT / "docs" / "verl.md").read_text(encoding="utf-8")
    first, modes = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    prepare, environment, sync = first.splitlines()
    others = modes.replace("\\\n", "").splitlines()
    assert all("main_ppo" in command for command in (sync, *others)) and len(others) == 2
    return prepare, environment, [sync, *others]


def train(folder: Path, mode: int, name: str, *overrides: str) -> list[dict[str, Any]]:
    """Run a command of the page in `folder`, which looks like the source tree; the metrics of each step."""
    for each in ("examples", "headrace"):
        (folder / each).symlink_to(ROOT / each)
    prepare, environment, runs = commands()
    script = "\n".join(["set -e", prepare, environment, " ".join([runs[mode], *overrides])])
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # Ray starts a worker for each CPU that it is told of before anybody asks for one.
    variables = {**os.environ, "PATH": path, "RAY_prestart_worker_first_driver": "0", "OMP_NUM_THREADS": "1"}
    log = folder / "log"
    with log.open("wb") as output:
        done = subprocess.run(
            ["bash", "-c", script], cwd=folder, env=variables, stdout=output, stderr=output, timeout=RUN_SECONDS
        )
    assert done.returncode == 0, log.read_text(errors="replace")[-6000:]
    lines = (folder / "sums" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["data"] for line in lines]


def check_probabilities(steps: list[dict[str, Any]]) -> None:
    assert all(step["training/rollout_probs_diff_valid"] == 1 for step in steps)
    differences = [step["training/rollout_probs_diff_max"] for step in steps]
    assert max(differences) <= LARGEST_DIFFERENCE, differences


def test_a_synchronous_run_learns(tmp_path: Path) -> None:
    steps = train(tmp_path, 0, "grpo")
    check_probabilities(steps)
    rewards = [step["critic/rewards/mean"] for step in steps]
    assert len(rewards) == 8 and sum(rewards[-3:]) > sum(rewards[:3]) + 0.3, rewards


@pytest.mark.parametrize(("mode", "name"), [(1, "colocate_async"), (2, "separate_async")])
def test_asynchronous_runs_that_wait_for_their_samples(tmp_path: Path, mode: int, name: str) -> None:
    """Weights change with each step, and each sample is of the newest: engine and trainer agree about all of them."""
    steps = train(tmp_path, mode, name, f"trainer.v1.{name}.num_warmup_batches=0", "trainer.total_training_steps=3")
    assert len(steps) == 3
    check_probabilities(steps)
    assert all(step["actor/grad_norm"] > 0 for step in steps)
