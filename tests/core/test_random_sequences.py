"""Random commands in random order against what must always hold, at several overlap depths.

Each call has exactly one reply and each request exactly one terminal delta (the harness checks "at most one"); tokens
are the right ones whatever happened between; versions never go back within a request; epochs only grow; and no step
ever runs on weights that are not one whole version, or while memory is released.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Generator

import numpy as np
import numpy.typing as npt
import pytest
import torch

from headrace.core.fake_executor import FreeExecutor
from headrace.core.faults import StepError
from headrace.ipc import SharedBuffer
from headrace.types.errors import UnavailableError
from headrace.types.memory import MEMORY_TAGS, MemoryTag, Restore
from headrace.types.messages import (
    Abort,
    AbortUpdate,
    CommitUpdate,
    Digest,
    Finished,
    FlushCache,
    GetStatus,
    GiveUp,
    Pause,
    ReleaseMemory,
    Resume,
    ResumeMemory,
    Stage,
    WeightsChecker,
)
from headrace.types.plan import StepPlan, StepResult
from headrace.types.weights import BufferEntry, BufferRef
from headrace.weights.store import WeightStore
from tests.core.harness import VOCAB_SIZE, Core, bucket_of, manifest_of, new_tensors, request, tiny_store
from tests.rounds import rounds

NUM_SEQUENCES = rounds(40)
NUM_EVENTS = 60
POLICIES = ["keep", "recompute", "abort", "drain"]


def live_views(store: WeightStore) -> list[npt.NDArray[np.float32]]:
    """Live memory as flat arrays, one per tensor, in the order of `new_tensors`: their addresses never change."""
    rules = [store.weight_map.rules_by_name[name] for name in new_tensors(0.0)]
    return [store.live[p.param][p.target.slices].numpy().reshape(-1) for r in rules for p in r.pieces]


class WatchingExecutor(FreeExecutor):
    """Checks at every step that the live weights are whole and are those the plan was made for. Some steps fail."""

    def __init__(self, store: WeightStore, chance: random.Random) -> None:
        super().__init__(VOCAB_SIZE, weights=store)
        self.chance = chance
        self.failure_rate = chance.choice([0.0, 0.0, 0.05])
        self.views = live_views(store)
        self.released: set[MemoryTag] = set()
        self.num_releases = self.num_captures = 0
        self.is_capturing = False
        self.kept: list[npt.NDArray[np.float32]] = []
        self.last_epoch = 0
        self.version_of_epoch: dict[int, float] = {}

    def collect(self) -> StepResult:
        plan: StepPlan = self._plans[0]
        assert plan.epoch >= self.last_epoch
        self.last_epoch = plan.epoch
        value = self.whole_version()
        assert self.version_of_epoch.setdefault(plan.epoch, value) == value
        if self.chance.random() < self.failure_rate:
            self._plans.popleft()
            raise StepError(plan.step_id, MemoryError("no room"))
        return super().collect()

    def submit(self, plan: StepPlan) -> None:
        lacking = self.released - {"cuda_graph"}
        assert not lacking and not self.is_capturing, f"a step runs without {lacking or 'all graphs'}"
        super().submit(plan)

    def release(self, tags: Collection[MemoryTag], *, keeps_copy: bool) -> Generator[None]:
        """In a few slices, of which the last takes all away."""
        assert not self._plans and not self.released & set(tags) - {"cuda_graph"}
        kept = [view.copy() for view in self.views] if keeps_copy else []
        for _ in range(self.chance.randint(0, 3)):
            yield
        self.fail_at_times()
        self.num_releases += 1
        self.released |= set(tags)
        if "weights" in tags:
            self.kept = kept
            for view in self.views:
                view[:] = np.nan

    def resume(self, tags: Collection[MemoryTag], restore: Restore) -> Generator[None]:
        """Graphs come back with the last of the others, or after them, and no step runs meanwhile."""
        assert not self._plans and self.released >= set(tags)
        self.is_capturing = "cuda_graph" in tags
        assert not self.is_capturing or self.released == set(tags)
        try:
            for _ in range(self.chance.randint(0, 3)):
                yield
            self.fail_at_times()
        finally:
            self.is_capturing = False
        self.num_captures += "cuda_graph" in tags
        self.released -= set(tags)
        if "weights" in tags and restore != "await":
            for number, view in enumerate(self.views):
                view[:] = self.kept[number] if restore == "copy" else number

    def fail_at_times(self) -> None:
        if self.chance.random() < 0.1:
            raise UnavailableError("no room")

    def whole_version(self) -> float:
        """The one version all live elements belong to; fails on a mix."""
        values = {float(bound) - number for number, view in enumerate(self.views) for bound in (view.min(), view.max())}
        assert len(values) == 1, f"live weights are a mix of {sorted(values)}"
        return values.pop()


class Driver:
    """Sends random commands and keeps account of what was sent."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        store = tiny_store()
        for number, view in enumerate(live_views(store)):
            view[:] = number
        self.executor = WatchingExecutor(store, random.Random(seed))
        self.core = Core(
            self.executor,
            overlap_depth=(0, 1, 3)[seed % 3],
            max_running_requests=self.chance.choice([1, 3, 8]),
            max_num_batched_tokens=self.chance.choice([4, 16, 64]),
            kv_pool_tokens=self.chance.choice([64, 128, 512]),
            pause_timeout=30.0,
            control_timeout=50.0,
            keep_weights_copy=self.chance.random() < 0.5,
        )
        self.calls: list[int] = []
        self.prompts: dict[int, list[int]] = {}
        self.discarded: set[int] = set()
        self.num_updates = 0
        self.session = 0
        self.tensors: dict[str, torch.Tensor] = {}
        self.buffers: list[SharedBuffer] = []

    def event(self) -> None:
        actions = [self.submit] * 5 + [self.turn] * 8 + [self.abort, self.discard, self.pause, self.resume, self.begin]
        actions += [self.resume, self.begin] + [self.stage] * 4 + [self.commit] * 4
        actions += [self.abort_update, self.tick, self.look, self.lose, self.release, self.resume_memory, self.give_up]
        actions += [self.resume_memory]
        self.chance.choice(actions)()

    def submit(self) -> None:
        requests = []
        for _ in range(self.chance.randint(1, 3)):
            handle = len(self.prompts) + 1
            length = self.chance.randint(0, 20) if self.chance.random() < 0.3 else 6
            prompt = [self.chance.randint(1, 3) for _ in range(length)]
            self.prompts[handle] = prompt
            fields = {"deliver_every": self.chance.choice([0, 1, 4]), "priority": self.chance.choice([0, 0, 1])}
            requests.append(request(handle, prompt, self.chance.randint(0, 30), **fields))
        self.core.submit(*requests)

    def turn(self) -> None:
        self.core.turn(self.chance.randint(1, 4))

    def abort(self) -> None:
        self.core.send(Abort(self.some_handles() or tuple(self.prompts)))

    def discard(self) -> None:
        handles = self.some_handles()
        self.discarded.update(handles)
        self.core.send(Finished(handles))

    def some_handles(self) -> tuple[int, ...]:
        return tuple(self.chance.sample(list(self.prompts), min(len(self.prompts), 2)))

    def pause(self) -> None:
        self.calls.append(self.core.start(Pause, self.chance.choice(POLICIES)))

    def resume(self) -> None:
        self.calls.append(self.core.start(Resume))

    def begin(self) -> None:
        self.core.turn()
        replica = self.core.loop.replica
        if self.core.status().updating or replica.update.machine.state == "released" or replica.memory.jobs:
            return
        self.num_updates += 1
        self.tensors = new_tensors(100.0 * self.num_updates)
        mode, policy = self.chance.choice(["auto", "shadow", "inplace"]), self.chance.choice(POLICIES)
        version = f"{self.num_updates:03d}"
        self.session = self.core.begin(self.tensors, version, mode=mode, in_flight=policy, timeout_s=20.0)

    def stage(self) -> None:
        if not self.session:
            return
        names = list(self.tensors)
        if self.chance.random() < 0.2:
            names = self.chance.sample(names, self.chance.randint(1, len(names)))
        buffer, offsets = bucket_of([self.tensors[name] for name in names])
        self.buffers.append(buffer)
        index_of = {info.name: index for index, info in enumerate(manifest_of(self.tensors))}
        entries = [BufferEntry(index_of[name], offset) for name, offset in zip(names, offsets, strict=True)]
        ref = buffer.ref if self.chance.random() < 0.95 else BufferRef("/nowhere", buffer.ref.size)
        self.calls.append(self.core.start(Stage, self.session, ref, tuple(entries)))

    def commit(self) -> None:
        self.calls.append(self.core.start(CommitUpdate, self.session))

    def abort_update(self) -> None:
        self.calls.append(self.core.start(AbortUpdate, self.session))

    def tick(self) -> None:
        self.core.clock.now += self.chance.choice([1.0, 5.0, 15.0])

    def look(self) -> None:
        kinds: list[type[GetStatus | FlushCache | Digest]] = [GetStatus, FlushCache, Digest]
        self.calls.append(self.core.start(self.chance.choice(kinds)))

    def lose(self) -> None:
        if self.chance.random() < 0.1:
            self.calls.append(self.core.start(WeightsChecker, "reset_tensors"))

    def release(self) -> None:
        how = self.chance.choice(["abort", "recompute"])
        self.calls.append(self.core.start(ReleaseMemory, self.some_tags(), how, deadline=self.some_deadline()))

    def resume_memory(self) -> None:
        source = self.chance.choice(["auto", "auto", "copy", "disk", "await"])
        self.calls.append(self.core.start(ResumeMemory, self.some_tags(), source, deadline=self.some_deadline()))

    def some_tags(self) -> tuple[MemoryTag, ...]:
        return tuple(self.chance.sample(MEMORY_TAGS, self.chance.randint(0, 3)))

    def some_deadline(self) -> float:
        return self.core.clock.now + self.chance.choice([0.5, 100.0])

    def give_up(self) -> None:
        if self.calls:
            self.calls.append(self.core.start(GiveUp, self.calls[-1]))

    def end(self) -> None:
        """Resume, let every deadline pass, and bring weights where there are none."""
        core = self.core
        core.settle()
        for _ in range(4):
            core.clock.now += 60.0
            self.resume()
            self.calls.append(core.start(ResumeMemory, ()))
            core.settle()
        while core.status().released:
            self.calls.append(core.start(ResumeMemory, ()))
            core.settle()
        if core.status().state != "ready":
            self.begin()
            core.stage(self.session, self.tensors)
            self.commit()
        core.settle()


