"""One replica: the scheduler of an engine, a device that only takes time, and its failures. Owns what runs on it."""

from __future__ import annotations

import functools
from collections.abc import Callable

from headrace.scheduler import Scheduler, SchedulerLimits
from headrace.simulation.options import SimulationOptions
from headrace.simulation.replica_device import ReplicaDevice
from headrace.simulation.rollouts import VOCAB_SIZE, RolloutSource, SimulatedRollout
from headrace.simulation.timeline import Timeline
from headrace.types.plan import StepResult
from headrace.types.request import Delta

OnEnd = Callable[["ReplicaModel", SimulatedRollout, Delta], None]


def limits_of(options: SimulationOptions) -> SchedulerLimits:
    """What the scheduler of a replica may use, in simulated tokens.

    A step of simulated tokens stands for `grain` real ones, so its budget is that of one: it holds `grain` times as
    many real tokens.
    """
    profile, grain = options.device, options.grain
    return SchedulerLimits(
        max_running_requests=profile.max_running_requests,
        max_waiting_requests=1 << 30,
        max_num_batched_tokens=profile.max_num_batched_tokens,
        prefill_step_tokens=profile.prefill_step_tokens,
        max_step_cost=profile.max_step_cost,
        attended_per_token=max(1, profile.attended_per_token // grain),
        context_length=(options.prompt_tokens + options.max_output_tokens) // grain + 2,
        page_size=options.page_tokens // grain,
        num_pages=profile.kv_pool_tokens // options.page_tokens + 1,
        prefix_cache=True,
        overlap_depth=0,
        vocab_size=VOCAB_SIZE,
    )


class ReplicaModel:
    """Runs what it is given, step after step. `on_end` is called with each sample that ends."""

    def __init__(
        self, number: int, options: SimulationOptions, timeline: Timeline, source: RolloutSource, on_end: OnEnd
    ) -> None:
        self.number = number
        self.is_alive = True
        self.epoch = 0
        self.busy_seconds = 0.0
        self._options = options
        self._timeline = timeline
        self._source = source
        self._on_end = on_end
        self._limits = limits_of(options)
        self._running: dict[int, SimulatedRollout] = {}
        self._life = 0
        self._is_stepping = False
        self._next_epoch = 0
        self._start()

    @property
    def device(self) -> ReplicaDevice:
        return self._device

    @property
    def num_preemptions(self) -> int:
        return int(self._scheduler.metrics()["num_preemptions"])

    def add(self, rollout: SimulatedRollout) -> None:
        """Queue a sample, now."""
        handle = rollout.index
        self._running[handle] = rollout
        self._scheduler.add(self._source.request(rollout, handle), self._timeline.now)
        if not self._is_stepping:
            self._step(0.0)

    def commit(self, epoch: int) -> None:
        """New weights are there: they are live from the next step on, which begins after a pause."""
        self._next_epoch = epoch
        if not self._is_stepping:
            self._take_weights()

    def die(self) -> list[tuple[SimulatedRollout, int]]:
        """It is gone; returns what it was asked and has not answered, and how many tokens each had."""
        self.is_alive = False
        self._life += 1
        self._is_stepping = False
        deltas = self._scheduler.abort(None, "the replica died")
        lost = [(self._running.pop(delta.handle), len(delta.token_ids) // 4) for delta in deltas]
        assert not self._running, "a dead replica knows of requests that its scheduler does not"
        return lost

    def revive(self, epoch: int) -> None:
        """Another process takes its place, with these weights."""
        self.is_alive = True
        self.epoch = self._next_epoch = epoch
        self._start()

    def _start(self) -> None:
        self._scheduler = Scheduler(
            self._limits, version=str(self.epoch), epoch=self.epoch, clock=lambda: self._timeline.now
        )
        self._device = ReplicaDevice(self._options.device, self._limits, self._options.grain, self._source.ends)

    def _take_weights(self) -> float:
        """Returns the seconds of the pause."""
        if self._next_epoch == self.epoch:
            return 0.0
        self.epoch = self._next_epoch
        self._scheduler.set_weights(str(self.epoch), self.epoch)
        return self._options.device.update_pause

    def _step(self, pause: float) -> None:
        plan = self._scheduler.plan()
        self._is_stepping = plan is not None
        if plan is None:
            return
        result, seconds = self._device.execute(plan)
        self.busy_seconds += seconds
        self._timeline.after(pause + seconds, functools.partial(self._complete, self._life, result))

    def _complete(self, life: int, result: StepResult) -> None:
        if life != self._life:
            return  # it died during that step
        for delta in self._scheduler.apply(result):
            if delta.finish is not None:
                self._on_end(self, self._running.pop(delta.handle), delta)
        self._step(self._take_weights())
