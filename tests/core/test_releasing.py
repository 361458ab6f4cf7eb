"""Releasing memory by tag and resuming it: orders, what requests meet meanwhile, and what is undone."""

from __future__ import annotations

import time
from collections.abc import Collection, Generator
from itertools import permutations

import pytest

from headrace.core.fake_executor import FreeExecutor
from headrace.core.loop import STAGE_BUDGET_IDLE_S
from headrace.types.errors import UnavailableError
from headrace.types.memory import MEMORY_TAGS, MemoryTag, Restore
from headrace.types.messages import (
    AbortUpdate,
    BeginUpdate,
    CommitUpdate,
    Digest,
    FlushCache,
    GiveUp,
    Pause,
    ReleaseMemory,
    Resume,
    ResumeMemory,
    SetVersion,
    Shutdown,
    UpdateFromDisk,
    WeightsChecker,
)
from headrace.types.weights import UpdateReport
from tests.core.harness import VOCAB_SIZE, Core, manifest_of, new_tensors, request, tiny_config, tiny_store


class TurningExecutor(FreeExecutor):
    """Gives memory back, and takes it, in `num_turns` turns. `problem` is what comes of a resume."""

    def __init__(self, num_turns: int = 1, slice_seconds: float = STAGE_BUDGET_IDLE_S) -> None:
        super().__init__(VOCAB_SIZE, weights=tiny_store())
        self.num_turns, self.slice_seconds = num_turns, slice_seconds
        self.problem: Exception | None = None
        self.done: list[tuple[str, tuple[MemoryTag, ...], str]] = []
        self.examined: list[BaseException] = []

    def slices(self) -> Generator[None]:
        """Each longer than what a turn gives, unless it takes less."""
        assert not self._plans, "a step is in flight, which needs the memory or may run in the middle of a capture"
        for _ in range(self.num_turns):
            time.sleep(self.slice_seconds)
            yield

    def examine(self, fault: BaseException) -> None:
        self.examined.append(fault)
        super().examine(fault)

    def release(self, tags: Collection[MemoryTag], *, keeps_copy: bool) -> Generator[None]:
        yield from self.slices()
        self.done.append(("release", tuple(sorted(tags)), "copy" if keeps_copy else ""))

    def resume(self, tags: Collection[MemoryTag], restore: Restore) -> Generator[None]:
        yield from self.slices()
        if self.problem is not None:
            raise self.problem
        self.done.append(("resume", tuple(sorted(tags)), restore))


def core_over(executor: TurningExecutor | None = None, **settings: object) -> Core:
    return Core(executor or TurningExecutor(), **{"keep_weights_copy": True, **settings})


def update(core: Core, version: str = "v1") -> None:
    tensors = new_tensors(7.0)
    session = core.begin(tensors, version)
    core.stage(session, tensors)
    core.call(CommitUpdate, session, kind=UpdateReport)


@pytest.mark.parametrize("order", list(permutations(MEMORY_TAGS)))
def test_tags_come_back_in_any_order_and_generation_with_the_last_that_it_needs(order: tuple[MemoryTag, ...]) -> None:
    core = core_over()
    core.call(ReleaseMemory, ())
    assert core.status().released == tuple(sorted(MEMORY_TAGS))
    core.submit(request(1, max_new_tokens=3))
    for number, tag in enumerate(order):
        core.settle()
        lacks = {"weights", "kv_cache"} - set(order[:number])
        assert (core.finish(1) is None) == bool(lacks)
        core.call(ResumeMemory, (tag,))
    core.settle()
    assert core.finish_types(1) == ["length"] and core.tokens(1) == [6, 7, 8]
    assert core.status().released == () and core.status().state == "ready"


