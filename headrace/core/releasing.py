"""Giving memory back by tag, and taking it again. Owns which tags are released, and what generation lacks for it.

    HELD ---release--> LEAVING ---it is free---> RELEASED ---resume--> COMING ---it is there---> HELD

Generation needs the weights and the KV cache, in whatever order they come back, and weights that hold values: those of
a copy or of the start's folder, or of a complete update that lands later. Until then no step runs, and requests wait as
behind a pause. Those in flight are answered at a release, or kept and computed again.

Without its graphs (`cuda_graph`) generation goes on: steps run uncaptured. Graphs are captured again, over memory that
is there, by the resume with which the last of the released tags comes back.

Releases and resumes are done one after the other, in slices where they move bytes. One that fails, is given up or comes
to its deadline leaves memory as it was before.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator

import msgspec

from headrace.core.executor import Executor
from headrace.core.faults import FAULTS, failure
from headrace.core.outbox import Outbox
from headrace.core.stepping import Stepper
from headrace.core.updating import UpdateControl
from headrace.scheduler import Scheduler
from headrace.types.errors import ConfigError, DeadlineError, HeadraceError, UpdateConflictError
from headrace.types.memory import MEMORY_TAGS, MemoryTag, OnRelease, Restore
from headrace.types.messages import ReleaseMemory, ResumeMemory

NEEDED: frozenset[MemoryTag] = frozenset(("weights", "kv_cache"))
"""What generation needs."""

GRAPHS: MemoryTag = "cuda_graph"

_VALUES = "values of the weights"


class MemorySettings(msgspec.Struct, frozen=True):
    """`is_kept`: why memory cannot be given back, "" where it can. `keeps_copy`: the host keeps released weights."""

    is_kept: str
    keeps_copy: bool


class _Job(msgspec.Struct):
    """A command, and what is left to do of it: None before it was begun."""

    command: ReleaseMemory | ResumeMemory
    work: Generator[None] | None = None


class MemoryControl:
    """The memory of one replica. `lacks` is not empty while no step may run for want of it; `jobs` wait or go on."""

    def __init__(
        self,
        settings: MemorySettings,
        executor: Executor,
        update: UpdateControl,
        scheduler: Scheduler,
        stepper: Stepper,
        outbox: Outbox,
        lacks: set[str],
    ) -> None:
        """`lacks` is empty at first."""
        self.released: set[MemoryTag] = set()
        self.lacks = lacks
        self._settings = settings
        self._executor = executor
        self._update = update
        self._scheduler = scheduler
        self._stepper = stepper
        self._outbox = outbox
        self.jobs: deque[_Job] = deque()
        self._first_epoch = update.machine.epoch
        self._has_copy = False
        self._was_of_start = False
        self._has_graphs = True

    @property
    def is_wanted(self) -> bool:
        """No step runs before a call, none of which has come, brings memory or weights."""
        return bool(self.lacks) and not self.jobs

    @property
    def deadline(self) -> float | None:
        """When the first of the calls fails; None while there is none."""
        return min((job.command.deadline for job in self.jobs), default=None)

    def add(self, command: ReleaseMemory | ResumeMemory) -> None:
        """Release or resume; answered when the memory is free, or there."""
        self.jobs.append(_Job(command))
        if len(self.jobs) == 1:
            self.advance(0.0)

    def advance(self, budget_s: float) -> bool:
        """Work for about `budget_s` seconds, or notice that an update has brought weights. True when something was
        done."""
        if not self.jobs:
            return self._notice_values()
        job = self.jobs[0]
        try:
            is_done = self._advance(job, time.perf_counter() + budget_s)
        except HeadraceError as error:
            self._drop(job, error)
        except FAULTS as fault:
            self._executor.examine(fault)
            self._drop(job, failure(type(job.command).__name__, fault))
        else:
            if is_done:
                self.jobs.popleft()
                self._outbox.reply(job.command.call_id)
        return True

    def expire(self, now: float) -> None:
        """Undo what was not done by its deadline."""
        for job in [job for job in self.jobs if now >= job.command.deadline]:
            self._drop(job, DeadlineError("memory was not released or resumed by the deadline; it is as before"))

    def give_up(self, call_id: int, error: HeadraceError) -> None:
        """Leave nothing of this call, if it waits or goes on."""
        for job in [job for job in self.jobs if job.command.call_id == call_id]:
            self._drop(job, error)

    def end(self, error: HeadraceError) -> None:
        """Answer every call with `error`."""
        for job in list(self.jobs):
            self._drop(job, error)

    # Inside.

    def _advance(self, job: _Job, stop_at: float) -> bool:
        if job.work is None:
            command = job.command
            job.work = self._release(command) if isinstance(command, ReleaseMemory) else self._resume(command)
        while True:
            try:
                next(job.work)
            except StopIteration:
                return True
            if time.perf_counter() >= stop_at:
                return False

    def _drop(self, job: _Job, error: HeadraceError) -> None:
        self.jobs.remove(job)
        if job.work is not None:
            job.work.close()
        self._outbox.refuse(job.command.call_id, error.info())

    def _notice_values(self) -> bool:
        if _VALUES not in self.lacks or self._update.machine.refusal() is not None:
            return False
        self.lacks.discard(_VALUES)
        return True

    def _release(self, command: ReleaseMemory) -> Generator[None]:
        """A release from its checks to its end."""
        tags = set(command.tags or MEMORY_TAGS) - self.released
        if tags & NEEDED and self._settings.is_kept:
            raise ConfigError(self._settings.is_kept, field="memory_saver")
        if tags and "weights" not in self.released:
            self._update.check_idle()
        if tags:
            yield from self._give_back(tags, command.in_flight)
        self.released |= tags

    def _give_back(self, tags: set[MemoryTag], in_flight: OnRelease) -> Generator[None]:
        """Closed before its end, it has changed nothing but what requests were answered."""
        machine, has_weights = self._update.machine, "weights" in tags
        is_ready = machine.state == "ready"
        keeps_copy = has_weights and is_ready and self._settings.keeps_copy
        if tags & NEEDED:
            self._stop_requests(in_flight)
        else:
            self._stepper.settle()
        if "kv_cache" in tags:
            self._scheduler.flush_cache()  # nothing may match a page that will be empty
        if has_weights:
            machine.release()
        self.lacks |= tags
        is_free = False
        try:
            yield from self._executor.release(tags, keeps_copy=keeps_copy)
            is_free = True
        finally:
            self.lacks -= {GRAPHS} if is_free else tags
            if has_weights and not is_free:
                machine.restore(has_values=True)
        if GRAPHS in tags:
            self._has_graphs = False
        if has_weights:
            self._has_copy = keeps_copy
            self._was_of_start = is_ready and machine.epoch == self._first_epoch

    def _stop_requests(self, in_flight: OnRelease) -> None:
        """No step is in flight from here on, and nobody holds a page."""
        if in_flight == "abort":
            self._outbox.add(self._scheduler.abort(None, "Aborted by a release of memory"))
        self._stepper.settle()
        self._scheduler.recompute_running()

    def _resume(self, command: ResumeMemory) -> Generator[None]:
        """A resume from its checks to its end. Closed before that, it has changed nothing."""
        tags = set(command.tags or MEMORY_TAGS) & self.released
        taken, has_weights = tags & NEEDED, "weights" in tags
        source = self._source(command.restore) if has_weights else "await"
        if tags == self.released and not self._has_graphs:
            taken.add(GRAPHS)
        if taken:
            yield from self._take(taken, source)
        self.released -= tags
        self.lacks -= taken
        if has_weights:
            self._update.machine.restore(has_values=source != "await")
            if self._update.machine.refusal() is not None:
                self.lacks.add(_VALUES)

    def _take(self, tags: set[MemoryTag], source: Restore) -> Generator[None]:
        """No step runs meanwhile, or ranks would meet in one at different points of their captures."""
        self._stepper.settle()
        self.lacks |= tags & {GRAPHS}
        try:
            yield from self._executor.resume(tags, source)
            self._has_graphs = self._has_graphs or GRAPHS in tags
        finally:
            self.lacks.discard(GRAPHS)

    def _source(self, restore: Restore) -> Restore:
        """Where weights come from. `UpdateConflictError` if they cannot come from there."""
        if restore == "copy" and not self._has_copy:
            raise UpdateConflictError("no copy of the released weights was kept (keep_weights_copy)", field="restore")
        if restore == "disk" and not self._was_of_start:
            message = (
                "the released weights were not those that the engine's start had loaded: only an update brings them"
            )
            raise UpdateConflictError(message, field="restore")
        if restore == "auto":
            return "copy" if self._has_copy else "await"
        return restore
