"""The executor of several ranks: what this process launches, reads or frees, the others do too, in the same order.

Rank 0 decides what is launched, and the others launch it: a plan is sent as one flat array before it is launched here,
and nothing is agreed on. Ranks sample from the same logits with the same noise, all of the rows or a share of them that
they tell each other, so that each has the last tokens without another message; what came of it is compared a step late,
as 32 bits that each rank shows in its page. A step that failed here has to have failed everywhere, or the ranks are out
of step: then they are lost, as one device.

Owns that order. Must not know processes (`headrace.core.rank_group`) nor how weights are put together
(`headrace.core.rank_weights`).
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Collection, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.config import ResolvedConfig
from headrace.core.executor import ArrivingTensors, CheckpointSlices, LocalExecutor, WeightGroup
from headrace.core.faults import FAULTS, describe
from headrace.core.rank_group import ANSWER_SECONDS, WAIT_SECONDS, Asked, OtherRanks
from headrace.core.rank_messages import (
    DropArrivalsOn,
    DropCopyOn,
    JoinOn,
    KeepOn,
    LeaveOn,
    OpenFolderOn,
    ReceiveOn,
    ReleaseOn,
    ResumeOn,
    SampleStep,
    VoidStep,
)
from headrace.core.rank_results import digest_of
from headrace.core.rank_sources import Arrived, FileTensorOn, give_up
from headrace.core.rank_weights import RankWeights
from headrace.core.stage_results import StageResults
from headrace.ipc.rank_meeting import Meeting
from headrace.ipc.rank_page import NUM_RESULTS
from headrace.parallel import Mesh
from headrace.parallel.rendezvous import Rendezvous
from headrace.types.errors import HeadraceError, UpdateConflictError, WeightUpdateError
from headrace.types.memory import MemoryTag, Restore
from headrace.types.messages import JoinGroup
from headrace.types.plan import LAST_TOKEN, PlanRefused, RankLost, SamplePatch, StepPlan, StepResult
from headrace.types.plan_words import encode
from headrace.types.weights import TensorInfo

if TYPE_CHECKING:
    from headrace.runner.device_runner import DeviceRunner
    from headrace.runner.pending import PendingStep
    from headrace.runner.runner import Runner

VOID_SECONDS = 3.0
"""How long a rank may take to come to the end of a step that failed on rank 0; one that waits for rank 0 never does."""


class RankRunner:
    """What launches plans on all ranks."""

    def __init__(self, own: Runner | DeviceRunner, others: OtherRanks) -> None:
        self.weights = RankWeights(own.weights, others, own.resolved)
        self.memory = own.memory
        self.probe, self.counters = own.probe, own.counters
        self._own = own
        self._others = others
        self._num_sent = 0
        engine = own.resolved.engine
        self._comparing, self.results = others.numbers, None
        if engine.pp_size > 1:
            others.companions = range(1, engine.tp_size)
            sampler = own.resolved.num_ranks - engine.tp_size
            self._comparing = [rank for rank in others.numbers if rank > sampler]
            self.results = StageResults(others, sampler, engine.watchdog_timeout)
        self._results: deque[tuple[int, int]] = deque(maxlen=NUM_RESULTS)  # not compared yet, by number of the plan

    @property
    def resolved(self) -> ResolvedConfig:
        return self._own.resolved

    def launch(self, plan: StepPlan) -> RankStep:
        """As `Runner.launch`. A plan that cannot be sent is refused by `encode`, and nothing of it happens; so is one
        of several stages that has an unknown token: it is sampled on the last, and the first would wait for it."""
        if self.results is not None and plan.token_ids.min(initial=0) == LAST_TOKEN:
            raise PlanRefused("it has a token that the first stage does not know")
        words = encode(plan)
        self._others.send_plan(words.tobytes())
        number = self._num_sent
        self._num_sent += 1
        try:
            step = self._own.launch(plan)
        except FAULTS as fault:
            self.void(number, fault)
            raise
        return RankStep(number, step, self, self._others)

    def void(self, number: int, fault: BaseException) -> None:
        """Plan `number` of those sent failed here. Returns where it is over on every rank; else raises `DeviceLost`."""
        if isinstance(fault, RankLost):
            raise self._others.cause_of(fault) from fault
        asked = self._others.ask(VoidStep, number)
        until = time.monotonic() + (VOID_SECONDS if self._others.companions else ANSWER_SECONDS)
        while not asked.is_done():
            if time.monotonic() >= until:
                raise self._others.lose(f"rank 0 failed in a step, and not all ranks did: {describe(fault)}")
            time.sleep(WAIT_SECONDS)

    def compare(self, number: int, result: StepResult) -> None:
        """Hold what the others have shown against what came of the same plans here. Raises `DeviceLost`."""
        self._others.check()
        if self._comparing:
            self._results.append((number, digest_of(result)))
        failure = self._others.failure_until(number)
        if failure:
            raise self._others.lose(failure)
        while self._results:
            number, own = self._results[0]
            for rank in self._comparing:
                found = self._others.result(rank, number)
                if found is None:
                    return
                if found != own:
                    raise self._others.lose(f"{self._others.names([rank])} has another result of a step than rank 0")
            self._results.popleft()

    def close(self) -> None:
        """End the others, and free the device."""
        self._others.close()
        self.weights.close()
        self._own.close()


class RankStep:
    """A step on all ranks."""

    def __init__(self, number: int, own: PendingStep, runner: RankRunner, others: OtherRanks) -> None:
        self.step_id = own.step_id
        self._number = number
        self._own, self._runner, self._others = own, runner, others

    def sample(self, patch: SamplePatch | None) -> None:
        """As `PendingStep.sample`."""
        rows, masks = (b"", b"") if patch is None else (patch.rows.tobytes(), patch.masks.tobytes())
        self._others.tell(SampleStep(self._number, rows, masks))
        try:
            self._own.sample(patch)
        except FAULTS as fault:
            self._runner.void(self._number, fault)
            raise

    def wait(self) -> StepResult:
        """As `PendingStep.wait`."""
        try:
            result = self._own.wait()
            if self._runner.results is not None:
                result = self._runner.results.of(self._number)
        except FAULTS as fault:
            self._runner.void(self._number, fault)
            raise
        self._runner.compare(self._number, result)
        return result


class RankExecutor(LocalExecutor):
    """Executes plans on all ranks. `attend` is to be called while nothing is to be done."""

    def __init__(
        self,
        own: Runner | DeviceRunner,
        others: OtherRanks,
        mesh: Mesh,
        rendezvous: Rendezvous,
        meeting: Meeting | None = None,
    ) -> None:
        """`mesh`, which `own` computes in, `rendezvous` and `meeting` are closed with it."""
        super().__init__(RankRunner(own, others))
        self._mesh = mesh
        self._rendezvous, self._meeting = rendezvous, meeting  # others look into it as long as they live
        self._others = others
        self._num_groups = 0
        self._groups: list[RankGroup] = []

    def attend(self) -> float:
        self._others.check()
        return 1.0

    def checkpoint(self, folder: Path, root: Path | None) -> CheckpointSlices:
        manifest, tensors = yield from super().checkpoint(folder, root)
        self._others.tell(OpenFolderOn(str(folder), str(root or "")))
        return manifest, ((name, FileTensorOn(name, data)) for name, data in tensors)

    def release(self, tags: Collection[MemoryTag], *, keeps_copy: bool) -> Generator[None]:
        """First copies, where some are kept; then all ranks release, which takes no longer than to say so."""
        if keeps_copy and "weights" in tags:
            yield from self._keep_copies()
        self._release_all(tags)

    def resume(self, tags: Collection[MemoryTag], restore: Restore) -> Generator[None]:
        asked = self._others.ask(ResumeOn, tuple(tags), restore)
        is_here = is_there = False
        try:
            yield from super().resume(tags, restore)
            is_here = True
            while not asked.is_done():
                yield
            is_there = True
        finally:
            if not is_there:
                self._undo_resume(asked, tags, is_here=is_here, had_copy=restore == "copy" and "weights" in tags)

    def join_group(self, terms: JoinGroup, seconds: float) -> WeightGroup:
        num_ranks = len(self._others.numbers) + 1
        if terms.rank + num_ranks > terms.world_size:
            message = f"world_size {terms.world_size} has no {num_ranks} ranks from rank_offset {terms.rank} on"
            raise WeightUpdateError(message, field="world_size")
        own = super().join_group(terms, seconds)
        for group in self._groups:
            if group.problem is not None:  # what one rank knows of, another may still wait for
                group.fail("it cannot be used any more")
        self._num_groups += 1
        joined = RankGroup(self._num_groups, own, self._others, terms, seconds)
        self._groups = [*(group for group in self._groups if not group.is_left), joined]
        return joined

    def close(self) -> None:
        with contextlib.ExitStack() as ends:
            if self._meeting is not None:
                ends.callback(self._meeting.close)
            ends.callback(self._rendezvous.close)
            ends.callback(self._mesh.close)
            ends.callback(super().close)  # first

    # Inside.

    def _keep_copies(self) -> Generator[None]:
        asked, is_kept = self._others.ask(KeepOn), False
        try:
            yield from super().keep_copy()
            while not asked.is_done():
                yield
            is_kept = True
        finally:
            if not is_kept:
                give_up(self._others, asked)
                self._others.tell(DropCopyOn())
                self.drop_copy()

    def _release_all(self, tags: Collection[MemoryTag]) -> None:
        asked = self._others.ask(ReleaseOn, tuple(tags))
        for _ in super().release(tags, keeps_copy=False):
            pass
        asked.wait()

    def _undo_resume(self, asked: Asked, tags: Collection[MemoryTag], *, is_here: bool, had_copy: bool) -> None:
        """Release on all ranks again what some may have taken, and have the copies again that it came from."""
        give_up(self._others, asked)
        if had_copy:
            kept = self._others.ask(KeepOn)
            if is_here:
                for _ in super().keep_copy():
                    pass
            kept.wait()
        self._release_all(tags)


class RankGroup:
    """A trainer's group that all ranks are part of, one after the other."""

    def __init__(self, key: int, own: WeightGroup, others: OtherRanks, terms: JoinGroup, seconds: float) -> None:
        self.is_left = False
        self._key = key
        self._own = own
        self._others = others
        self._num_calls = 0
        self._problem: HeadraceError | None = None
        self._asked = others.ask(JoinOn, key, terms, seconds)

    @property
    def is_joined(self) -> bool:
        return self._own.is_joined and self.problem is None and self._asked.is_done()

    @property
    def problem(self) -> HeadraceError | None:
        if self._problem is None and not self._others.is_closed:
            try:
                self._asked.is_done()
            except HeadraceError as error:
                self._problem = error
        return self._own.problem or self._problem

    @property
    def counted(self) -> str:
        return self._own.counted

    def refusal(self) -> HeadraceError | None:
        if self._own.refusal() is not None or self._problem is None:
            return self._own.refusal()
        message = f"{self._problem.message}; the group cannot be used any more: destroy it and init it again"
        return UpdateConflictError(message, field="group_name")

    def receive(
        self, tensors: Sequence[TensorInfo], packing: int, seconds: float, skipped: Collection[int] = ()
    ) -> ArrivingTensors:
        self._num_calls += 1
        call = self._key << 32 | self._num_calls
        self._others.tell(ReceiveOn(self._key, call, tuple(tensors), packing, seconds, tuple(skipped)))
        return RankArrivals(call, self._own.receive(tensors, packing, seconds, skipped), self._others)

    def fail(self, reason: str) -> None:
        self._own.fail(reason)
        if not (self.is_left or self._others.is_closed):
            self._others.tell(LeaveOn(self._key, reason))
        self.is_left = True


class RankArrivals:
    """What one call brings to every rank."""

    def __init__(self, call: int, own: ArrivingTensors, others: OtherRanks) -> None:
        self._call = call
        self._own = own
        self._others = others
        self._taken: list[Arrived] = []
        self._is_dropped = False

    @property
    def is_complete(self) -> bool:
        return self._own.is_complete

    def take(self, most: int) -> list[tuple[int, Any]]:
        found = [(place, Arrived(self._call, data)) for place, data in self._own.take(most)]
        self._taken += [each for _, each in found]
        return found

    def free(self) -> None:
        self._taken.clear()
        self._own.free()

    def drop(self) -> None:
        if not self._is_dropped and not self._others.is_closed:
            for asked in {each.asked for each in self._taken}:
                give_up(self._others, asked)
            self._others.tell(DropArrivalsOn(self._call))
        self._is_dropped = True
        self._own.drop()