@pytest.mark.parametrize("order", list(permutations(MEMORY_TAGS)))
def test_graphs_are_captured_again_by_the_last_resume(order: tuple[MemoryTag, ...]) -> None:
    """Over memory that is there, whichever tag is the last, and once only."""
    executor = TurningExecutor()
    core = core_over(executor)
    core.call(ReleaseMemory, ())
    for tag in order:
        core.call(ResumeMemory, (tag,))
    resumes = [tags for kind, tags, _ in executor.done if kind == "resume"]
    assert [tags for tags in resumes if "cuda_graph" in tags] == [tuple(sorted({"cuda_graph", order[-1]}))]
    assert sorted(tag for tags in resumes for tag in tags) == sorted(MEMORY_TAGS)
    core.call(ResumeMemory, ())
    assert executor.done[-1][1] == resumes[-1]


@pytest.mark.parametrize("overlap_depth", [0, 1, 3])
def test_without_graphs_alone_requests_go_on_and_stand_still_only_while_they_come_back(overlap_depth: int) -> None:
    executor = TurningExecutor(3)
    core = core_over(executor, overlap_depth=overlap_depth)
    core.submit(request(1, max_new_tokens=40), request(2, max_new_tokens=40))
    core.turn(5)
    core.call(ReleaseMemory, ("cuda_graph",))
    assert executor.done == [("release", ("cuda_graph",), "")] and core.finish_types(1, 2) == [None, None]
    before = executor.num_executed
    core.turn(5)
    assert executor.num_executed == before + 5 and core.status().released == ("cuda_graph",)
    coming = core.start(ResumeMemory, ("cuda_graph",))
    core.turn()
    before = executor.num_executed
    core.turn()
    assert executor.num_executed == before and coming not in core.link.replies
    core.settle()
    core.answer(coming)
    assert executor.done[-1] == ("resume", ("cuda_graph",), "await")
    assert core.finish_types(1, 2) == ["length", "length"]
    assert core.tokens(1) == core.tokens(2) == list(range(6, 46))
    assert core.link.deltas[1][-1].num_preemptions == 0
    assert core.status().metrics["num_cached_pages"]


def test_graphs_that_find_no_room_are_asked_for_again_with_what_was_to_come() -> None:
    executor = TurningExecutor()
    core = core_over(executor)
    core.call(ReleaseMemory)
    core.call(ResumeMemory, ("weights", "cuda_graph"))
    executor.problem = UnavailableError("no room", field="tags")
    assert core.refused(ResumeMemory).field == "tags"
    assert core.status().released == ("kv_cache",)
    executor.problem = None
    core.call(ReleaseMemory, ("cuda_graph",))  # it was never there
    core.call(ResumeMemory, ("kv_cache",))
    core.submit(request(1))
    core.settle()
    assert core.finish_types(1) == ["length"] and executor.done[-1][1] == ("kv_cache",)
    core.call(ResumeMemory, ("cuda_graph",))
    assert executor.done[-1][1] == ("cuda_graph",) and core.status().released == ()


def test_an_update_between_comes_before_the_graphs() -> None:
    executor = TurningExecutor()
    core = core_over(executor, keep_weights_copy=False)
    core.call(ReleaseMemory)
    core.call(ResumeMemory, ("weights",))
    update(core)
    core.call(ResumeMemory, ("kv_cache", "cuda_graph"))
    core.submit(request(1))
    core.settle()
    assert core.finish_types(1) == ["length"]
    assert [tags for _, tags, _ in executor.done[1:]] == [("weights",), ("cuda_graph", "kv_cache")]


def test_both_calls_are_idempotent() -> None:
    executor = TurningExecutor()
    core = core_over(executor)
    core.call(ResumeMemory, ())
    for _ in range(2):
        core.call(ReleaseMemory, ("kv_cache",))
    core.call(ReleaseMemory, ("weights", "kv_cache"))
    for _ in range(2):
        core.call(ResumeMemory, ())
    assert executor.done == [
        ("release", ("kv_cache",), ""),
        ("release", ("weights",), "copy"),
        ("resume", ("kv_cache", "weights"), "copy"),
    ]
    core.submit(request(1))
    core.turn(3)
    core.call(ReleaseMemory, ("cuda_graph",))  # of which there is nothing to give back
    core.call(ResumeMemory, ("kv_cache", "weights"))  # which are there
    assert executor.done[-1][0] == "release"
    core.settle()
    assert core.finish_types(1) == ["length"]


