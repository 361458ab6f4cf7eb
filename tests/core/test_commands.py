"""What each command means to a replica, one by one."""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
import torch

from headrace.cache import Match, Namespace
from headrace.core.fake_executor import FREE_LOGPROB, FreeExecutor, free_tokens
from headrace.core.faults import StepError
from headrace.core.service import run_core
from headrace.ipc import SharedBuffer
from headrace.scheduler import Scheduler
from headrace.scheduler.roster import Roster
from headrace.scheduler.sequence import Sequence
from headrace.types.foreign import Payload
from headrace.types.messages import (
    Abort,
    AbortUpdate,
    BeginUpdate,
    Command,
    CommitUpdate,
    CoreStatus,
    DescribeWeights,
    Digest,
    Discard,
    ExtendUpdate,
    Finished,
    FlushCache,
    FreezeGc,
    GetWeight,
    GiveUp,
    JoinGroup,
    LeaveGroup,
    Pause,
    Profile,
    Receive,
    ReleaseMemory,
    Resume,
    ResumeMemory,
    SetVersion,
    Shutdown,
    SlowDown,
    Stage,
    StagePayload,
    UpdateFromDisk,
    WeightPart,
    WeightsChecker,
)
from headrace.types.plan import StepResult
from headrace.types.profile import ProfileTerms
from headrace.types.request import Request
from headrace.types.sampling_params import LogprobOptions
from headrace.types.weights import SEPARATE, BufferEntry, BufferRef
from tests.core.harness import VOCAB_SIZE, Core, digest_of, manifest_of, new_tensors, request


def test_a_request_runs_to_its_end() -> None:
    core = Core()
    core.submit(request(1, [1, 2, 3], 4))
    core.settle()
    assert core.tokens(1) == [4, 5, 6, 7]  # the free executor's token at position p is p + 1
    assert core.logprobs(1) == [FREE_LOGPROB] * 4
    assert core.spans(1) == [("default", 4)]
    assert core.finish_types(1) == ["length"]


@pytest.mark.parametrize("overlap_depth", [0, 1, 3])
def test_tokens_do_not_depend_on_the_overlap(overlap_depth: int) -> None:
    core = Core(overlap_depth=overlap_depth)
    core.submit(*(request(handle, range(1, handle + 2), 12, stop_token_ids=(12,)) for handle in range(1, 12)))
    core.settle()
    for handle in range(1, 12):
        first = handle + 2  # the prompt's length + 1
        assert core.tokens(handle) == (list(range(first, 13)) if first <= 12 else list(range(first, first + 12)))
        finish = core.finish(handle)
        assert finish is not None
        assert (finish.type, finish.matched) == (("stop", 12) if first <= 12 else ("length", None))


class SeveralTokens(FreeExecutor):
    """Samples 1, 2 or 3 tokens a row, by its position."""

    def collect(self) -> StepResult:
        plan = self._plans[0]
        first = (plan.row_starts + plan.row_lengths)[plan.row_samples]
        token_ids = free_tokens((first[:, None] + np.arange(3)).astype(np.int32), VOCAB_SIZE)
        logprobs = np.full(token_ids.shape, FREE_LOGPROB, np.float32)
        result = super().collect()
        return msgspec.structs.replace(result, token_ids=token_ids, logprobs=logprobs, num_tokens=1 + first % 3)


@pytest.mark.parametrize("overlap_depth", range(4))
def test_a_step_may_bring_several_tokens_a_row(overlap_depth: int) -> None:
    core = Core(SeveralTokens(VOCAB_SIZE), overlap_depth=overlap_depth, max_num_batched_tokens=16)
    for handle in range(1, 12):
        core.submit(request(handle, range(1, handle + 2), 12, deliver_every=handle % 3, stop_token_ids=(20,)))
    core.settle()
    for handle in range(1, 12):
        assert core.tokens(handle) == list(range(handle + 2, min(handle + 14, 21)))
        assert core.spans(handle) == [("default", len(core.tokens(handle)))]
    assert core.status().metrics["num_invariant_breaches"] == 0


def test_streamed_deltas_add_up() -> None:
    core = Core()
    core.submit(request(1, [1, 2], 7, deliver_every=2))
    core.settle()
    assert core.tokens(1) == [3, 4, 5, 6, 7, 8, 9]
    assert len(core.link.deltas[1]) >= 4
    assert [delta.finish is not None for delta in core.link.deltas[1]][-2:] == [False, True]


