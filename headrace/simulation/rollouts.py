"""The requests of a GRPO run: groups of samples of one prompt, with log-normal lengths. Owns how they are drawn."""

from __future__ import annotations

import math
import random

import msgspec
import numpy as np

from headrace.cluster.policies import Ask
from headrace.cluster.prompts import EXPECTED_NEW_TOKENS, read_ask
from headrace.simulation.options import SimulationOptions
from headrace.types.request import Request, pack_ids

VOCAB_SIZE = 1 << 20
"""Ids from 1 on are drawn; 0 ends a sequence."""


class SimulatedRollout:
    """One sample, and what has become of it; `ask` is what a router reads of its body. Times are simulated seconds;
    NaN: not yet."""

    def __init__(self, index: int, group: SimulatedGroup, num_output: int, ask: Ask) -> None:
        self.index = index
        self.group = group
        self.ask = ask
        self.num_output = num_output  # simulated tokens, like all numbers of tokens here
        self.num_kept = 0  # of these, what a failure left
        self.num_cached = 0
        self.num_attempts = 0
        self.sent = math.nan
        self.started = math.nan
        self.first_token = math.nan
        self.ended = math.nan

    @property
    def num_prompt(self) -> int:
        return len(self.group.prompt) // 4


class SimulatedGroup:
    """Samples of one prompt: its simulated ids, int32 bytes."""

    def __init__(self, number: int, prompt: bytes) -> None:
        self.number = number
        self.prompt = prompt
        self.rollouts: list[SimulatedRollout] = []
        self.num_ended = 0


class RolloutSource:
    """Draws groups, one after the other. `ends` has the length of each sample, prompt included, by its index."""

    def __init__(self, options: SimulationOptions) -> None:
        self.ends: list[int] = []
        self._options = options
        self._lengths = random.Random(options.seed)
        self._ids = np.random.default_rng(options.seed + 1)
        self._shared = self._draw(options.shared_tokens)
        self._num_groups = 0

    def next_group(self) -> SimulatedGroup:
        """The next prompt with its samples."""
        options = self._options
        ids = np.concatenate([self._shared, self._draw(options.prompt_tokens - options.shared_tokens)])
        sampling = {"max_new_tokens": options.max_output_tokens}
        body = msgspec.json.encode({"input_ids": ids.tolist(), "sampling_params": sampling})
        group, ask = SimulatedGroup(self._num_groups, pack_ids(ids[:: options.grain])), read_ask(body)
        self._num_groups += 1
        for _ in range(options.group_size):
            num_output = self._length()
            if options.known_ends:  # `max_new_tokens` is its own
                ask = msgspec.structs.replace(ask, num_new_tokens=min(num_output * options.grain, EXPECTED_NEW_TOKENS))
            rollout = SimulatedRollout(len(self.ends), group, num_output, ask)
            self.ends.append(rollout.num_prompt + rollout.num_output)
            group.rollouts.append(rollout)
        return group

    def request(self, rollout: SimulatedRollout, handle: int) -> Request:
        """What a replica's scheduler gets. What a failure left of the output follows the prompt."""
        options = self._options
        most = max(1, options.max_output_tokens // options.grain)
        is_known = options.known_ends
        return Request(
            handle=handle,
            request_id=str(handle),
            prompt=rollout.group.prompt + pack_ids([1] * rollout.num_kept),
            max_new_tokens=(rollout.num_output if is_known else most) - rollout.num_kept,
            seed=rollout.index,
            stop_token_ids=() if is_known else (0,),
            num_output_ids_in_prompt=rollout.num_kept,
        )

    def _draw(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return self._ids.integers(1, VOCAB_SIZE, count)

    def _length(self) -> int:
        """In simulated tokens, at least one."""
        options = self._options
        drawn = self._lengths.lognormvariate(math.log(options.median_output_tokens), options.output_sigma)
        most = max(1, options.max_output_tokens // options.grain)
        return min(most, max(1, round(drawn / options.grain)))
