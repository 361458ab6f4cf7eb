"""GRPO in sixty lines: `python examples/grpo.py [STEPS]`. A small policy learns to add two numbers on a CPU.

The trainer is plain PyTorch; the engine, a process of its own, samples with the trainer's newest weights. The ratio is
against the log-probabilities that the engine reports: those of the very distribution that the tokens were drawn from.
"""

import random
import sys

import torch
from transformers import Qwen3ForCausalLM

from headrace import Engine
from headrace.rl import push_weights
from headrace.rl.arithmetic import draw_problems, read_reply
from headrace.rl.demo import POLICY

GROUPS, GROUP_SIZE, CLIP = 16, 16, 0.2

source = random.Random(0)
model = Qwen3ForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)


def reply_logprobs(rows: list[list[int]], prompt_lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's log-probability of each token but the first, and which of them are a reply's. Rows are padded."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    places = torch.arange(1, ids.shape[1])
    pairs = zip(rows, prompt_lengths, strict=True)
    mask = torch.stack([(places >= start) & (places < len(row)) for row, start in pairs])
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0], mask


with Engine(POLICY, num_threads=1, context_length=256, seed=0) as engine:
    for step in range(1, int(sys.argv[1]) + 1 if len(sys.argv) > 1 else 31):
        push_weights(engine, model, version=step)  # between two steps of the engine, checked whole
        problems = draw_problems(source, GROUPS)
        chats = [[{"role": "user", "content": problem.question}] for problem in problems]
        replies = engine.chat(chats, {"n": GROUP_SIZE, "max_new_tokens": 24})
        samples = [reply.sample for reply in replies]
        assert all(sample.version_spans == [(str(step), len(sample.token_ids))] for sample in samples)

        rewards = torch.tensor([float(read_reply(s.text) == problems[s.prompt_index].answer) for s in samples])
        groups = rewards.view(GROUPS, GROUP_SIZE)
        advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)

        starts = [len(reply.prompt_token_ids) for reply in replies]
        new, mask = reply_logprobs([r.prompt_token_ids + r.sample.token_ids for r in replies], starts)
        old = torch.zeros_like(new).masked_scatter(mask, torch.tensor([x for s in samples for x in s.logprobs]))
        ratio, gain = ((new - old) * mask).exp(), advantages.view(-1, 1)
        objective = torch.minimum(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain)
        optimizer.zero_grad()
        (-(objective * mask).sum() / mask.sum()).backward()
        optimizer.step()
        gap = ((new - old) * mask).abs().max().item()
        print(f"step {step}: reward {rewards.mean():.3f}, trainer and engine differ by {gap:.1e} at most", flush=True)
