"""A step enqueued on a device. Owns waiting for it, and the device's account of busy and idle time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from headrace.runner.host_pages import PageCopies
from headrace.runner.pending import join_extras, step_result
from headrace.runner.step_buffer import HostStep
from headrace.sampling.device_sampler import PendingExtras, PendingScores
from headrace.types.plan import PromptLogprobs, SamplePatch, StepResult

if TYPE_CHECKING:
    from headrace.runner.step_runner import StepRunner


@dataclass
class DeviceClock:
    """Seconds that steps took on the device, and seconds between a step's end and the next one's begin while the next
    had been enqueued before the end."""

    busy_s: float = 0.0
    idle_s: float = 0.0
    _last: torch.cuda.Event | None = None

    def mark(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> StepMarks:
        """A step was enqueued between these events."""
        marks = StepMarks(begin, end, self._last)
        self._last = end
        return marks

    def add(self, marks: StepMarks) -> None:
        """Account for a step that has ended."""
        if self._last is marks.end:
            self._last = None
        self.busy_s += marks.begin.elapsed_time(marks.end) * 1e-3
        if marks.follows is not None:
            self.idle_s += marks.follows.elapsed_time(marks.begin) * 1e-3


@dataclass(frozen=True)
class StepMarks:
    """Device events around a step, and the end of the step before if that had not been collected yet."""

    begin: torch.cuda.Event
    end: torch.cuda.Event
    follows: torch.cuda.Event | None


@dataclass
class ScoredPrompt:
    """Prompt positions of one row on their way: from `first` on, in parts."""

    row: int
    first: int
    parts: list[PendingScores]

    def finish(self) -> PromptLogprobs:
        """What arrived."""
        done = [part.finish() for part in self.parts]
        extras = join_extras([extra for _, extra in done if extra is not None])
        return PromptLogprobs(self.first, np.concatenate([values for values, _ in done]), extras)


@dataclass
class DeviceStep:
    """A plan whose work is enqueued by `runner`; `sampled_rows` of the plan sample, padded to `num_padded`; `moved` is
    the copies beside it. Without `marks` it ran already."""

    step_id: int
    host: HostStep
    runner: StepRunner
    sampled_rows: npt.NDArray[np.int64]
    num_padded: int = 0
    begin: torch.cuda.Event | None = None
    marks: StepMarks | None = None
    extras: PendingExtras | None = None
    prompts: list[ScoredPrompt] = field(default_factory=list)
    moved: PageCopies | None = None

    @property
    def is_done(self) -> bool:
        """As `LocalStep.is_done`."""
        return self.marks is None or bool(self.marks.end.query())  # type: ignore[no-untyped-call]

    def sample(self, patch: SamplePatch | None) -> None:
        """As `PendingStep.sample`."""
        self.runner.sample(self, patch)

    def wait(self) -> StepResult:
        """As `PendingStep.wait`; its host copy is free afterwards."""
        if self.marks is not None:
            self.marks.end.synchronize()
            self.runner.clock.add(self.marks)
        if self.moved is not None:
            self.moved.wait()
        num_rows = len(self.sampled_rows)
        token_ids, logprobs = self.host.token_ids[:num_rows].copy(), self.host.logprobs[:num_rows].copy()
        self.host.is_free = True
        extras = {} if self.extras is None else self.extras.finish()
        return step_result(
            self.step_id,
            token_ids,
            logprobs,
            {int(self.sampled_rows[index]): extra for index, extra in extras.items()},
            {prompt.row: prompt.finish() for prompt in self.prompts},
        )