def test_prompt_logprobs_come_with_the_side_outputs() -> None:
    core = Core()
    options = LogprobOptions(prompt_start=0, num_top=2, token_ids=(9,))
    core.submit(request(1, [1, 2, 3, 4, 5], 0, logprobs=options))
    core.settle()
    (delta,) = core.link.deltas[1]
    assert len(delta.prompt_logprobs) == 4 * 5
    assert len(delta.prompt_extras.top_ids) == 4 * 2 * 5 and len(delta.prompt_extras.asked_logprobs) == 4 * 5
    assert core.finish_types(1) == ["length"]


def test_a_bad_request_is_answered_and_its_neighbours_run() -> None:
    core = Core()
    core.submit(request(1), request(2, []), request(3, [VOCAB_SIZE]), request(4))
    core.settle()
    assert core.finish_types(1, 2, 3, 4) == ["length", "error", "error", "length"]
    finish = core.finish(3)
    assert finish is not None and finish.error is not None
    assert finish.error.code == "RequestError"


def test_a_full_queue_refuses_with_a_typed_error() -> None:
    core = Core(max_waiting_requests=2, max_running_requests=1)
    core.submit(*(request(handle) for handle in range(1, 5)))
    core.settle()
    assert core.finish_types(1, 2, 3, 4) == ["length", "length", "error", "error"]
    finish = core.finish(4)
    assert finish is not None and finish.error is not None and finish.error.status == 503


def test_abort_answers_at_once_with_what_there_is() -> None:
    core = Core()
    core.submit(request(1, max_new_tokens=100), request(2, max_new_tokens=100), request(3, max_new_tokens=100))
    core.turn(5)
    core.send(Abort((1, 99), "enough"))
    core.turn()
    finish = core.finish(1)
    assert finish is not None
    assert (finish.type, finish.message) == ("abort", "enough")
    assert 4 <= len(core.tokens(1)) <= 6
    core.send(Abort((1, 2, 3)))
    core.settle()
    assert core.finish_types(2, 3) == ["abort", "abort"]
    assert core.status().num_used_tokens == 0


def test_finished_frees_without_an_answer() -> None:
    core = Core()
    core.submit(request(1, max_new_tokens=100))
    core.turn(3)
    core.send(Finished((1, 2)))
    core.settle()
    assert 1 not in core.link.deltas
    assert core.status().num_used_tokens == 0


def test_status_counts() -> None:
    core = Core()
    core.submit(request(1, max_new_tokens=50), request(2, max_new_tokens=50))
    core.turn(4)
    core.clock.now += 5.0
    status = core.status()
    assert (status.state, status.version, status.epoch) == ("ready", "default", 0)
    assert (status.paused, status.updating) == ("", False)
    assert (status.num_running, status.num_waiting) == (2, 0)
    assert status.num_used_tokens > 0
    assert status.metrics["uptime_s"] == 5.0
    assert status.metrics["executing_s"] > 0 and status.metrics["deciding_s"] > 0
    own = {"num_updates", "last_update_pause_ms", "staged_steps", "num_gemm_calls", "idle_s"}
    assert own | {"num_steps", "num_cached_tokens"} <= set(status.metrics)


def test_flush_cache_counts_pages_and_aborts_nothing() -> None:
    core = Core()
    core.submit(request(1, range(1, 41), 2))
    core.settle()
    core.submit(request(2, range(60, 70), 50))
    core.turn(3)
    assert core.call(FlushCache, kind=int) >= 10
    core.settle()
    assert core.finish_types(2) == ["length"]
    core.submit(request(3, range(1, 41), 2))
    core.settle()
    assert core.link.deltas[3][-1].num_cached_tokens == 0


def test_set_version_relabels_without_a_new_epoch() -> None:
    core = Core()
    core.submit(request(1, max_new_tokens=20))
    core.turn(5)
    core.call(SetVersion, "renamed")
    core.settle()
    spans = core.spans(1)
    assert [version for version, _ in spans] == ["default", "renamed"]
    assert sum(count for _, count in spans) == 20
    assert (core.status().version, core.status().epoch) == ("renamed", 0)
    assert core.refused(SetVersion, "").field == "version"


