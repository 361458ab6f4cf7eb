"""Who executes plans. Owns the order of results; decides nothing and knows no requests. What goes wrong is of the three
kinds of `headrace.core.faults`."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Collection, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from headrace.config import ResolvedConfig
from headrace.core.faults import FAULTS, DeviceLost, StepError, describe, is_of_lost_device
from headrace.types.errors import HeadraceError
from headrace.types.foreign import Payload
from headrace.types.memory import MemoryTag, Restore
from headrace.types.messages import JoinGroup
from headrace.types.plan import PlanRefused, SamplePatch, StepDisturbed, StepPlan, StepResult
from headrace.types.weights import TensorInfo
from headrace.weights.memory import SharedTensors, WeightMemory

if TYPE_CHECKING:
    from headrace.core.rank_executor import RankRunner
    from headrace.runner.device_runner import DeviceRunner
    from headrace.runner.pending import PendingStep
    from headrace.runner.runner import Runner

CheckpointSlices = Generator[None, None, tuple[list[TensorInfo], Iterator[tuple[str, Any]]]]

logger = logging.getLogger(__name__)
_WARNING_SECONDS = 10.0


class Weights(WeightMemory, Protocol):
    """Live weights: what an update does with them, and reading; see `headrace.weights.store.WeightStore`."""

    def open_payload(self, payload: Payload) -> SharedTensors: ...

    def let_go(self, budget_s: float) -> bool: ...

    def digest_in_slices(self, rank: int | None = None) -> Iterator[tuple[str, str] | None]: ...

    def parameters(self) -> tuple[tuple[TensorInfo, ...], ...]: ...

    def info(self, name: str, rank: int | None = None) -> TensorInfo: ...

    def copy_in_slices(self, name: str, start: int, into: memoryview, rank: int | None = None) -> Iterator[None]: ...

    def scramble(self, seed: int) -> None: ...


class ArrivingTensors(Protocol):
    """What one call receives over a group, as it comes; see `headrace.weights.group.GroupArrivals`."""

    @property
    def is_complete(self) -> bool: ...

    def take(self, most: int) -> list[tuple[int, Any]]: ...

    def free(self) -> None: ...

    def drop(self) -> None: ...


class WeightGroup(Protocol):
    """A trainer's group that this replica is part of; see `headrace.weights.group.TorchGroup`."""

    @property
    def is_joined(self) -> bool: ...

    @property
    def problem(self) -> HeadraceError | None: ...

    @property
    def counted(self) -> str: ...

    def refusal(self) -> HeadraceError | None: ...

    def receive(
        self, tensors: Sequence[TensorInfo], packing: int, seconds: float, skipped: Collection[int] = ()
    ) -> ArrivingTensors: ...

    def fail(self, reason: str) -> None: ...


class Executor(Protocol):
    """Executes plans in the order given, on one device or many."""

    weights: Weights

    def submit(self, plan: StepPlan) -> None:
        """Issue a plan: its forward, and its sampling unless that waits. Returns before it is done where the device
        allows, and raises nothing but `DeviceLost`: what else goes wrong, `collect` tells.

        After a plan that failed none is executed until that failure was collected: slots and pages of the failed plan
        are not what later ones take them for.
        """

    def sample(self, step_id: int, patch: SamplePatch | None = None) -> None:
        """Issue the sampling of the plan submitted last, which waits for it, with what was decided meanwhile. A plan
        that is submitted or collected before that fails, as does the one that waits."""

    def collect(self) -> StepResult:
        """Wait for the oldest plan not collected yet. Raises `StepError` if it was not executed."""

    def examine(self, fault: BaseException) -> None:
        """Something failed on the device, here or in `submit`, `collect` and `weights`. Raises `DeviceLost` if it was
        the last that the device did."""

    def counters(self) -> dict[str, float]:
        """Figures of its own for `CoreStatus.metrics`."""

    def checkpoint(self, folder: Path, root: Path | None) -> CheckpointSlices:
        """What a checkpoint folder holds, and its tensors, read as they are asked for: told at the end, after resting
        now and then. Nothing outside `root` is read, if there is one. Both raise `CheckpointError`."""

    def release(self, tags: Collection[MemoryTag], *, keeps_copy: bool) -> Generator[None]:
        """Give the memory of these tags back to the system, which has it at the end; told after resting now and then.
        No plan is in flight; without graphs later ones are executed all the same. The host keeps a copy of the weights
        if `keeps_copy`. Closed before its end, or failed, it has released nothing."""

    def resume(self, tags: Collection[MemoryTag], restore: Restore) -> Generator[None]:
        """Take the memory of these tags again, as zeros at the addresses it had; weights from where `restore` says,
        which is not "auto". Graphs are captured again, which runs nothing: all other memory is there, or comes with
        them, and no plan is in flight or comes meanwhile. Closed before its end, or failed, it has taken nothing, and a
        copy is still there. Raises `UnavailableError` where there is no room, `CheckpointError` where the folder has
        changed."""

    def attend(self) -> float:
        """To be called while there is nothing to do, again after so many seconds at most. Raises `DeviceLost` if it is,
        which nobody would notice."""

    def join_group(self, terms: JoinGroup, seconds: float) -> WeightGroup:
        """Begin to join a trainer's group; the ranks of a replica follow each other from `terms.rank` on. Raises what
        is wrong with the terms. Whoever joins it makes it `fail` in the end."""

    def close(self) -> None:
        """Free the device."""


