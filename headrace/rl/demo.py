"""The demos: a small policy learns by GRPO, with Headrace in its own process as the sampler: one to add, another one,
with `tools`, to ask a calculator instead of guessing a product.

Owns the loop and its figures. Each step pushes the trainer's weights, samples groups of replies with their logprobs,
scores them and takes one gradient step; the last step only samples, so that the engine, the exported weights and the
last rollouts all belong to the same version.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from headrace.engine import Engine
from headrace.rl.demo_options import DemoOptions
from headrace.rl.demo_rollouts import Batch, RolloutSampler, StepSampler, ToolSampler
from headrace.rl.display import ProgressLine, StepRecord, draw_picture
from headrace.rl.push import PushReport, push_weights, tensor_digests
from headrace.telemetry import require_matplotlib
from headrace.types.errors import ConfigError
from headrace.types.plain_values import as_path
from headrace.types.request import DEFAULT_VERSION

if TYPE_CHECKING:
    from headrace.rl.trainer import GrpoTrainer, TrainingSample

POLICY = Path(__file__).parent / "policy"
TOOL_POLICY = Path(__file__).parent / "tool_policy"
WINDOW = 5
"""Steps whose mean is the reward at the start and at the end."""

MAX_NEW_TOKENS = 24
MAX_TURN_TOKENS = 96
"""Of a sum, and of one turn of a conversation with a calculator."""

CONTEXT_LENGTH = 256


def run_demo(options: DemoOptions) -> dict[str, Any]:
    """Run the demo; its files are in `options.output_dir` when it returns, and its figures in the returned dict. When
    it is interrupted it leaves the picture, the steps and the rollouts so far.

    Raises `ConfigError` for options that cannot work, and whatever the engine raises.
    """
    require_matplotlib("the demo")
    output = _output_folder(options)
    trainer = _start_trainer(options)
    trainer.export(output / "weights_first")
    records: list[StepRecord] = []
    try:
        with (
            ProgressLine(options.step_count) as progress,
            _start_engine(options) as engine,
            (output / "rollouts.jsonl").open("wb") as log,
        ):
            demo = Demo(options, engine, trainer, log, records)
            for step in range(1, options.step_count + 1):
                progress.show(demo.run_step(step))
            trainer.export(output / "weights_last")
            digest_match = engine.digest() == checkpoint_digests(output / "weights_last")
    finally:
        if records:  # an interrupted run leaves what it has come to
            (output / "steps.jsonl").write_bytes(msgspec.json.Encoder().encode_lines(records))
            draw_picture(output / "training.png", records)
    return {**demo.summary(), "digest_match": digest_match, "output_dir": str(output)}


class Demo:
    """The loop's state: who holds which weights, and what was counted."""

    def __init__(
        self, options: DemoOptions, engine: Engine, trainer: GrpoTrainer, log: BinaryIO, records: list[StepRecord]
    ) -> None:
        """Every finished step is added to `records`, its rollouts to `log`."""
        self._options = options
        self._engine = engine
        self._trainer = trainer
        self._log = log
        self._sampler = _start_sampler(options, engine)
        self._version = DEFAULT_VERSION
        self._num_requests = 0
        self._num_lost = 0
        self._num_tokens = 0
        self._seconds = 0.0
        self._records = records

    def run_step(self, step: int) -> StepRecord:
        """Push, sample, score, train."""
        pushed: PushReport | None = None
        if self._options.push:
            self._version = f"step-{step}"
            pushed = push_weights(self._engine, self._trainer.state_dict(), self._version, verify=True)
        batch = self._sampler.sample(step)
        self._num_requests += batch.num_requests
        self._num_lost += batch.num_requests - len(batch.rollouts)
        self._num_tokens += batch.num_tokens
        self._seconds += batch.seconds
        self._log.write(msgspec.json.Encoder().encode_lines(batch.rollouts))
        self._log.flush()
        samples = training_samples(batch)
        is_last = step == self._options.step_count
        difference = self._trainer.compare(samples) if is_last else self._trainer.train(samples)
        record = StepRecord(
            step=step,
            version=self._version,
            reward=batch.mean_reward,
            tokens_per_second=batch.num_tokens / batch.seconds,
            update_pause_ms=None if pushed is None else pushed.update.pause_ms,
            max_abs_logprob_diff=difference,
            is_on_policy=pushed is not None or step == 1,
        )
        self._records.append(record)
        return record

    def summary(self) -> dict[str, Any]:
        """The figures the demo answers with, but for what only the finished run knows."""
        rewards = [record.reward for record in self._records]
        pauses = [record.update_pause_ms for record in self._records if record.update_pause_ms is not None]
        return {
            "reward_start": statistics.fmean(rewards[:WINDOW]),
            "reward_end": statistics.fmean(rewards[-WINDOW:]),
            "steps": len(self._records),
            "updates": len(pauses),
            "requests": self._num_requests,
            "lost_requests": self._num_lost,
            "max_abs_logprob_diff": max(record.max_abs_logprob_diff for record in self._records if record.is_on_policy),
            "tokens_per_second": self._num_tokens / self._seconds,
            "update_pause_ms_p50": statistics.median(pauses) if pauses else 0.0,
            "final_version": self._version,
        }


def training_samples(batch: Batch) -> list[TrainingSample]:
    """The batch as the trainer takes it, each sample with its advantage within its group."""
    from headrace.rl.trainer import TrainingSample, group_advantages

    return [
        TrainingSample(rollout.prompt_ids, rollout.ids, rollout.logprobs, advantage, rollout.loss_mask)
        for group in batch.groups
        for rollout, advantage in zip(group, group_advantages([r.reward or 0.0 for r in group]), strict=True)
    ]


def checkpoint_digests(folder: Path) -> dict[str, str]:
    """The digest of every float32 tensor in a checkpoint folder's `model.safetensors`, by name."""
    from safetensors.torch import load_file

    return tensor_digests(load_file(folder / "model.safetensors").items(), "float32")


def _output_folder(options: DemoOptions) -> Path:
    output = as_path(options.output_dir, "output_dir", ConfigError)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir {output} cannot be made: {error.strerror}", field="output_dir") from None
    return output


def _start_trainer(options: DemoOptions) -> GrpoTrainer:
    import torch
    from transformers.utils.logging import disable_progress_bar

    from headrace.rl.trainer import GrpoTrainer

    disable_progress_bar()  # checkpoints of 0.7 MB: bars would only break the progress line
    torch.set_num_threads(options.num_threads)
    torch.manual_seed(options.seed)
    return GrpoTrainer(_policy(options), learning_rate=options.learning_rate)


def _policy(options: DemoOptions) -> Path:
    return TOOL_POLICY if options.tools else POLICY


def _start_sampler(options: DemoOptions, engine: Engine) -> StepSampler:
    kind, longest = (ToolSampler, MAX_TURN_TOKENS) if options.tools else (RolloutSampler, MAX_NEW_TOKENS)
    size, seed = options.group_size, options.seed
    return kind(engine, num_groups=options.group_count, group_size=size, max_new_tokens=longest, seed=seed)


def _start_engine(options: DemoOptions) -> Engine:
    num_requests = options.group_count * options.group_size
    return Engine(
        model=str(_policy(options)),
        device="cpu",
        dtype="float32",
        context_length=CONTEXT_LENGTH,
        max_running_requests=min(num_requests, 1024),
        num_threads=1,  # a policy this small gains nothing from more, and loses much where cores are shared
        seed=options.seed,
        progress=False,  # it has a line of its own
    )