@pytest.mark.parametrize("part", range(3))
def test_invariants_hold_under_random_commands(part: int) -> None:
    seen: dict[str, int] = {}
    for number in range(NUM_SEQUENCES):
        driver = Driver(part * NUM_SEQUENCES + number)
        for _ in range(NUM_EVENTS):
            driver.event()
        driver.end()
        check(driver)
        for handle in driver.prompts:
            finish = driver.core.finish(handle)
            seen[finish.type if finish else "none"] = seen.get(finish.type if finish else "none", 0) + 1
        metrics = driver.core.status().metrics
        seen["updates"] = seen.get("updates", 0) + int(metrics["num_updates"])
        seen["failed steps"] = seen.get("failed steps", 0) + int(metrics["num_failed_steps"])
        seen["preemptions"] = seen.get("preemptions", 0) + int(metrics["num_preemptions"])
        seen["releases"] = seen.get("releases", 0) + driver.executor.num_releases
        seen["captures"] = seen.get("captures", 0) + driver.executor.num_captures
        seen["mixed"] = seen.get("mixed", 0) + sum(len(driver.core.spans(handle)) > 1 for handle in driver.prompts)
        for buffer in driver.buffers:
            buffer.close()
    for kind in ("length", "abort", "error", "updates", "preemptions", "failed steps", "mixed", "releases", "captures"):
        assert seen.get(kind, 0) > 5, f"the sequences never show {kind}: {seen}"


def check(driver: Driver) -> None:
    core = driver.core
    unanswered = [call_id for call_id in driver.calls if call_id not in core.link.replies]
    assert not unanswered, unanswered
    for handle, prompt in driver.prompts.items():
        finish = core.finish(handle)
        assert finish is not None or handle in driver.discarded, f"request {handle} was never answered"
        tokens = core.tokens(handle)
        first = len(prompt) + 1
        assert tokens == list(range(first, first + len(tokens)))
        versions = [version.replace("default", "000") for version, _ in core.spans(handle)]
        assert versions == sorted(versions)
    status = core.status()
    assert status.num_used_tokens == status.num_running == status.num_waiting == 0
    assert status.epoch == status.metrics["num_updates"]