NOWHERE = BufferRef("/nowhere", 4096)
CALLS: dict[str, Callable[[int], Command]] = {
    "pause": lambda call_id: Pause(call_id, "keep"),
    "drain": lambda call_id: Pause(call_id, "drain"),
    "resume": Resume,
    "begin": lambda call_id: BeginUpdate(call_id, "late", manifest_of(new_tensors(1.0))),
    "extend": lambda call_id: ExtendUpdate(call_id, 1, manifest_of(new_tensors(1.0))),
    "payload": lambda call_id: StagePayload(call_id, 1, Payload((), ()), ()),
    "join": lambda call_id: JoinGroup(call_id, "late", "127.0.0.1", 9, 1, 2, "gloo"),
    "leave": lambda call_id: LeaveGroup(call_id, "late"),
    "receive": lambda call_id: Receive(call_id, 1, "late", ()),
    "discard": lambda call_id: Discard(call_id, "late", (), SEPARATE, 1.0),
    "release": lambda call_id: ReleaseMemory(call_id),
    "take": lambda call_id: ResumeMemory(call_id),
    "stage": lambda call_id: Stage(call_id, 1, NOWHERE, (BufferEntry(0, 0),)),
    "commit": lambda call_id: CommitUpdate(call_id, 1),
    "abort": lambda call_id: AbortUpdate(call_id, 1),
    "disk": lambda call_id: UpdateFromDisk(call_id, "/nowhere", "late"),
    "version": lambda call_id: SetVersion(call_id, "late"),
    "read": lambda call_id: GetWeight(call_id, "k.weight", NOWHERE),
    "digest": Digest,
    "describe": DescribeWeights,
    "reset": lambda call_id: WeightsChecker(call_id, "reset_tensors"),
    "flush": FlushCache,
    "slow": lambda call_id: SlowDown(call_id, 5.0),
    "freeze": FreezeGc,
    "profile": lambda call_id: Profile(call_id, ProfileTerms()),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("how", ["late", "given up", "given up later"])
def test_a_call_that_nobody_waits_for_is_not_begun(name: str, how: str) -> None:
    """A long step was in the way, or the caller went away before it was over."""
    core = Core()
    before = core.status()
    command = CALLS[name](77)
    if how == "late":
        core.send(msgspec.structs.replace(command, deadline=core.clock.now))
    elif how == "given up":
        core.send(command, GiveUp(78, 77))
    else:
        core.call(GiveUp, 77)  # it was answered long ago, or never came
        core.send(msgspec.structs.replace(command, deadline=core.clock.now - 1.0))
    core.turn(3)
    assert core.error(77).code == "DeadlineError" and core.error(77).retryable
    after = core.status()
    for field in ("state", "version", "epoch", "paused", "updating"):
        assert getattr(after, field) == getattr(before, field)


def test_weights_are_read_back_by_name() -> None:
    core = Core()
    with SharedBuffer.create(4096) as buffer:
        found = core.call(GetWeight, "k.weight", buffer.ref, kind=WeightPart)
        assert (found.info.name, found.info.shape, found.info.dtype) == ("k.weight", (4, 4), "float32")
        live = core.store.live["qkv"][4:8]
        assert (found.num_bytes, found.total) == (64, 64)
        assert bytes(buffer.view[:64]) == live.numpy().tobytes()
        found = core.call(GetWeight, "k.weight", buffer.ref, 16, 3, kind=WeightPart)
        assert (found.num_bytes, found.total) == (32, 48)
        assert bytes(buffer.view[:32]) == live[1:3].numpy().tobytes()
        assert core.call(GetWeight, "lm_head.weight", buffer.ref, kind=WeightPart).info.shape == (8, 4)
        assert core.refused(GetWeight, "nothing", buffer.ref).code == "NotFoundError"
        assert core.refused(GetWeight, "k.weight", buffer.ref, 2).field == "start"
        assert core.refused(GetWeight, "k.weight", buffer.ref, 80).field == "start"
    assert core.refused(GetWeight, "k.weight", BufferRef("/nowhere", 64)).field == "buffer"


def test_digest_sees_one_flipped_bit() -> None:
    core = Core()
    before = core.call(Digest, kind=dict[str, str])
    assert before["norm.weight"] == digest_of(core.store.live["norm"])
    core.store.live["qkv"].view(torch.int32)[5, 2] ^= 1
    after = core.call(Digest, kind=dict[str, str])
    assert [name for name in before if before[name] != after[name]] == ["k.weight"]


def test_the_weights_checker_proves_that_an_update_writes_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="headrace")
    core = Core()
    assert core.refused(WeightsChecker, "compare").code == "UpdateConflictError"
    assert core.refused(WeightsChecker, "sing").field == "action"
    original = {name: core.store.read(name) for name in core.store.weight_map.rules_by_name}
    core.call(WeightsChecker, "snapshot", kind=dict[str, str])
    assert core.call(WeightsChecker, "compare", kind=dict[str, str]) == {}
    core.submit(request(1, max_new_tokens=100))
    core.turn(3)
    core.call(WeightsChecker, "reset_tensors", kind=dict[str, str])
    assert core.finish_types(1) == ["error"]
    told = [record.levelname for record in caplog.records if "weights are needs_weights" in record.message]
    assert told == ["INFO"], "it was asked for"
    assert set(core.call(WeightsChecker, "compare", kind=dict[str, str])) >= {"embed.weight", "q.weight"}
    assert (core.status().state, core.status().version) == ("needs_weights", "")
    assert core.refused(Digest).code == core.refused(WeightsChecker, "snapshot").code == "NeedsWeightsError"
    assert core.refused(SetVersion, "v9").code == "NeedsWeightsError"
    core.submit(request(2))
    core.turn()
    finish = core.finish(2)
    assert finish is not None and finish.error is not None and finish.error.status == 503
    session = core.begin(original)
    assert core.refused(WeightsChecker, "reset_tensors").code == "UpdateConflictError"
    core.stage(session, original)
    core.call(CommitUpdate, session, kind=dict)
    assert core.call(WeightsChecker, "compare", kind=dict[str, str]) == {}
    core.submit(request(3))
    core.settle()
    assert core.finish_types(3) == ["length"]


