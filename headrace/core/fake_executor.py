"""An executor that computes nothing: what is left of a step is the engine's own cost. For benchmarks and tests.

Its tokens and log-probabilities are pure functions of the position, in the exact form of real ones. Knows no torch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from headrace.core.executor import CheckpointSlices, WeightGroup, Weights
from headrace.core.faults import DeviceLost, describe, is_of_lost_device
from headrace.ipc import SharedBuffer
from headrace.types.errors import CheckpointError, NotFoundError, WeightUpdateError
from headrace.types.foreign import Payload
from headrace.types.memory import MemoryTag, Restore
from headrace.types.messages import JoinGroup
from headrace.types.plan import PositionLogprobs, PromptLogprobs, SamplePatch, SlotInit, StepPlan, StepResult
from headrace.types.request import Int32Array
from headrace.types.sampling_params import LogprobOptions
from headrace.types.weights import BufferEntry, BufferRef, DeviceRef, TensorInfo, UpdateMode
from headrace.weights.memory import (
    Copies,
    ResolvedMode,
    SharedTensors,
    StageBuffer,
    StageCopy,
    StagePiece,
    Ticket,
    one_by_one,
)

FREE_LOGPROB = -0.5


def free_tokens(positions: Int32Array, vocab_size: int) -> Int32Array:
    """The token at each absolute position: never id 0, so that 0 may be a stop id that never comes."""
    return (1 + positions % (vocab_size - 1)).astype(np.int32)


class FreeExecutor:
    """Answers each plan when it is collected, from its arrays alone."""

    def __init__(self, vocab_size: int, *, weights: Weights | None = None) -> None:
        self.weights: Weights = weights or FreeWeights()
        self.num_executed = 0
        self._vocab_size = vocab_size
        self._plans: deque[StepPlan] = deque()
        self._special: dict[int, SlotInit] = {}

    def submit(self, plan: StepPlan) -> None:
        self._plans.append(plan)

    def sample(self, step_id: int, patch: SamplePatch | None = None) -> None:
        """Nothing is computed of a plan before it is collected, and no mask changes that."""

    def collect(self) -> StepResult:
        plan = self._plans.popleft()
        for entry in plan.new_slots:
            self._enter(entry)
        self.num_executed += 1
        sampled = plan.row_samples
        positions = (plan.row_starts + plan.row_lengths)[sampled]
        count = len(positions)
        extras, prompt_logprobs = self._side_outputs(plan) if self._special else ({}, {})
        return StepResult(
            step_id=plan.step_id,
            token_ids=free_tokens(positions, self._vocab_size).reshape(count, 1),
            logprobs=np.full((count, 1), FREE_LOGPROB, dtype=np.float32),
            num_tokens=np.ones(count, dtype=np.int32),
            extras=extras,
            prompt_logprobs=prompt_logprobs,
        )

    def examine(self, fault: BaseException) -> None:
        if is_of_lost_device(fault):
            raise DeviceLost(describe(fault)) from fault

    def counters(self) -> dict[str, float]:
        return {"num_gemm_calls": 0.0}

    def checkpoint(self, folder: Path, root: Path | None) -> CheckpointSlices:
        raise CheckpointError(f"{folder}: this executor has no weights", field="path")

    def release(self, tags: Collection[MemoryTag], *, keeps_copy: bool) -> Generator[None]:
        yield  # there is none

    def resume(self, tags: Collection[MemoryTag], restore: Restore) -> Generator[None]:
        yield

    def attend(self) -> float:
        return math.inf

    def join_group(self, terms: JoinGroup, seconds: float) -> WeightGroup:
        raise WeightUpdateError("this executor has no weights", field="group_name")

    def close(self) -> None:
        self._plans.clear()

    def _enter(self, entry: SlotInit) -> None:
        options = entry.logprobs
        if options.wants_output_extras or options.prompt_start is not None:
            self._special[entry.slot] = entry
        else:
            self._special.pop(entry.slot, None)

    def _side_outputs(self, plan: StepPlan) -> tuple[dict[int, PositionLogprobs], dict[int, PromptLogprobs]]:
        extras: dict[int, PositionLogprobs] = {}
        prompts: dict[int, PromptLogprobs] = {}
        for row, slot in enumerate(plan.row_slots.tolist()):
            entry = self._special.get(slot)
            if entry is None:
                continue
            start, length = int(plan.row_starts[row]), int(plan.row_lengths[row])
            if entry.logprobs.wants_output_extras and plan.row_samples[row]:
                extra = _free_extras(1, entry.logprobs)
                kept = free_tokens(np.array([start + length], np.int32), self._vocab_size)
                kept = kept[: entry.logprobs.max_kept]
                extras[row] = msgspec.structs.replace(extra, kept_ids=kept, kept_counts=np.ones(len(kept), np.int32))
            scored = entry.scored_positions(start, length)
            if scored:
                further = _free_extras(len(scored), entry.logprobs) if entry.logprobs.wants_extras else None
                prompts[row] = PromptLogprobs(scored.start, np.full(len(scored), FREE_LOGPROB, np.float32), further)
        return extras, prompts


def _free_extras(count: int, options: LogprobOptions) -> PositionLogprobs:
    ids = np.tile(np.arange(options.num_top, dtype=np.int32), (count, 1))
    top = np.full((count, options.num_top), FREE_LOGPROB, np.float32)
    return PositionLogprobs(ids, top, np.full((count, len(options.token_ids)), FREE_LOGPROB, np.float32))


class FreeWeights:
    """Weights that are nowhere: every update is accepted and costs nothing."""

    device_ids: tuple[str, ...] = ()

    def open_buffer(self, ref: BufferRef | DeviceRef) -> StageBuffer:
        return SharedBuffer.open(ref)

    def begin(self, manifest: Sequence[TensorInfo], mode: UpdateMode, partial: bool) -> ResolvedMode:
        return self.begin_open(mode, partial)

    def begin_open(self, mode: UpdateMode, partial: bool) -> ResolvedMode:
        return "inplace" if mode == "inplace" else "shadow"

    def extend(self, manifest: Sequence[TensorInfo]) -> int:
        return 0

    def missing(self) -> list[str]:
        return []

    def stage(self, index: int, data: Any, start: int | None = None) -> StageCopy:
        return _FreeCopy()

    def stage_pieces(self, pieces: Iterator[StagePiece]) -> Copies:
        return one_by_one(self.stage, pieces)

    def stage_arrived(self, tensors: Sequence[StagePiece]) -> Copies:
        return one_by_one(self.stage, iter(tensors))

    def moves(self, entries: Sequence[BufferEntry], ref: BufferRef | DeviceRef, *, are_right: bool) -> None:
        return None

    def open_payload(self, payload: Payload) -> SharedTensors:
        return _FreeTensors([(info.name, info) for info in payload.manifest()])

    def forget(self, index: int) -> list[int]:
        return [index]

    def commit(self) -> Ticket:
        return _FreeCopy()

    def abort(self) -> None:
        pass

    def let_go(self, budget_s: float) -> bool:
        return False

    def digest_in_slices(self, rank: int | None = None) -> Iterator[tuple[str, str] | None]:
        return iter(())

    def parameters(self) -> tuple[tuple[TensorInfo, ...], ...]:
        return ((),)

    def info(self, name: str, rank: int | None = None) -> TensorInfo:
        raise NotFoundError(f"{name} is not a tensor of this model", field="name")

    def copy_in_slices(self, name: str, start: int, into: memoryview, rank: int | None = None) -> Iterator[None]:
        return iter(())

    def scramble(self, seed: int) -> None:
        pass


class _FreeTensors:
    def __init__(self, tensors: list[tuple[str, Any]]) -> None:
        self.tensors = tensors

    def close(self) -> None:
        pass


class _FreeCopy:
    has_written = True

    def advance(self, budget_s: float) -> bool:
        return True

    def is_done(self) -> bool:
        return True
