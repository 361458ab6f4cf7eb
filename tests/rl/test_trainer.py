"""The GRPO trainer: advantages, logprobs, and a gradient step that does what it should."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from headrace.rl.demo import POLICY, checkpoint_digests
from headrace.rl.trainer import GrpoTrainer, TrainingSample, group_advantages

PROMPT = "<|im_start|>user\n17+25=?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture()
def trainer() -> GrpoTrainer:
    return GrpoTrainer(POLICY, learning_rate=1e-3)


def _sample(reply: str, advantage: float = 1.0, prompt: str = PROMPT) -> TrainingSample:
    """A reply with the logprobs that transformers gives it, one sequence at a time."""
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    prompt_ids, token_ids = tokenizer.encode(prompt), tokenizer.encode(reply)
    model = Qwen3ForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt_ids + token_ids])).logits[0, len(prompt_ids) - 1 : -1]
    logprobs = logits.log_softmax(-1).gather(1, torch.tensor(token_ids).unsqueeze(1)).squeeze(1)
    return TrainingSample(prompt_ids, token_ids, logprobs.tolist(), advantage, [1] * len(token_ids))


def test_advantages_are_normalised_within_the_group() -> None:
    assert group_advantages([1.0, 0.0, 0.0, 1.0]) == [1.0, -1.0, -1.0, 1.0]
    advantages = group_advantages([1.0, 0.0, 0.0, 0.0])
    assert sum(advantages) == pytest.approx(0.0)
    assert sum(a * a for a in advantages) / 4 == pytest.approx(1.0)


@pytest.mark.parametrize("rewards", [[], [1.0], [0.0, 0.0, 0.0], [1.0, 1.0]])
def test_a_group_that_agrees_teaches_nothing(rewards: list[float]) -> None:
    assert group_advantages(rewards) == [0.0] * len(rewards)


def test_logprobs_of_a_padded_batch_are_those_of_each_row_alone(trainer: GrpoTrainer) -> None:
    other = "<|im_start|>user\n3+4=?<|im_end|>\n<|im_start|>assistant\n"
    samples = [_sample("<answer>42</answer><|im_end|>"), _sample("7", prompt=other), _sample("<answer>1")]
    assert trainer.compare(samples) < 1e-5


def test_the_difference_is_the_trainers_less_the_samplers(trainer: GrpoTrainer) -> None:
    sample = _sample("<answer>42</answer><|im_end|>")
    shifted = msgspec.structs.replace(sample, logprobs=[p - 0.25 for p in sample.logprobs])
    assert trainer.compare([sample, shifted]) == pytest.approx(0.25, abs=1e-5)


def test_a_step_makes_the_rewarded_reply_more_likely_than_the_other(trainer: GrpoTrainer) -> None:
    good, bad = _sample("<answer>42</answer><|im_end|>"), _sample("<answer>45</answer><|im_end|>", -1.0)
    difference = trainer.train([good, bad])
    assert difference < 1e-5
    logprobs, mask = trainer.logprobs([good, bad])
    after = (logprobs * mask).sum(1).tolist()
    assert after[0] - after[1] > sum(good.logprobs) - sum(bad.logprobs)


def test_given_tokens_are_neither_compared_nor_learned(trainer: GrpoTrainer) -> None:
    sample = _sample("<answer>42</answer><|im_end|>")
    given = msgspec.structs.replace(
        sample, loss_mask=[0] * len(sample.token_ids), logprobs=[0.0] * len(sample.token_ids)
    )
    half = msgspec.structs.replace(sample, loss_mask=[1, *given.loss_mask[1:]])
    assert trainer.compare([half, given]) < 1e-5
    logprobs, mask = trainer.logprobs([half, given])
    assert mask.sum(1).tolist() == [1, 0] and logprobs[1].tolist() == [0.0] * logprobs.shape[1]


def test_no_advantage_no_change(trainer: GrpoTrainer) -> None:
    before = {name: tensor.clone() for name, tensor in trainer.state_dict().items()}
    trainer.train([_sample("<answer>42</answer><|im_end|>", 0.0)])
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.state_dict().items())


def test_a_ratio_beyond_the_clip_stops_pushing(trainer: GrpoTrainer) -> None:
    sample = _sample("<answer>42</answer><|im_end|>")
    already_likelier = msgspec.structs.replace(sample, logprobs=[p - 1.0 for p in sample.logprobs])
    before = {name: tensor.clone() for name, tensor in trainer.state_dict().items()}
    trainer.train([already_likelier])
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.state_dict().items())


def test_an_export_is_the_checkpoint(trainer: GrpoTrainer, tmp_path: Path) -> None:
    trainer.export(tmp_path)
    assert checkpoint_digests(tmp_path) == checkpoint_digests(POLICY)
    text = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        [{"role": "user", "content": "17+25=?"}], add_generation_prompt=True, tokenize=False
    )
    assert text == PROMPT
