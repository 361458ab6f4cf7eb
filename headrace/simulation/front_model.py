"""One router: its policy as it is, and a core that takes time for each request, for each replica that it compares, and
for looking at them all. Owns the load of each replica as a router counts it."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import msgspec

from headrace.cluster.health import LOOK_SECONDS
from headrace.cluster.options import RouterOptions
from headrace.cluster.policies import Candidate, ReplicaChoice, make_policy
from headrace.simulation.options import SimulationOptions
from headrace.simulation.replica_model import ReplicaModel
from headrace.simulation.rollouts import SimulatedRollout
from headrace.simulation.timeline import Timeline


class FrontCosts(msgspec.Struct, frozen=True):
    """Seconds of a router's core, as measured (docs/simulation.md): for a request and its answer; for each replica that
    a new prompt is compared with, and one whose replica is known; and for a look at a replica."""

    request: float = 160e-6
    compare: float = 1.0e-6
    offer: float = 0.37e-6
    look: float = 950e-6


LEAST_SHARE = 0.1
"""Of its core a router has so much for requests, in the model, even where looking at replicas would take it all: such a
router does not work, and the report says so."""


class FrontModel:
    """Sends each request to a replica of its own. Requests wait for its core in the order in which they come."""

    def __init__(
        self,
        options: SimulationOptions,
        timeline: Timeline,
        replicas: Sequence[ReplicaModel],
        costs: FrontCosts | None = None,
    ) -> None:
        self.costs = costs or FrontCosts()
        self.busy_seconds = 0.0
        self.longest_wait = 0.0
        self.num_prompt_tokens = 0
        self.num_expected_hits = 0
        self.replicas = {each.number: each for each in replicas}
        self._timeline = timeline
        self._policy = make_policy(options.policy, RouterOptions().max_index_blocks)
        self._load = {number: (0, 0) for number in self.replicas}
        self._candidates: dict[int, Candidate] = {}
        self._choices: dict[int, ReplicaChoice] = {}
        self._known: set[int] = set()
        self._free_at = 0.0
        self._waiting: list[SimulatedRollout] = []
        for number in self.replicas:
            self._offer(number)

    @property
    def look_share(self) -> float:
        """Of its core, what looking at every replica takes; at 1 it does nothing else."""
        return len(self.replicas) * self.costs.look / LOOK_SECONDS

    def ask(self, rollout: SimulatedRollout) -> None:
        """A request comes."""
        now, number = self._timeline.now, len(self.replicas)
        is_new = rollout.group.number not in self._known
        self._known.add(rollout.group.number)
        seconds = self.costs.request + number * (self.costs.compare if is_new else self.costs.offer)
        begin = max(now, self._free_at)
        self._free_at = begin + seconds / max(LEAST_SHARE, 1.0 - self.look_share)
        self.busy_seconds += seconds
        self.longest_wait = max(self.longest_wait, self._free_at - now)
        self._timeline.at(self._free_at, functools.partial(self._send, rollout))

    def answered(self, rollout: SimulatedRollout) -> None:
        """A request has its answer, or its replica died."""
        choice = self._choices.pop(rollout.index)
        num_requests, num_tokens = self._load[choice.number]
        self._set_load(choice.number, num_requests - 1, num_tokens - choice.num_tokens)

    def forget(self, number: int) -> None:
        """That replica holds other weights: no prefix of it matches any more."""
        self._policy.forget(number)

    def lose(self, number: int) -> None:
        """That replica is dead."""
        self._policy.forget(number)
        del self._candidates[number]

    def regain(self, number: int) -> None:
        """It is back."""
        self._offer(number)
        waiting, self._waiting = self._waiting, []
        for rollout in waiting:
            self._send(rollout)

    def _offer(self, number: int) -> None:
        self._candidates[number] = Candidate(number, *self._load[number])

    def _set_load(self, number: int, num_requests: int, num_tokens: int) -> None:
        self._load[number] = num_requests, num_tokens
        if number in self._candidates:
            self._offer(number)

    def _send(self, rollout: SimulatedRollout) -> None:
        if not self._candidates:
            self._waiting.append(rollout)
            return
        ask = rollout.ask
        choice = self._policy.choose(ask, list(self._candidates.values()))
        self.num_prompt_tokens += ask.num_prompt_tokens
        self.num_expected_hits += choice.num_cached_tokens
        self._choices[rollout.index] = choice
        num_requests, num_tokens = self._load[choice.number]
        self._set_load(choice.number, num_requests + 1, num_tokens + choice.num_tokens)
        rollout.num_attempts += 1
        self.replicas[choice.number].add(rollout)
