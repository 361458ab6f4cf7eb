"""Samples the demos' engine drew: how they are asked for, scored and written down. Knows no trainer.

Without tools a step is one call of the engine; with them, one run of a loop of conversations.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Protocol

import msgspec

from headrace.engine import Engine
from headrace.rl.arithmetic import Problem, draw_problems, reward
from headrace.rl.conversations import Conversation, RolloutLimits, new_group
from headrace.rl.products import calculator, draw_products, product_reward
from headrace.rl.rollout import RolloutLoop
from headrace.types.generation import FinishReason, Generation
from headrace.types.sampling_params import SamplingParams


class Rollout(msgspec.Struct, frozen=True):
    """One sample, as a line of `rollouts.jsonl`.

    step, group, index  the training step from 1, the problem within it, the sample of the problem
    prompt, prompt_ids  the rendered chat prompt and its token ids
    text, ids           the reply, and its token ids with the stop token
    logprobs            natural log of the probability of each of `ids`, at temperature 1
    spans               [[weight version, number of tokens], ...], summing to len(ids)
    answer, reward      the right number, and 1.0 if the reply gives it, else 0.0
    seed                the seed the engine drew this sample with
    """

    step: int
    group: int
    index: int
    prompt: str
    prompt_ids: list[int]
    text: str
    ids: list[int]
    logprobs: list[float]
    spans: list[tuple[str, int]]
    answer: int
    reward: float
    finish_reason: FinishReason
    seed: int | None

    @property
    def loss_mask(self) -> list[int]:
        return [1] * len(self.ids)


class Scored(Protocol):
    """What a step learns from: a `Rollout` or a `Conversation`, both of which are lines of `rollouts.jsonl`."""

    @property
    def prompt_ids(self) -> list[int]: ...

    @property
    def ids(self) -> list[int]: ...

    @property
    def logprobs(self) -> list[float]: ...

    @property
    def loss_mask(self) -> list[int]: ...

    @property
    def reward(self) -> float | None: ...


class Batch(msgspec.Struct, frozen=True):
    """What one step sampled: the rollouts of each problem, how many were asked for, and how long it took."""

    groups: Sequence[Sequence[Scored]]
    num_requests: int
    seconds: float

    @property
    def rollouts(self) -> list[Scored]:
        return [rollout for group in self.groups for rollout in group]

    @property
    def mean_reward(self) -> float:
        rewards = [rollout.reward or 0.0 for rollout in self.rollouts]
        return sum(rewards) / max(1, len(rewards))

    @property
    def num_tokens(self) -> int:
        return sum(sum(rollout.loss_mask) for rollout in self.rollouts)


class StepSampler(Protocol):
    def sample(self, step: int) -> Batch: ...


class ToolSampler:
    """Draws products and runs conversations about them, with a calculator; the same seed asks for the same samples."""

    def __init__(self, engine: Engine, *, num_groups: int, group_size: int, max_new_tokens: int, seed: int) -> None:
        self._loop = RolloutLoop(
            engine,
            [calculator],
            sampling_params=SamplingParams(max_new_tokens=max_new_tokens),
            limits=RolloutLimits(max_turns=3, concurrency=num_groups * group_size),
            reward=_reward_of,
            logprob_mode="temperature",
        )
        self._num_groups = num_groups
        self._group_size = group_size
        self._source = random.Random(seed)

    def sample(self, step: int) -> Batch:
        groups = [
            new_group(
                [{"role": "user", "content": product.question}],
                self._group_size,
                group=f"{step}-{number}",
                seed=self._source.getrandbits(64),
                data={"answer": product.answer},
            )
            for number, product in enumerate(draw_products(self._source, self._num_groups))
        ]
        started = time.perf_counter()
        asyncio.run(self._loop.run(each for group in groups for each in group))
        seconds = time.perf_counter() - started
        over = [[each for each in group if each.status in ("done", "turns", "length")] for group in groups]
        return Batch(over, self._num_groups * self._group_size, seconds)


def _reward_of(conversation: Conversation) -> float:
    return product_reward(conversation.data["answer"], conversation.reply) if conversation.status == "done" else 0.0


class RolloutSampler:
    """Draws problems and asks the engine for replies to them; the same seed asks for the same samples."""

    def __init__(self, engine: Engine, *, num_groups: int, group_size: int, max_new_tokens: int, seed: int) -> None:
        assert engine.tokenizer is not None, "the demo's engine is started with a tokenizer"
        self._engine = engine
        self._tokenizer = engine.tokenizer
        self._num_groups = num_groups
        self._group_size = group_size
        self._max_new_tokens = max_new_tokens
        self._source = random.Random(seed)

    def sample(self, step: int) -> Batch:
        problems = draw_problems(self._source, self._num_groups)
        prompts = [self._tokenizer.apply_chat_template([{"role": "user", "content": p.question}]) for p in problems]
        params = [
            SamplingParams(n=self._group_size, max_new_tokens=self._max_new_tokens, seed=self._source.getrandbits(64))
            for _ in problems
        ]
        started = time.perf_counter()
        generations = self._engine.generate(input_ids=prompts, sampling_params=params, logprob_mode="temperature")
        seconds = time.perf_counter() - started
        groups: list[list[Rollout]] = [[] for _ in problems]
        for generation in generations:
            group = generation.prompt_index
            if generation.finish_reason in ("stop", "length"):
                groups[group].append(self._rollout(step, problems[group], prompts[group], generation))
        return Batch(groups, self._num_groups * self._group_size, seconds)

    def _rollout(self, step: int, problem: Problem, prompt_ids: list[int], generation: Generation) -> Rollout:
        assert generation.finish_reason is not None
        return Rollout(
            step=step,
            group=generation.prompt_index,
            index=generation.index,
            prompt=self._tokenizer.decode(prompt_ids, skip_special_tokens=False, spaces_between_special_tokens=False),
            prompt_ids=prompt_ids,
            text=generation.text,
            ids=generation.token_ids,
            logprobs=generation.logprobs,
            spans=generation.version_spans,
            answer=problem.answer,
            reward=reward(problem, generation.text),
            finish_reason=generation.finish_reason,
            seed=generation.seed,
        )