@pytest.mark.parametrize("overlap_depth", [0, 1, 3])
def test_abort_answers_everybody_with_what_he_has(overlap_depth: int) -> None:
    core = core_over(max_running_requests=1, overlap_depth=overlap_depth)
    core.submit(request(1, max_new_tokens=50), request(2, max_new_tokens=50))
    core.turn(5)
    core.call(ReleaseMemory, ("kv_cache",))
    assert core.finish_types(1, 2) == ["abort", "abort"]
    assert core.tokens(1) and not core.tokens(2)
    assert core.status().num_used_tokens == core.status().metrics["num_cached_pages"] == 0


@pytest.mark.parametrize("overlap_depth", [0, 1, 3])
@pytest.mark.parametrize("tags", [(), ("kv_cache",), ("weights",)])
def test_recompute_keeps_everybody(overlap_depth: int, tags: tuple[MemoryTag, ...]) -> None:
    core = core_over(max_running_requests=1, overlap_depth=overlap_depth)
    core.submit(request(1, max_new_tokens=20), request(2, max_new_tokens=20))
    core.turn(5)
    core.call(ReleaseMemory, tags, "recompute")
    core.settle()
    assert core.finish_types(1, 2) == [None, None] and core.status().num_running == 0
    core.call(ResumeMemory)
    core.settle()
    assert core.tokens(1) == core.tokens(2) == list(range(6, 26))
    assert core.link.deltas[1][-1].num_preemptions == 1


def test_no_page_of_before_is_matched_after() -> None:
    core = core_over()
    core.submit(request(1, range(1, 30)))
    core.settle()
    core.call(ReleaseMemory, ("kv_cache",))
    core.call(ResumeMemory)
    core.submit(request(2, range(1, 30)))
    core.settle()
    assert core.link.deltas[2][-1].num_cached_tokens == 0


def test_who_comes_meanwhile_waits_for_pause_timeout_at_most() -> None:
    core = core_over(pause_timeout=30.0)
    core.call(ReleaseMemory, ("weights",))
    core.submit(request(1))
    core.turn(3)
    assert core.finish(1) is None
    core.clock.now += 31.0
    core.turn(2)
    finish = core.finish(1)
    assert finish is not None and finish.error is not None and finish.error.code == "PauseTimeoutError"


def test_what_asks_for_released_weights_is_refused_by_name() -> None:
    core = core_over()
    core.call(ReleaseMemory, ("weights",))
    assert core.status().state == "released" and core.status().version == ""
    for command, arguments in (
        (Digest, ()),
        (SetVersion, ("v7",)),
        (WeightsChecker, ("snapshot",)),
        (BeginUpdate, ("v7", manifest_of(new_tensors(1.0)))),
        (UpdateFromDisk, ("/folder", "v7")),
        (WeightsChecker, ("reset_tensors",)),
    ):
        error = core.refused(command, *arguments)
        assert error.code in ("NeedsWeightsError", "UpdateConflictError")
        assert "resume_memory_occupation(['weights'])" in error.message
    core.call(ResumeMemory)
    assert core.status().state == "ready" and core.status().version == "default"


def test_a_read_that_a_release_overtakes_is_refused() -> None:
    core = core_over()
    digest, release = core.start(Digest), core.start(ReleaseMemory, ("weights",))
    core.settle()
    core.answer(release)
    assert core.error(digest).code == "NeedsWeightsError"


def test_an_open_update_refuses_a_release_and_a_resume_goes_on_beside_one() -> None:
    core = core_over()
    core.submit(request(1, max_new_tokens=200))
    core.call(ReleaseMemory, ("kv_cache",))
    session = core.begin(new_tensors(7.0))
    for tags in ((), ("weights",), ("cuda_graph",)):
        error = core.refused(ReleaseMemory, tags)
        assert error.code == "UpdateConflictError" and f"session {session}" in error.message
    core.call(ReleaseMemory, ("kv_cache",))  # which it is
    assert core.status().released == ("kv_cache",)
    core.call(ResumeMemory, ("kv_cache",))
    core.call(AbortUpdate, session)
    core.call(ReleaseMemory, ())
    assert core.status().released == tuple(sorted(MEMORY_TAGS))


