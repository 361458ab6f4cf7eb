"""Where the seconds of a trainer's step go: to the trainer, to forward steps of the engine, to Headrace's own code.

    make .venv-trl/installed.stamp && .venv-trl/bin/python -m bench.trainer_steps trl --steps 20
    make .venv-verl/installed.stamp && .venv-verl/bin/python -m bench.trainer_steps verl --steps 8

GRPO on sums with the demo's policy: TRL's trainer with an engine attached, the synchronous run of docs/verl.md. The
first step is left out. All are seconds by the clock, means of the steps. Forward steps are what the engine's core
counts (`executing_s`): the model, sampling, and on a CPU what prepares both. Own code is the rest of the time in which
the trainer waits for Headrace: scheduling, transport, text, weights.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

ROOT = Path(__file__).resolve().parents[1]
RUN_SECONDS = 1500


class StepSplit(msgspec.Struct, frozen=True):
    """Seconds of one step.

    whole     of the trainer's step
    sampling  in which the trainer waited for samples; `served` of them at least one request was at the engine, and of
              those `forward` steps ran
    update    in which the trainer waited for its weights to be live; `gathered` of them it put its weights together
    """

    whole: float
    sampling: float
    served: float
    forward: float
    update: float
    gathered: float

    @property
    def own(self) -> float:
        """What Headrace's code took."""
        return self.served - self.forward + self.update - self.gathered


def mean(splits: Sequence[StepSplit]) -> StepSplit:
    return StepSplit(*(statistics.mean(getattr(each, name) for each in splits) for name in StepSplit.__struct_fields__))


def table(name: str, split: StepSplit) -> str:
    """A row for docs/benchmarks.md."""
    requests, weights = split.served - split.forward, split.update - split.gathered
    trainer = split.whole - split.served - weights
    seconds = [split.whole, trainer, split.forward, requests, weights, split.own]
    return " | ".join([f"| {name}", *(f"{each:.3f}" for each in seconds), f"{split.own / split.whole:.1%} |"])


def run_trl(num_steps: int) -> list[StepSplit]:
    """TRL's `GRPOTrainer` with an engine in a process of its own."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from headrace import Engine
    from headrace.rl.arithmetic import draw_problems, read_reply
    from headrace.rl.demo import POLICY
    from headrace.rl.trl import TrlGeneration, attach

    splits: list[StepSplit] = []

    class Timed(TrlGeneration):
        update = sampling = forward = 0.0

        def sync_weights(self) -> None:
            begin = time.monotonic()
            super().sync_weights()
            self.update = time.monotonic() - begin

        def generate(self, *arguments: Any, **named: Any) -> Any:
            before, begin = engine.metrics()["executing_s"], time.monotonic()
            found = super().generate(*arguments, **named)
            self.sampling = time.monotonic() - begin
            self.forward = engine.metrics()["executing_s"] - before
            return found

    class Steps(TrainerCallback):  # type: ignore[misc]
        began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.monotonic()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            timed = trainer.vllm_generation
            whole = time.monotonic() - self.began
            splits.append(StepSplit(whole, timed.sampling, timed.sampling, timed.forward, timed.update, 0.0))

    problems = draw_problems(random.Random(0), 256)
    rows = [{"prompt": [{"role": "user", "content": each.question}], "answer": each.answer} for each in problems]

    def reward(completions: Any, answer: Sequence[int], **_: Any) -> list[float]:
        return [float(read_reply(each[0]["content"]) == value) for each, value in zip(completions, answer, strict=True)]

    with tempfile.TemporaryDirectory() as folder, Engine(POLICY, dtype="float32", num_threads=1) as engine:
        args = GRPOConfig(
            folder,
            max_steps=num_steps,
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=24,
            learning_rate=2e-4,
            model_init_kwargs={"dtype": "float32"},
            **{"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "beta": 0.0},
            **{"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "seed": 1},
        )
        trainer = GRPOTrainer(
            str(POLICY), reward, args=args, train_dataset=Dataset.from_list(rows), callbacks=[Steps()]
        )
        trainer.vllm_generation = Timed(attach(trainer, engine).policy)
        trainer.train()
    return splits


def run_verl(num_steps: int) -> list[StepSplit]:
    """The run of docs/verl.md, as it stands, with a rollout that `bench/timed_verl.py` times."""
    text = (ROOT / "docs" / "verl.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    prepare, environment, run = blocks[0].splitlines()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for each in ("examples", "headrace"):
            (folder / each).symlink_to(ROOT / each)
        more = f"actor_rollout_ref.rollout.name=timed trainer.total_training_steps={num_steps}"
        here = f"export PYTHONPATH=$PYTHONPATH:{ROOT} VERL_USE_EXTERNAL_MODULES=cpu,bench.timed_verl"
        variables = {
            **{**os.environ, "TIMED_VERL": scratch, "OMP_NUM_THREADS": "1", "RAY_prestart_worker_first_driver": "0"},
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        }
        script = "\n".join(["set -e", prepare, environment, here, f"{run} {more}"])
        subprocess.run(
            ["bash", "-c", script], cwd=folder, env=variables, stdout=sys.stderr, check=True, timeout=RUN_SECONDS
        )
        steps = [each["data"] for each in lines(folder / "sums" / "grpo.jsonl")]
        servers = [lines(path)[-num_steps:] for path in sorted(folder.glob("server-*.jsonl"))]
        adapters = [lines(path)[-num_steps:] for path in sorted(folder.glob("adapter-*.jsonl"))]
    assert len(steps) == num_steps and servers and adapters
    return [
        StepSplit(
            step["timing_s/step"],
            step["timing_s/gen"],
            statistics.mean(server[i]["served"] for server in servers),
            statistics.mean(server[i]["forward"] for server in servers),
            step["timing_s/update_weights"],
            step["timing_s/update_weights"] - max(adapter[i]["own"] for adapter in adapters),
        )
        for i, step in enumerate(steps)
    ]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("framework", choices=("trl", "verl"))
    parser.add_argument("--steps", type=int, default=8)
    given = parser.parse_args()
    splits = {"trl": run_trl, "verl": run_verl}[given.framework](given.steps)
    split = mean(splits[1:])
    print(table(given.framework, split))
    print(json.dumps({**msgspec.to_builtins(split), "own": split.own, "num_steps": len(splits) - 1}))


if __name__ == "__main__":
    main()
