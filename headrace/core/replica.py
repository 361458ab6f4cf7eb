"""All that one core loop owns, put together once. Holds no logic of its own: each part is the owner of its state."""

from __future__ import annotations

import secrets
from functools import partial

from headrace.config import ResolvedConfig, Takeover
from headrace.core.executor import Executor
from headrace.core.grouping import GroupControl
from headrace.core.outbox import Outbox
from headrace.core.pausing import PauseControl
from headrace.core.probing import Probes
from headrace.core.reading import ReadControl
from headrace.core.releasing import MemoryControl, MemorySettings
from headrace.core.stepping import Stepper
from headrace.core.updating import UpdateControl
from headrace.ipc import CoreLink, Pulse
from headrace.scheduler import Scheduler, SchedulerLimits
from headrace.weights.session import WeightMachine

_MAX_FIRST_NUMBER = 1 << 62
"""Of sessions and of stamps: what one core names by a number names nothing of another."""


class Replica:
    """The parts of a core. `started_at` is in the loop's clock; `is_ending` ends the loop after the current turn."""

    def __init__(
        self, resolved: ResolvedConfig, executor: Executor, link: CoreLink, pulse: Pulse, started_at: float
    ) -> None:
        settings = resolved.engine
        self.resolved = resolved
        self.executor = executor
        self.pulse = pulse
        self.started_at = started_at
        self.is_ending = False
        self.outbox = Outbox(link)
        former = resolved.takeover or Takeover(settings.initial_version, 0, is_current=True)
        self.scheduler = Scheduler(scheduler_limits(resolved), version=former.version, epoch=former.epoch)
        self.stepper = Stepper(self.scheduler, executor, self.outbox, pulse, settings.overlap_depth)
        self.probes = Probes(self.stepper, executor)
        self.pause = PauseControl(self.scheduler, self.stepper, self.outbox)
        lacks = set[str]()
        machine = WeightMachine(
            executor.weights,
            former.version,
            epoch=former.epoch,
            has_weights=former.is_current,
            num_sessions=secrets.randbelow(_MAX_FIRST_NUMBER),
        )
        self.update = UpdateControl(
            machine,
            executor,
            self.scheduler,
            self.stepper,
            self.outbox,
            partial(_stand_still, self.pause, lacks),  # which does not hold the replica, or nothing of it would end
            first_stamp=secrets.randbelow(_MAX_FIRST_NUMBER),
        )
        memory = MemorySettings(resolved.memory_is_kept, settings.keep_weights_copy)
        self.memory = MemoryControl(memory, executor, self.update, self.scheduler, self.stepper, self.outbox, lacks)
        self.reading = ReadControl(executor, self.update, self.outbox)
        self.groups = GroupControl(executor, self.outbox)

    @property
    def stands_still(self) -> bool:
        """No step may run, and no update is why."""
        return _stand_still(self.pause, self.memory.lacks)


def _stand_still(pause: PauseControl, lacks: set[str]) -> bool:
    return pause.is_paused or bool(lacks)


def scheduler_limits(resolved: ResolvedConfig) -> SchedulerLimits:
    """The scheduler's share of the settings."""
    settings = resolved.engine
    return SchedulerLimits(
        max_running_requests=settings.max_running_requests,
        max_waiting_requests=settings.max_waiting_requests,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        prefill_step_tokens=settings.prefill_step_tokens,
        max_step_cost=resolved.max_step_cost,
        attended_per_token=resolved.model.attended_per_token,
        context_length=resolved.context_length,
        page_size=settings.page_size,
        num_pages=resolved.num_pages,
        prefix_cache=settings.prefix_cache,
        overlap_depth=settings.overlap_depth,
        num_cohorts=resolved.num_cohorts,
        vocab_size=resolved.model.vocab_size,
        num_host_pages=resolved.num_host_pages,
        max_page_moves=resolved.max_page_moves,
    )
