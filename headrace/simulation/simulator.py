"""A whole run: batches of groups, replicas behind their fronts, a trainer, updates with a fence, failures.

Owns what happens in which order. A batch is `groups` groups; the trainer takes that many as soon as they are complete,
trains, and pushes; `staleness` says how many batches may be sent ahead of it.
"""

from __future__ import annotations

import functools
import random

from headrace.simulation.figures import OneBigCache, RunFigures, StepFigures, summarize
from headrace.simulation.front_model import FrontCosts, FrontModel
from headrace.simulation.options import SimulationOptions, check_replicas
from headrace.simulation.replica_model import ReplicaModel
from headrace.simulation.rollouts import RolloutSource, SimulatedGroup, SimulatedRollout
from headrace.simulation.timeline import Timeline
from headrace.simulation.weight_push import commit_delays, restart_seconds
from headrace.types.errors import ConfigError
from headrace.types.request import Delta

_MAX_FAILURES = 1000
"""Of each replica, on average, without a sample that ends: the run would not end either."""


class Simulation:
    """One run with so many replicas. `run` may be called once."""

    def __init__(self, num_replicas: int, options: SimulationOptions, costs: FrontCosts | None = None) -> None:
        """`costs` are those of its fronts (None: as measured). Raises `ConfigError` for what does not go together."""
        check_replicas(num_replicas, options)
        self.options = options
        self.timeline = Timeline()
        self.source = RolloutSource(options)
        self.replicas = [
            ReplicaModel(number, options, self.timeline, self.source, self._ended) for number in range(num_replicas)
        ]
        self.fronts = [
            FrontModel(options, self.timeline, self.replicas[place :: options.fronts], costs)
            for place in range(options.fronts)
        ]
        self.rollouts: list[SimulatedRollout] = []
        self.steps: list[StepFigures] = []
        self.cache = OneBigCache(options.page_tokens // options.grain)
        self.num_failures = 0
        self._num_vain_failures = 0
        self.num_lost_tokens = 0
        self.num_void_tokens = 0
        self._chance = random.Random(options.seed + 2)
        self._batch = options.num_groups(num_replicas)
        self._num_sent = 0
        self._num_complete = 0
        self._num_taken = 0
        self._epoch = 0
        self._is_training = False

    def run(self) -> RunFigures:
        """Until the last training step has its update."""
        for replica in self.replicas:
            self._plan_failure(replica)
        self._send_groups()
        self.timeline.run_until(lambda: len(self.steps) == self.options.steps)
        return summarize(self)

    def _front_of(self, number: int) -> FrontModel:
        return self.fronts[number % len(self.fronts)]

    def _send_groups(self) -> None:
        """As many groups run at once as a batch has; none further ahead of training than may be."""
        last = (len(self.steps) + 1 + self.options.staleness) * self._batch
        while self._num_sent < last and self._num_sent - self._num_complete < self._batch:
            group = self.source.next_group()
            front = self._front_of(self._num_sent)
            self._num_sent += 1
            for rollout in group.rollouts:
                rollout.sent = self.timeline.now
                self.rollouts.append(rollout)
                self._ask(front, rollout)

    def _ask(self, front: FrontModel, rollout: SimulatedRollout) -> None:
        self.cache.ask(self._epoch, rollout.group)
        front.ask(rollout)

    def _ended(self, replica: ReplicaModel, rollout: SimulatedRollout, delta: Delta) -> None:
        rollout.ended = self.timeline.now
        self._num_vain_failures = 0
        rollout.num_cached += delta.num_cached_tokens
        rollout.started, first = delta.times
        rollout.first_token = first if rollout.first_token != rollout.first_token else rollout.first_token
        self._front_of(replica.number).answered(rollout)
        group = rollout.group
        group.num_ended += 1
        if group.num_ended == len(group.rollouts):
            self._complete(group)

    def _complete(self, group: SimulatedGroup) -> None:
        self._num_complete += 1
        self._train()
        self._send_groups()

    def _train(self) -> None:
        """Take a batch that is complete, if training stands still."""
        if self._is_training or self._num_complete - self._num_taken < self._batch:
            return
        self._num_taken += self._batch
        self._is_training = True
        self.timeline.after(self.options.train_seconds, functools.partial(self._push, self.timeline.now))

    def _push(self, taken: float) -> None:
        """Send new weights to every replica that lives. Those that die meanwhile are not waited for."""
        self._epoch += 1
        begin, slowest = self.timeline.now, 0.0
        num_alive = sum(each.is_alive for each in self.replicas)
        for front in self.fronts:
            alive = [number for number, each in front.replicas.items() if each.is_alive]
            delays = commit_delays(front, alive, num_alive, self.options)
            for number, delay in zip(alive, delays, strict=True):
                self.timeline.after(delay, functools.partial(self._commit, front, number, self._epoch))
            slowest = max(slowest, max(delays, default=0.0))
        self.timeline.after(slowest, functools.partial(self._pushed, taken, begin))

    def _commit(self, front: FrontModel, number: int, epoch: int) -> None:
        replica = front.replicas[number]
        if replica.is_alive and replica.epoch < epoch:
            replica.commit(epoch)
            front.forget(number)

    def _pushed(self, taken: float, begin: float) -> None:
        """After the fence no living replica has older weights."""
        self.steps.append(StepFigures(taken, begin, self.timeline.now))
        self._is_training = False
        self._train()
        self._send_groups()

    def _plan_failure(self, replica: ReplicaModel) -> None:
        if self.options.mtbf_hours is not None:
            seconds = self._chance.expovariate(1.0 / (3600.0 * self.options.mtbf_hours))
            self.timeline.after(seconds, functools.partial(self._fail, replica))

    def _fail(self, replica: ReplicaModel) -> None:
        """A broken connection is seen at once: what the replica was asked goes to others, at the end of their line."""
        self.num_failures += 1
        self._num_vain_failures += 1
        if self._num_vain_failures > _MAX_FAILURES * len(self.replicas):
            message = f"mtbf_hours is too little: {self._num_vain_failures} failures, and no sample ended meanwhile"
            raise ConfigError(message, field="mtbf_hours")
        front = self._front_of(replica.number)
        front.lose(replica.number)
        for rollout, num_tokens in replica.die():
            front.answered(rollout)
            self.num_lost_tokens += num_tokens
            if self.options.resume:
                rollout.num_kept += num_tokens
            else:
                self.num_void_tokens += num_tokens
            self._ask(front, rollout)
        self.timeline.after(restart_seconds(self.options), functools.partial(self._revive, replica))

    def _revive(self, replica: ReplicaModel) -> None:
        replica.revive(self._epoch)
        self._front_of(replica.number).regain(replica.number)
        self._plan_failure(replica)