def test_shutdown_answers_everything_and_ends() -> None:
    core = Core()
    core.submit(request(1, max_new_tokens=100), request(2, max_new_tokens=100))
    core.turn(3)
    tensors = new_tensors(2.0)
    session = core.begin(tensors)
    core.stage(session, tensors)
    commit = core.start(CommitUpdate, session)  # drains: waits for the two requests
    core.turn()
    call_id = core.start(Shutdown)
    core.loop.run()
    assert core.finish_types(1, 2) == ["abort", "abort"]
    assert core.error(commit).code == "ShutdownError"
    assert core.link.outputs[-1] is core.link.replies[call_id]


class BreakingExecutor(FreeExecutor):
    """Fails the steps it is told to."""

    def __init__(self) -> None:
        super().__init__(VOCAB_SIZE)
        self.broken: set[int] = set()

    def collect(self) -> StepResult:
        step_id = self._plans[0].step_id
        if step_id in self.broken:
            self._plans.popleft()
            raise StepError(step_id, MemoryError("no room"))
        return super().collect()


class CrashingExecutor(FreeExecutor):
    """Raises what an executor may not raise."""

    def collect(self) -> StepResult:
        if self.num_executed == 5:
            raise KeyError("a bug")
        return super().collect()


def test_a_crash_of_the_loop_answers_every_request() -> None:
    core = Core(CrashingExecutor(VOCAB_SIZE), max_running_requests=2)
    core.submit(*(request(handle) for handle in range(1, 5)))
    assert run_core(core.loop, core.link) == 1
    assert core.finish_types(1, 2, 3, 4) == ["error"] * 4
    finish = core.finish(4)
    assert finish is not None and finish.error is not None
    assert "crashed" in finish.error.message
    assert core.link.is_closed


def test_a_core_whose_front_is_gone_ends() -> None:
    core = Core()
    core.submit(request(1))
    core.turn()
    core.link.close()
    assert run_core(core.loop, core.link) == 0


def test_a_request_that_the_scheduler_chokes_on_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    real_add = Scheduler.add

    def add(scheduler: Scheduler, each: Request, now: float) -> None:
        real_add(scheduler, each, now / (each.handle - 2))

    monkeypatch.setattr(Scheduler, "add", add)
    core = Core()
    core.submit(request(1), request(2), request(3))
    core.settle()
    assert core.finish_types(1, 2, 3) == ["length", "error", "length"]
    finish = core.finish(2)
    assert finish is not None and "ZeroDivisionError" in finish.message


