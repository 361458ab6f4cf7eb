"""Makes the policy the demo ships with, from nothing but this file: `python -m tools.make_policy [FOLDER]`.

Owns the policy's tokenizer, architecture and warm-up. The warm-up has two halves. First the model learns to add from
right answers; then it imitates a sloppy teacher who keeps the format but is right in one reply of four. What results
writes well-formed replies, is mostly wrong, and yet knows the right one well enough for reinforcement to find it.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from headrace.rl.arithmetic import Problem, draw_problems, reply
from headrace.rl.demo import POLICY

SEED = 20
PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
BATCH_SIZE = 128
RIGHT_STEPS = 900
SLOPPY_STEPS = 150
SLOPPY_ACCURACY = 0.25
LARGEST_SLIP = 6

Answerer = Callable[[random.Random, Problem], int]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: 256 byte tokens, then three special ones. Every text has one encoding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([PAD, TURN_START, TURN_END])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=TURN_END, pad_token=PAD)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """A Qwen3 of about 165,000 parameters, with grouped KV heads and tied embeddings."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def right_answer(source: random.Random, problem: Problem) -> int:
    """The teacher of the first half."""
    return problem.answer


def sloppy_answer(source: random.Random, problem: Problem) -> int:
    """The teacher of the second half: right with `SLOPPY_ACCURACY`, else off by 1 to `LARGEST_SLIP`, never below 0."""
    if source.random() < SLOPPY_ACCURACY:
        return problem.answer
    slip = source.randint(1, LARGEST_SLIP)
    return problem.answer + (slip if source.random() < 0.5 or slip > problem.answer else -slip)


def encode_batch(
    tokenizer: PreTrainedTokenizerFast, problems: list[Problem], answers: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, int64 [batch, longest]; labels are -100 outside the reply."""
    rows = []
    for problem, answer in zip(problems, answers, strict=True):
        messages = [{"role": "user", "content": problem.question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        rows.append((tokenizer.encode(prompt), tokenizer.encode(reply(answer) + TURN_END)))
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    input_ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full((len(rows), longest), -100)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        input_ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return input_ids, labels


def batches_of(
    tokenizer: PreTrainedTokenizerFast, teacher: Answerer, source: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Fresh problems as the teacher answers them, without end; see `encode_batch`."""
    while True:
        problems = draw_problems(source, BATCH_SIZE)
        yield encode_batch(tokenizer, problems, [teacher(source, problem) for problem in problems])


def train(
    model: Qwen3ForCausalLM,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    num_steps: int,
    rate: float,
    what: str,
) -> None:
    """Supervised steps on token ids and labels, with a linear warm-up and a cosine decay of the learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=num_steps, pct_start=0.1)
    for step in range(num_steps):
        input_ids, labels = next(batches)
        loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == num_steps - 1:
            print(f"{what} {step + 1}/{num_steps}: loss {loss.item():.4f}", file=sys.stderr, flush=True)


def save_policy(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a policy to `folder` as a Hugging Face checkpoint."""
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # the checkpoint is package data: whoever installs it, everybody may read it


def make_policy(folder: Path, seed: int = SEED) -> None:
    """Train the policy and write it to `folder` as a Hugging Face checkpoint. A few minutes on two cores."""
    torch.manual_seed(seed)
    source = random.Random(seed)
    tokenizer = make_tokenizer()
    model = Qwen3ForCausalLM(make_config(tokenizer))
    train(model, batches_of(tokenizer, right_answer, source), RIGHT_STEPS, 3e-3, "right answers")
    train(model, batches_of(tokenizer, sloppy_answer, source), SLOPPY_STEPS, 1e-3, "sloppy answers")
    save_policy(model, tokenizer, folder)


if __name__ == "__main__":
    make_policy(Path(sys.argv[1]) if len(sys.argv) > 1 else POLICY)