def test_without_a_copy_weights_are_awaited_and_kept_requests_go_on_under_the_new_ones() -> None:
    core = core_over(keep_weights_copy=False)
    core.submit(request(1, max_new_tokens=20))
    core.turn(5)
    core.call(ReleaseMemory, (), "recompute")
    core.submit(request(2, max_new_tokens=2))
    core.call(ResumeMemory, ("weights",))
    assert core.status().state == "needs_weights"
    core.submit(request(3))
    core.call(ResumeMemory, ("kv_cache",))
    core.settle()
    assert core.finish_types(1, 2, 3) == [None, None, "error"]
    finish = core.finish(3)
    assert finish is not None and finish.error is not None and finish.error.code == "NeedsWeightsError"
    update(core)
    core.settle()
    assert core.finish_types(1, 2) == ["length", "length"] and core.tokens(1) == list(range(6, 26))
    assert [version for version, _ in core.spans(1)] == ["default", "v1"]
    assert core.spans(2) == [("v1", 2)]


@pytest.mark.parametrize("mode", ["shadow", "inplace"])
def test_an_update_does_not_wait_for_requests_that_cannot_run(mode: str) -> None:
    core = core_over()
    core.submit(request(1, max_new_tokens=20))
    core.turn(5)
    core.call(ReleaseMemory, (), "recompute")
    core.call(ResumeMemory, ("weights",))
    tensors = new_tensors(7.0)
    session = core.begin(tensors, mode=mode, in_flight="drain")
    core.stage(session, tensors)
    core.call(CommitUpdate, session, kind=UpdateReport)
    assert core.finish(1) is None
    core.call(ResumeMemory)
    core.settle()
    assert core.tokens(1) == list(range(6, 26))


@pytest.mark.parametrize("lacks", ["memory", "weights", "memory from now on"])
def test_a_pause_does_not_wait_for_requests_that_cannot_run(lacks: str) -> None:
    """What brings back what they lack may be the very caller's next call."""
    core = core_over(keep_weights_copy=False)
    core.submit(request(1, max_new_tokens=20))
    core.turn(5)
    pause = core.start(Pause, "drain") if lacks == "memory from now on" else 0
    core.call(ReleaseMemory, (), "recompute")
    if lacks == "weights":
        core.call(ResumeMemory)
    pause = pause or core.start(Pause, "drain")
    core.turn(2)
    core.answer(pause)
    core.call(ResumeMemory)
    update(core)
    core.settle()
    assert core.status().paused == "drain" and core.finish(1) is None
    core.call(Resume)
    core.settle()
    assert core.tokens(1) == list(range(6, 26))


@pytest.mark.parametrize("tags", [("cuda_graph",), ()])
def test_a_drain_goes_on_when_memory_is_there_again(tags: tuple[MemoryTag, ...]) -> None:
    """What generation lacks while a call goes on it may have in the end."""
    core = core_over(TurningExecutor(num_turns=4))
    core.submit(request(1, max_new_tokens=20))
    core.turn(5)
    core.call(ReleaseMemory, tags, "recompute")
    resume = core.start(ResumeMemory, tags)
    core.turn()
    pause = core.start(Pause, "drain")
    core.turn()
    assert {resume, pause}.isdisjoint(core.link.replies)
    core.settle()
    core.answer(resume)
    core.answer(pause)
    assert core.finish_types(1) == ["length"] and core.status().paused == "drain"


def test_weights_keep_version_and_epoch_through_a_release() -> None:
    core = core_over()
    update(core, "v1")
    before = core.status()
    core.call(ReleaseMemory)
    core.call(ResumeMemory)
    after = core.status()
    assert (after.version, after.epoch, after.state) == (before.version, before.epoch, "ready") == ("v1", 1, "ready")


