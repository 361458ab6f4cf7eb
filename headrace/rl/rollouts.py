"""Samples the demo's engine drew: how they are asked for, scored and written down. Knows no trainer."""

from __future__ import annotations

import random
import time

import msgspec

from headrace.engine import Engine
from headrace.rl.arithmetic import Problem, draw_problems, reward
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
    seed: int


class Batch(msgspec.Struct, frozen=True):
    """What one step sampled: the rollouts of each problem, how many were asked for, and how long it took."""

    groups: list[list[Rollout]]
    num_requests: int
    seconds: float

    @property
    def rollouts(self) -> list[Rollout]:
        return [rollout for group in self.groups for rollout in group]

    @property
    def mean_reward(self) -> float:
        rewards = [rollout.reward for rollout in self.rollouts]
        return sum(rewards) / max(1, len(rewards))

    @property
    def num_tokens(self) -> int:
        return sum(len(rollout.ids) for rollout in self.rollouts)


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
