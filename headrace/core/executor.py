"""Who executes plans. Owns the order of results; decides nothing and knows no requests."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from headrace.config import ResolvedConfig
from headrace.core.faults import FAULTS, DeviceLost, describe, is_of_lost_device
from headrace.types.plan import StepDisturbed, StepPlan, StepResult
from headrace.types.weights import TensorInfo
from headrace.weights.session import WeightMemory

if TYPE_CHECKING:
    from headrace.runner.device_runner import DeviceRunner
    from headrace.runner.pending import PendingStep
    from headrace.runner.runner import Runner

CheckpointSlices = Generator[None, None, tuple[list[TensorInfo], Iterator[tuple[str, Any]]]]

logger = logging.getLogger(__name__)
_WARNING_SECONDS = 10.0


class StepError(Exception):
    """A plan was not executed. Nothing is known of its rows' KV; later plans may build on it. `is_blameless`: neither
    its rows nor the device are at fault."""

    def __init__(self, step_id: int, cause: BaseException) -> None:
        super().__init__(f"step {step_id} failed: {type(cause).__name__}: {cause}")
        self.step_id = step_id
        self.is_blameless = isinstance(cause, StepDisturbed)


class Weights(WeightMemory, Protocol):
    """Live weights: what an update does with them, and reading; see `headrace.weights.store.WeightStore`."""

    def digest_in_slices(self) -> Iterator[tuple[str, str] | None]: ...

    def info(self, name: str) -> TensorInfo: ...

    def copy_in_slices(self, name: str, start: int, into: memoryview) -> Iterator[None]: ...

    def scramble(self, seed: int) -> None: ...


class Executor(Protocol):
    """Executes plans in the order given, on one device or many."""

    weights: Weights

    def submit(self, plan: StepPlan) -> None:
        """Issue a plan. Returns before it is done where the device allows.

        After a plan that failed none is executed until that failure was collected: slots and pages of the failed plan
        are not what later ones take them for.
        """
        ...

    def collect(self) -> StepResult:
        """Wait for the oldest plan not collected yet. Raises `StepError` if it was not executed."""
        ...

    def examine(self, fault: BaseException) -> None:
        """Something failed on the device, here or in `submit`, `collect` and `weights`. Raises `DeviceLost` if it was
        the last that the device did."""
        ...

    def counters(self) -> dict[str, float]:
        """Figures of its own for `CoreStatus.metrics`."""
        ...

    def checkpoint(self, folder: Path, root: Path | None) -> CheckpointSlices:
        """What a checkpoint folder holds, and its tensors, read as they are asked for: told at the end, after resting
        now and then. Nothing outside `root` is read, if there is one. Both raise `CheckpointError`."""
        ...

    def close(self) -> None:
        """Free the device."""
        ...


class LocalExecutor:
    """Executes plans in this process, on the device of its runner."""

    def __init__(self, runner: Runner | DeviceRunner) -> None:
        self._runner = runner
        self._pending: deque[PendingStep | StepError] = deque()
        self._next_warning = 0.0
        self.weights: Weights = runner.weights

    @property
    def resolved(self) -> ResolvedConfig:
        """The settings with what could only be measured filled in."""
        return self._runner.resolved

    def submit(self, plan: StepPlan) -> None:
        if any(isinstance(step, StepError) for step in self._pending):
            self._pending.append(StepError(plan.step_id, RuntimeError("a step before it failed")))
            return
        try:
            self._pending.append(self._runner.launch(plan))
        except FAULTS as fault:
            self._pending.append(self._failed(plan.step_id, fault))

    def collect(self) -> StepResult:
        step = self._pending.popleft()
        if isinstance(step, StepError):
            raise step
        try:
            return step.wait()
        except FAULTS as fault:
            raise self._failed(step.step_id, fault) from fault

    def examine(self, fault: BaseException) -> None:
        if is_of_lost_device(fault):
            raise DeviceLost(describe(fault)) from fault
        try:
            self._runner.probe()
        except FAULTS as second:
            raise DeviceLost(f"{describe(fault)}; and after it {describe(second)}") from second

    def counters(self) -> dict[str, float]:
        return self._runner.counters()

    def checkpoint(self, folder: Path, root: Path | None) -> CheckpointSlices:
        from headrace.weights.checkpoint import Checkpoint

        checkpoint = Checkpoint(folder, root=root)
        manifest = yield from checkpoint.manifest_in_slices()
        return manifest, checkpoint.tensors()

    def close(self) -> None:
        self._pending.clear()
        self._runner.close()

    def _failed(self, step_id: int, fault: BaseException) -> StepError:
        if isinstance(fault, StepDisturbed):
            self._warn_of_disturbance(step_id, fault)
            return StepError(step_id, fault)
        self.examine(fault)
        logger.error("step %d failed", step_id, exc_info=fault)
        return StepError(step_id, fault)

    def _warn_of_disturbance(self, step_id: int, fault: StepDisturbed) -> None:
        """Once in a while: what disturbs one step often goes on."""
        if time.monotonic() >= self._next_warning:
            self._next_warning = time.monotonic() + _WARNING_SECONDS
            logger.warning("step %d is computed again: %s", step_id, fault)