def test_the_folder_brings_back_only_what_it_brought() -> None:
    executor = TurningExecutor()
    core = core_over(executor, keep_weights_copy=False)
    core.call(ReleaseMemory)
    assert core.refused(ResumeMemory, (), "copy").field == "restore"
    core.call(ResumeMemory, (), "disk")
    assert core.status().state == "ready" and executor.done[-1][2] == "disk"
    update(core)
    core.call(ReleaseMemory)
    error = core.refused(ResumeMemory, (), "disk")
    assert (error.code, error.field) == ("UpdateConflictError", "restore")
    core.call(ResumeMemory, (), "await")
    core.call(ReleaseMemory)
    assert core.refused(ResumeMemory, (), "disk").field == "restore"  # there were none when they were released
    core.call(ResumeMemory)
    assert core.status().state == "needs_weights"


def test_the_folder_does_not_bring_back_what_was_not_there() -> None:
    """Nor has any update come between."""
    core = core_over(keep_weights_copy=False)
    for restore in ("await", "disk"):
        core.call(ReleaseMemory)
        if restore == "disk":
            assert core.refused(ResumeMemory, (), restore).field == "restore"
        core.call(ResumeMemory, (), "await")
    assert core.status().state == "needs_weights"


def test_a_copy_is_made_of_whole_weights_only() -> None:
    executor = TurningExecutor()
    core = core_over(executor)
    core.call(WeightsChecker, "reset_tensors", kind=dict)
    core.call(ReleaseMemory)
    assert executor.done[-1][2] == ""
    core.call(ResumeMemory)
    assert core.status().state == "needs_weights"


def test_calls_are_done_one_after_the_other() -> None:
    executor = TurningExecutor(3)
    core = core_over(executor)
    calls = [core.start(ReleaseMemory, ()), core.start(ResumeMemory, ("weights",)), core.start(ResumeMemory, ())]
    core.turn()
    assert not core.link.replies
    core.settle()
    for call in calls:
        core.answer(call)
    assert [(kind, tags) for kind, tags, _ in executor.done] == [
        ("release", ("cuda_graph", "kv_cache", "weights")),
        ("resume", ("weights",)),
        ("resume", ("cuda_graph", "kv_cache")),
    ]
    core.submit(request(1))
    core.settle()
    assert core.finish_types(1) == ["length"]


@pytest.mark.parametrize("how", ["late", "given up"])
@pytest.mark.parametrize("is_begun", [False, True])
def test_a_release_that_nobody_waits_for_leaves_all_as_it_was(how: str, is_begun: bool) -> None:
    executor = TurningExecutor(5)
    core = core_over(executor)
    before = [] if is_begun else [core.start(ResumeMemory, ()), core.start(ReleaseMemory, ("kv_cache",))]
    release = core.start(ReleaseMemory, ("weights",), "abort", deadline=core.clock.now + 5.0)
    core.turn(2)
    if how == "late":
        core.clock.now += 5.0
    else:
        core.start(GiveUp, release)
    core.settle()
    assert core.error(release).code == "DeadlineError"
    for call in before:
        core.answer(call)
    core.call(ResumeMemory)
    assert core.status().state == "ready" and core.status().version == "default"
    assert ("release", ("weights",), "copy") not in executor.done
    core.submit(request(1))
    core.settle()
    assert core.finish_types(1) == ["length"]


@pytest.mark.parametrize("problem", [UnavailableError("no room", field="tags"), RuntimeError("a bug")])
def test_a_resume_that_fails_leaves_all_released_and_may_be_tried_again(problem: Exception) -> None:
    executor = TurningExecutor()
    core = core_over(executor)
    core.call(ReleaseMemory)
    core.submit(request(1))
    executor.problem = problem
    error = core.refused(ResumeMemory)
    assert error.code == ("UnavailableError" if isinstance(problem, UnavailableError) else "InternalError")
    assert core.status().released == tuple(sorted(MEMORY_TAGS)) and core.finish(1) is None
    assert executor.examined == [problem] * isinstance(problem, RuntimeError)  # which may be a device's
    executor.problem = None
    core.call(ResumeMemory)
    core.settle()
    assert core.finish_types(1) == ["length"] and executor.done[-1][2] == "copy"


