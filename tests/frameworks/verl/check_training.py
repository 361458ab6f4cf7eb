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
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[3]
RUN_SECONDS = 1500
LARGEST_DIFFERENCE = 1e-5

pytestmark = pytest.mark.timeout(RUN_SECONDS + 60)


class Page(NamedTuple):
    """The commands of docs/verl.md: what sets the environment, and of each run what prepares it and what it is."""

    environment: str
    runs: dict[str, tuple[str, str]]


def page() -> Page:
    text = (ROOT / "docs" / "verl.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (sums, *environment, sync), (colocate, separate), (products, tools) = (
        block.replace("\\\n", "").splitlines() for block in blocks
    )
    assert all("main_ppo" in command for command in (sync, colocate, separate, tools))
    runs = {"sync": sync, "colocate_async": colocate, "separate_async": separate}
    return Page(
        "\n".join(environment), {**{name: (sums, run) for name, run in runs.items()}, "tools": (products, tools)}
    )


def train(folder: Path, name: str, log: str, *overrides: str) -> list[dict[str, Any]]:
    """Run a command of the page in `folder`, which looks like the source tree; the metrics of each step, from `log`."""
    for each in ("examples", "headrace"):
        (folder / each).symlink_to(ROOT / each)
    environment, runs = page()
    prepare, run = runs[name]
    script = "\n".join(["set -e", environment, prepare, " ".join([run, *overrides])])
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # Ray starts a worker for each CPU that it is told of before anybody asks for one.
    variables = {**os.environ, "PATH": path, "RAY_prestart_worker_first_driver": "0", "OMP_NUM_THREADS": "1"}
    printed = folder / "printed"
    with printed.open("wb") as output:
        done = subprocess.run(
            ["bash", "-c", script], cwd=folder, env=variables, stdout=output, stderr=output, timeout=RUN_SECONDS
        )
    assert done.returncode == 0, printed.read_text(errors="replace")[-6000:]
    lines = (folder / log).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["data"] for line in lines]


def check_probabilities(steps: list[dict[str, Any]]) -> None:
    assert all(step["training/rollout_probs_diff_valid"] == 1 for step in steps)
    differences = [step["training/rollout_probs_diff_max"] for step in steps]
    assert max(differences) <= LARGEST_DIFFERENCE, differences


def shown_rewards(folder: Path) -> list[float]:
    """What the page's command for looking at a run shows."""
    text = (ROOT / "docs" / "verl.md").read_text(encoding="utf-8")
    (command,) = re.findall("^grep .*$", text, re.MULTILINE)
    shown = subprocess.run(["bash", "-c", command], cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return [float(line.rpartition(":")[2]) for line in shown.stdout.splitlines()]


def test_a_synchronous_run_learns(tmp_path: Path) -> None:
    steps = train(tmp_path, "sync", "sums/grpo.jsonl")
    check_probabilities(steps)
    rewards = [step["critic/rewards/mean"] for step in steps]
    assert shown_rewards(tmp_path) == rewards
    assert len(rewards) == 8 and sum(rewards[-3:]) > sum(rewards[:3]) + 0.3, rewards


@pytest.mark.parametrize("mode", ["colocate_async", "separate_async"])
def test_asynchronous_runs_that_wait_for_their_samples(tmp_path: Path, mode: str) -> None:
    """Weights change with each step, and each sample is of the newest: engine and trainer agree about all of them."""
    three = f"trainer.v1.{mode}.num_warmup_batches=0", "trainer.total_training_steps=3"
    steps = train(tmp_path, mode, f"sums/{mode}.jsonl", *three)
    assert len(steps) == 3
    check_probabilities(steps)
    assert all(step["actor/grad_norm"] > 0 for step in steps)


def test_conversations_with_a_tool(tmp_path: Path) -> None:
    """verl's own agent loop calls its own tool; the trainer agrees about what was sampled in every turn."""
    steps = train(tmp_path, "tools", "products/grpo.jsonl", "trainer.total_training_steps=3")
    assert len(steps) == 3
    check_probabilities(steps)
    assert max(step["num_turns/max"] for step in steps) >= 4, "no conversation called the tool"
    assert any(step["critic/rewards/mean"] > 0 for step in steps)