class LocalExecutor:
    """Executes plans in this process, on the device of its runner."""

    def __init__(self, runner: Runner | DeviceRunner | RankRunner) -> None:
        self._runner = runner
        self._pending: deque[PendingStep | StepError] = deque()
        self._num_failed = 0  # of those
        self._waiting: PendingStep | None = None  # to be sampled
        self._next_warning = 0.0
        self.weights: Weights = runner.weights

    @property
    def resolved(self) -> ResolvedConfig:
        """The settings with what could only be measured filled in."""
        return self._runner.resolved

    def submit(self, plan: StepPlan) -> None:
        if self._waiting is not None:
            self._give_up_waiting()
        if self._num_failed:
            self._fail(StepError(plan.step_id, RuntimeError("a step before it failed")))
            return
        try:
            step = self._runner.launch(plan)
        except FAULTS as fault:
            self._fail(self._failed(plan.step_id, fault))
            return
        self._pending.append(step)
        if plan.waits_to_sample:
            self._waiting = step

    def sample(self, step_id: int, patch: SamplePatch | None = None) -> None:
        step, self._waiting = self._waiting, None
        if step is None:
            return  # it has failed
        assert step.step_id == step_id, f"step {step.step_id} waits to be sampled, not {step_id}"
        try:
            step.sample(patch)
        except FAULTS as fault:
            self._pending.pop()
            self._fail(self._failed(step_id, fault))

    def collect(self) -> StepResult:
        if self._waiting is not None and len(self._pending) == 1:
            self._give_up_waiting()
        step = self._pending.popleft()
        if isinstance(step, StepError):
            self._num_failed -= 1
            raise step
        try:
            return step.wait()
        except FAULTS as fault:
            raise self._failed(step.step_id, fault) from fault

    def _fail(self, error: StepError) -> None:
        self._pending.append(error)
        self._num_failed += 1

    def _give_up_waiting(self) -> None:
        """Nobody will say what the step may sample: what it samples without that is nobody's."""
        assert self._waiting is not None
        step_id = self._waiting.step_id
        self.sample(step_id)
        step = self._pending.pop()
        if isinstance(step, StepError):
            self._num_failed -= 1
        else:
            step.wait()
        self._fail(StepError(step_id, PlanRefused("it was to be sampled before anything else")))

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

    def release(self, tags: Collection[MemoryTag], *, keeps_copy: bool) -> Generator[None]:
        return self._runner.memory.release(tags, keeps_copy=keeps_copy)

    def keep_copy(self) -> Generator[None]:
        """Copy the weights to host memory, as a release would that keeps a copy."""
        return self._runner.memory.keep_copy()

    def drop_copy(self) -> None:
        """Forget that copy."""
        self._runner.memory.drop_copy()

    def resume(self, tags: Collection[MemoryTag], restore: Restore) -> Generator[None]:
        return self._runner.memory.resume(tags, restore)

    def attend(self) -> float:
        return math.inf

    def join_group(self, terms: JoinGroup, seconds: float) -> WeightGroup:
        from headrace.weights import group

        return group.TorchGroup(terms, self._runner.weights.device, seconds)

    def close(self) -> None:
        self._pending.clear()
        self._runner.close()

    def _failed(self, step_id: int, fault: BaseException) -> StepError:
        if isinstance(fault, StepDisturbed):
            self._warn_of_disturbance(step_id, fault)
            return StepError(step_id, fault)
        if not isinstance(fault, PlanRefused):
            self.examine(fault)
        logger.error("step %d failed", step_id, exc_info=fault)
        return StepError(step_id, fault)

    def _warn_of_disturbance(self, step_id: int, fault: StepDisturbed) -> None:
        """Once in a while: what disturbs one step often goes on."""
        if time.monotonic() >= self._next_warning:
            self._next_warning = time.monotonic() + _WARNING_SECONDS
            logger.warning("step %d is computed again: %s", step_id, fault)