@pytest.mark.parametrize("problem", [UnavailableError("no room", field="tags"), RuntimeError("a bug")])
def test_graphs_that_cannot_come_back_stop_nobody(problem: Exception) -> None:
    executor = TurningExecutor()
    core = core_over(executor)
    core.submit(request(1, max_new_tokens=20))
    core.turn(3)
    core.call(ReleaseMemory, ("cuda_graph",))
    executor.problem = problem
    core.refused(ResumeMemory)
    core.settle()
    assert core.finish_types(1) == ["length"] and core.status().released == ("cuda_graph",)


@pytest.mark.parametrize("how", ["late", "given up", "shut down"])
def test_of_calls_that_wait_each_has_its_own_end(how: str) -> None:
    core = core_over(TurningExecutor(4))
    before = core.start(ReleaseMemory, ("kv_cache",))
    ended = core.start(ResumeMemory, ("kv_cache",), deadline=core.clock.now + 5.0)
    after = core.start(ReleaseMemory, ("weights",), deadline=core.clock.now + 90.0)
    core.turn()
    assert core.loop._time_to_deadline() <= 5.0
    if how == "shut down":
        core.start(Shutdown)
        core.turn()
        assert [core.error(call).code for call in (before, ended, after)] == ["ShutdownError"] * 3
        return
    if how == "late":
        core.clock.now += 5.0
    else:
        core.start(GiveUp, ended)
    core.settle()
    core.answer(before)
    assert core.error(ended).code == "DeadlineError"
    core.answer(after)
    assert core.status().released == ("kv_cache", "weights")


def test_a_turn_does_as_much_as_it_has_time_for() -> None:
    core = core_over(TurningExecutor(400, slice_seconds=0.0))
    release = core.start(ReleaseMemory)
    core.turn(200)
    core.answer(release)


def test_weights_that_are_half_old_stay_so_when_a_release_of_theirs_fails() -> None:
    core, tensors = core_over(TurningExecutor(5)), new_tensors(7.0)
    session = core.begin(tensors, mode="inplace")
    core.stage(session, tensors, ["k.weight"])
    core.call(AbortUpdate, session)
    assert core.status().state == "poisoned"
    release = core.start(ReleaseMemory, ("weights",), deadline=core.clock.now + 5.0)
    core.turn(2)
    assert core.status().state == "released"
    core.clock.now += 5.0
    core.settle()
    assert core.error(release).code == "DeadlineError" and core.status().state == "poisoned"


def test_a_pause_and_a_release_end_by_their_own() -> None:
    core = core_over()
    core.submit(request(1, max_new_tokens=20))
    core.turn(3)
    core.call(Pause, "keep")
    core.call(ReleaseMemory, (), "recompute")
    core.call(Resume)
    core.settle()
    assert core.finish(1) is None
    core.call(Pause, "keep")
    core.call(ResumeMemory)
    core.settle()
    assert core.finish(1) is None
    core.call(Resume)
    core.settle()
    assert core.tokens(1) == list(range(6, 26))


def test_a_device_that_cannot_give_memory_back_names_the_setting_and_aborts_nobody() -> None:
    resolved = tiny_config()
    assert resolved.memory_is_kept == ""
    core = core_over()
    core.loop.replica.memory._settings = type(core.loop.replica.memory._settings)("it was not asked for", False)
    core.submit(request(1, max_new_tokens=20))
    core.turn(3)
    error = core.refused(ReleaseMemory, ())
    assert (error.code, error.field) == ("ConfigError", "memory_saver")
    core.call(ReleaseMemory, ("cuda_graph",))
    core.call(FlushCache, kind=int)
    core.settle()
    assert core.finish_types(1) == ["length"]
