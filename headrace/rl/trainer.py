"""A GRPO trainer in plain PyTorch. Owns the policy being trained and its optimizer; knows no engine and no task.

The algorithm is group relative policy optimization (Shao et al. 2024, "DeepSeekMath", section 4.1) with one gradient
step per batch: rewards are normalised within the samples of one prompt, and the importance ratio against the
probabilities reported by whoever drew the samples is clipped as in PPO.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM


class TrainingSample(msgspec.Struct, frozen=True):
    """One reply to learn from: its ids, the sampler's logprob of each reply token (at T = 1), its advantage, and which
    tokens were sampled (1; those with 0 were given, and are not learned)."""

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    advantage: float
    loss_mask: list[int]


def group_advantages(rewards: Sequence[float]) -> list[float]:
    """Rewards of one prompt's samples, less their mean, over their standard deviation; zeros when all agree."""
    if not rewards:
        return []
    mean = sum(rewards) / len(rewards)
    deviation = (sum((reward - mean) ** 2 for reward in rewards) / len(rewards)) ** 0.5
    return [(reward - mean) / deviation if deviation > 1e-8 else 0.0 for reward in rewards]


class GrpoTrainer:
    """The policy in float32 on CPU, with Adam. `state_dict` holds the live tensors, under Hugging Face names."""

    def __init__(self, folder: Path, *, learning_rate: float, clip: float = 0.2, max_grad_norm: float = 1.0) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._optimizer = torch.optim.Adam(self._model.parameters(), lr=learning_rate)
        self._clip = clip
        self._max_grad_norm = max_grad_norm

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The live parameters by Hugging Face name, tied ones under both names."""
        return dict(self._model.state_dict())

    def logprobs(self, samples: Sequence[TrainingSample]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the reply tokens, float32 [samples, longest row - 1], and the mask of real ones."""
        num_rows, longest = len(samples), max(len(s.prompt_ids) + len(s.token_ids) for s in samples)
        input_ids = torch.zeros(num_rows, longest, dtype=torch.int64)
        is_reply = torch.zeros(num_rows, longest, dtype=torch.bool)
        for row, sample in enumerate(samples):
            start, end = len(sample.prompt_ids), len(sample.prompt_ids) + len(sample.token_ids)
            input_ids[row, :end] = torch.tensor(sample.prompt_ids + sample.token_ids)
            is_reply[row, start:end] = torch.tensor(sample.loss_mask, dtype=torch.bool)
        # Rows are padded on the right: under causal attention no real position sees the padding.
        logits = self._model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        logprobs = logits.log_softmax(-1).gather(2, input_ids[:, 1:].unsqueeze(2)).squeeze(2)
        mask = is_reply[:, 1:]
        return logprobs.masked_fill(~mask, 0.0), mask

    def train(self, samples: Sequence[TrainingSample]) -> float:
        """One gradient step on `samples`; returns what `compare` would have said of them before it."""
        difference, mask = self._difference(samples)
        advantages = torch.tensor([sample.advantage for sample in samples]).unsqueeze(1)
        ratio = difference.exp()
        gain = torch.minimum(ratio * advantages, ratio.clamp(1 - self._clip, 1 + self._clip) * advantages)
        loss = -(gain * mask).sum() / mask.sum()
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._max_grad_norm)
        self._optimizer.step()
        return difference.detach().abs().max().item()

    @torch.no_grad()
    def compare(self, samples: Sequence[TrainingSample]) -> float:
        """The largest absolute difference between the trainer's logprobs and the sampler's; trains nothing."""
        difference, _ = self._difference(samples)
        return difference.abs().max().item()

    def export(self, folder: Path) -> None:
        """Write the policy to `folder` as a Hugging Face checkpoint, tokenizer included."""
        self._model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)

    def _difference(self, samples: Sequence[TrainingSample]) -> tuple[torch.Tensor, torch.Tensor]:
        """Trainer's less sampler's logprob of every reply token (0 elsewhere), and the mask of real ones."""
        logprobs, mask = self.logprobs(samples)
        pairs = [pair for each in samples for pair in zip(each.logprobs, each.loss_mask, strict=True)]
        sampled = torch.tensor([logprob for logprob, is_sampled in pairs if is_sampled])
        return logprobs - torch.zeros_like(logprobs).masked_scatter(mask, sampled), mask
