"""The workloads that benchmarks run: token ids and output lengths, the same on every machine and in every engine.

    A   mixed requests: 256 random prompts of 100 to 1024 tokens, 100 to 1024 tokens out (142,827 in, 133,966 out)
    B   GRPO groups: 64 prompts of 512 tokens, each 8 times, log-normal output lengths to 2048 (349,383 out)
    C   one request: 128 tokens in, 512 out
    D   for a closed loop: 2,000 requests with A's ranges of lengths

All sample at temperature 1.0, never stop early, and need no text. On a CPU the full workloads take hours, so they are
scaled down: `num_divisor` divides the number of prompts, `length_divisor` every length; the shape of the distributions
and the group size stay. `CPU_SCALE` is what a CPU runs unless told otherwise; a GPU runs the workloads as published.
"""

from __future__ import annotations

import math
import random
from typing import Literal

import msgspec

WorkloadName = Literal["A", "B", "C"]
GROUP_SIZE = 8
CLOSED_LOOP_REQUESTS = 2000


WARM_TOKENS = 4
_NUM_WARM = 8


class Scale(msgspec.Struct, frozen=True):
    """How much smaller than the published workload: divisors of the number of prompts and of the lengths."""

    num_divisor: int = 1
    length_divisor: int = 1


FULL_SCALE = Scale()
CPU_SCALE = Scale(num_divisor=4, length_divisor=8)
QUICK_SCALE = Scale(num_divisor=16, length_divisor=8)


class ScaleChoice(msgspec.Struct, frozen=True):
    """The scale asked for: a preset (None: by the device), and divisors that win over it."""

    preset: Literal["full", "quick"] | None = None
    num_divisor: int | None = None
    length_divisor: int | None = None

    def on(self, *, is_cpu: bool) -> Scale:
        scale = {"full": FULL_SCALE, "quick": QUICK_SCALE, None: CPU_SCALE if is_cpu else FULL_SCALE}[self.preset]
        return Scale(self.num_divisor or scale.num_divisor, self.length_divisor or scale.length_divisor)


class Workload(msgspec.Struct, frozen=True):
    """Requests in submission order: prompt token ids, and how many tokens to generate for each."""

    name: WorkloadName | Literal["D"]
    prompts: list[list[int]]
    output_lengths: list[int]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        return sum(self.output_lengths)

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence, prompt included."""
        return max(len(p) + n for p, n in zip(self.prompts, self.output_lengths, strict=True))

    def strangers(self) -> list[list[int]]:
        """A few prompts of the same lengths and range of ids that share no prefix with it: for a warm-up, in which each
        brings `WARM_TOKENS`."""
        num_ids = 1 + max(map(max, self.prompts))
        return [[(token + 1) % num_ids for token in prompt] for prompt in self.prompts[:_NUM_WARM]]


def make_workload(name: WorkloadName, *, scale: Scale = FULL_SCALE, vocab_size: int | None = None) -> Workload:
    """Build workload `name`. With `vocab_size`, token ids are folded into [0, vocab_size)."""
    workload = {"A": _workload_a, "B": _workload_b, "C": _workload_c}[name](scale)
    return _folded(workload, vocab_size)


def make_closed_loop(
    num_requests: int = CLOSED_LOOP_REQUESTS, *, length_divisor: int = 1, vocab_size: int | None = None
) -> Workload:
    """Build workload D of `num_requests` requests."""
    return _folded(_mixed("D", random.Random(3000), num_requests, length_divisor), vocab_size)


def _folded(workload: Workload, vocab_size: int | None) -> Workload:
    if vocab_size is None:
        return workload
    prompts = [[token % vocab_size for token in prompt] for prompt in workload.prompts]
    return msgspec.structs.replace(workload, prompts=prompts)


def _workload_a(scale: Scale) -> Workload:
    return _mixed("A", random.Random(0), max(1, 256 // scale.num_divisor), scale.length_divisor)


def _mixed(name: Literal["A", "D"], source: random.Random, num_prompts: int, length_divisor: int) -> Workload:
    def length() -> int:
        return max(1, source.randint(100, 1024) // length_divisor)

    prompts = [[source.randint(0, 10000) for _ in range(length())] for _ in range(num_prompts)]
    return Workload(name, prompts, [length() for _ in range(num_prompts)])


def _workload_b(scale: Scale) -> Workload:
    source = random.Random(1000)
    num_groups = max(1, 64 // scale.num_divisor)
    prompt_length = max(1, 512 // scale.length_divisor)
    groups = [[source.randint(0, 100000) for _ in range(prompt_length)] for _ in range(num_groups)]
    lengths = random.Random(0)
    output_lengths = [
        max(1, min(2048, round(lengths.lognormvariate(math.log(512), 0.8))) // scale.length_divisor)
        for _ in range(num_groups * GROUP_SIZE)
    ]
    prompts = [prompt for prompt in groups for _ in range(GROUP_SIZE)]
    return Workload("B", prompts, output_lengths)


def _workload_c(scale: Scale) -> Workload:
    source = random.Random(2000)
    return Workload(
        "C", [[source.randint(0, 10000) for _ in range(128 // scale.length_divisor)]], [512 // scale.length_divisor]
    )