@pytest.mark.parametrize("overlap_depth", [0, 1, 3])
def test_an_abort_that_breaks_the_books_harms_nobody_else(overlap_depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core(overlap_depth=overlap_depth)
    core.submit(*(request(handle, max_new_tokens=20) for handle in range(1, 5)))
    core.turn(4)
    real_end = Roster.end

    def end(roster: Roster, sequence: Sequence) -> None:
        real_end(roster, sequence)
        assert sequence.handle != 2, "pages do not add up"

    monkeypatch.setattr(Roster, "end", end)
    core.send(Abort((3, 2)))
    core.submit(request(5))
    core.settle()
    assert core.finish_types(1, 2, 3, 4, 5) == ["length", "abort", "abort", "length", "length"]
    assert core.tokens(1) == core.tokens(4) == list(range(6, 26))
    assert core.tokens(2) == core.tokens(3) == list(range(6, 6 + len(core.tokens(2))))
    status = core.status()
    assert status.metrics["num_invariant_breaches"] == 1 and status.num_used_tokens == 0


@pytest.mark.parametrize("guilty", [{3}, {1, 2, 3, 4, 5, 6}])
def test_a_request_that_cannot_be_planned_is_found(guilty: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core(max_running_requests=4, overlap_depth=1)
    core.submit(*(request(handle, max_new_tokens=20) for handle in range(1, 7)))
    real_admit = Roster.admit

    def admit(roster: Roster, sequence: Sequence, namespace: Namespace, match: Match) -> int:
        slot = real_admit(roster, sequence, namespace, match)
        assert sequence.handle not in guilty, "pages do not add up"
        return slot

    monkeypatch.setattr(Roster, "admit", admit)
    core.settle()
    for handle in range(1, 7):
        assert core.finish_types(handle) == ["error" if handle in guilty else "length"]
        assert handle in guilty or core.tokens(handle) == list(range(6, 26))
    status = core.status()
    assert status.num_used_tokens == 0 and status.metrics["num_isolated_failures"] == len(guilty)


@pytest.mark.parametrize("overlap_depth", [0, 1, 3])
def test_a_step_that_fails_once_costs_nobody_anything(overlap_depth: int) -> None:
    executor = BreakingExecutor()
    core = Core(executor, overlap_depth=overlap_depth, max_running_requests=2)
    executor.broken = {4, 9, 10}
    core.submit(*(request(handle, max_new_tokens=30) for handle in range(1, 6)))
    core.settle()
    assert core.finish_types(1, 2, 3, 4, 5) == ["length"] * 5
    assert all(core.tokens(handle) == list(range(6, 36)) for handle in range(1, 6))
    core.call(Resume)
    status = core.status()
    assert status.num_used_tokens == 0 and 2 <= status.metrics["num_failed_steps"] <= 3


@pytest.mark.parametrize("overlap_depth", [0, 1, 3])
def test_a_device_that_executes_nothing_any_more_answers_everybody(overlap_depth: int) -> None:
    executor = BreakingExecutor()
    core = Core(executor, overlap_depth=overlap_depth, max_running_requests=4)
    executor.broken = set(range(4, 10_000))
    core.submit(*(request(handle, max_new_tokens=30) for handle in range(1, 8)))
    core.settle()
    assert core.finish_types(*range(1, 8)) == ["error"] * 7
    finish = core.finish(1)
    assert finish is not None and finish.error is not None
    assert finish.error.code == "InternalError" and "no room" in finish.error.message
    executor.broken.clear()
    core.submit(request(8))
    core.settle()
    assert core.finish_types(8) == ["length"] and core.status().num_used_tokens == 0
    metrics = core.status().metrics
    assert metrics["num_isolated_failures"] == 7 and metrics["num_failed_steps"] < 60


class LyingExecutor(FreeExecutor):
    """Answers its fifth plan with a result of another step, which is a bug and not a fault."""

    def collect(self) -> StepResult:
        result = super().collect()
        return msgspec.structs.replace(result, step_id=99) if self.num_executed == 5 else result


@pytest.mark.parametrize("overlap_depth", [0, 1, 3])
def test_a_result_that_cannot_be_applied_ends_its_requests_only(overlap_depth: int) -> None:
    core = Core(LyingExecutor(VOCAB_SIZE), overlap_depth=overlap_depth, max_running_requests=2)
    core.submit(*(request(handle) for handle in range(1, 5)))
    core.settle()
    assert core.finish_types(1, 2, 3, 4) == ["error", "error", "length", "length"]
    finish = core.finish(2)
    assert finish is not None and finish.error is not None and "invariant" in finish.error.message
    assert core.tokens(3) == core.tokens(4) == list(range(6, 16))
    status = core.status()
    assert status.metrics["num_invariant_breaches"] == 1 and status.num_used_tokens == 0


def test_an_answer_brings_the_status_that_was_asked_for() -> None:
    """As it is once the command is done, also where that is later, or it is refused."""
    core = Core()

    def status_of(call_id: int) -> CoreStatus | None:
        core.until(lambda: call_id in core.link.replies)
        status = core.link.replies[call_id].status
        return msgspec.msgpack.decode(status, type=CoreStatus) if status else None

    paused = status_of(core.start(lambda i: Pause(i, "keep", wants_status=True)))
    assert paused is not None and paused.paused == "keep"
    refused = status_of(core.start(lambda i: AbortUpdate(i, 5, wants_status=True)))
    assert refused is not None and refused.paused == "keep"
    resumed = status_of(core.start(lambda i: Resume(i, wants_status=True)))
    assert resumed is not None and resumed.paused == ""
    assert status_of(core.start(FlushCache)) is None
