"""What the tests with TRL train: the demo's policy, on sums."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from headrace.rl.arithmetic import draw_problems, read_reply
from headrace.rl.demo import POLICY

ENGINE: dict[str, Any] = {"inprocess": True, "num_threads": 1, "dtype": "float32", "context_length": 256}
CLOSE = 1e-5
"""The largest difference between probabilities of trainer and engine that float32 explains."""

CLOSE_LOGPROB = 5e-5
"""The same of log-probabilities, which is all that TRL logs. Those of improbable tokens show more of the rounding: the
largest of 16,000 tokens is 1e-5 to 2e-5, where the largest of their probabilities is 3e-6; both sides are as far from
the same in float64."""

SETTINGS: dict[str, Any] = {
    **{"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no"},
    **{"logging_steps": 1, "disable_tqdm": True, "temperature": 1.0, "lr_scheduler_type": "constant", "seed": 1},
    **{"model_init_kwargs": {"dtype": "float32"}, "max_completion_length": 24, "beta": 0.0},
    **{"per_device_train_batch_size": 32, "num_generations": 8, "learning_rate": 2e-4},
}


def sums(count: int = 256, seed: int = 0) -> Dataset:
    """Messages, and the right answer as a column."""
    problems = draw_problems(random.Random(seed), count)
    rows = [{"prompt": [{"role": "user", "content": each.question}], "answer": each.answer} for each in problems]
    return Dataset.from_list(rows)


def right(completions: list[list[dict[str, str]]], answer: list[int], **_: Any) -> list[float]:
    """A reward function: 1.0 for the right number, else 0.0."""
    return [float(read_reply(each[0]["content"]) == value) for each, value in zip(completions, answer, strict=True)]


def arguments(kind: Any, folder: Path, **settings: Any) -> Any:
    return kind(output_dir=str(folder), **{**SETTINGS, **settings})


def model_logprobs(model: Any, prompt: list[int], completion: list[int]) -> list[float]:
    """What transformers says of a completion, token by token."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    found: list[float] = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].tolist()
    return found


def logged(trainer: Any, name: str) -> list[float]:
    """One value of each step's log."""
    return [each[name] for each in trainer.state.log_history if name in each]


__all__ = [
    "CLOSE",
    "CLOSE_LOGPROB",
    "ENGINE",
    "POLICY",
    "arguments",
    "logged",
    "model_logprobs",
    "right",
    "sums",
]
