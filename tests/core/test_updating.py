"""The weight transaction on one replica: modes, policies for requests in flight, refusals, deadlines, poisoning."""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from headrace.core.executor import LocalExecutor
from headrace.core.fake_executor import FreeExecutor
from headrace.ipc import SharedBuffer
from headrace.types.messages import (
    AbortUpdate,
    BeginUpdate,
    CommitUpdate,
    Digest,
    GiveUp,
    Pause,
    Resume,
    Shutdown,
    Stage,
    UpdateFromDisk,
)
from headrace.types.weights import BufferEntry, BufferRef, InFlight, TensorInfo, UpdateReport
from headrace.weights.boxes import Box
from headrace.weights.staging import Enqueued
from headrace.weights.store import WeightStore
from headrace.weights.weight_map import ParamSpec, Piece, WeightMap, WeightRule, whole_rows
from tests.core.harness import (
    VOCAB_SIZE,
    Core,
    bucket_of,
    digest_of,
    manifest_of,
    new_tensors,
    request,
    tiny_store,
    tiny_weight_map,
)

MODES = ["shadow", "inplace"]
NEW = new_tensors(3.0)
NUM_ELEMENTS = sum(tensor.numel() for tensor in NEW.values())


def check_live(core: Core, tensors: dict[str, torch.Tensor]) -> None:
    assert core.call(Digest, kind=dict[str, str]) == {name: digest_of(tensor) for name, tensor in tensors.items()}


def update(core: Core, tensors: dict[str, torch.Tensor], version: str = "v1", **fields: Any) -> UpdateReport:
    session = core.begin(tensors, version, **fields)
    core.stage(session, tensors)
    report = core.call(CommitUpdate, session, kind=UpdateReport)
    assert isinstance(report, UpdateReport)
    return report


@pytest.mark.parametrize("mode", MODES)
def test_an_update_replaces_weights_version_and_epoch(mode: str) -> None:
    core = Core()
    report = update(core, NEW, mode=mode)
    assert (report.version, report.epoch, report.mode) == ("v1", 1, mode)
    assert (report.num_tensors, report.num_bytes, report.num_aborted) == (5, 4 * NUM_ELEMENTS, 0)
    assert report.pause_ms >= 0.0
    check_live(core, NEW)
    status = core.status()
    assert (status.state, status.version, status.epoch, status.updating) == ("ready", "v1", 1, False)
    assert status.metrics["num_updates"] == 1.0
    assert status.metrics["last_update_pause_ms"] == report.pause_ms
    again = update(core, new_tensors(4.0), mode=mode)
    assert again.epoch == 2  # the label repeats, the epoch does not


@pytest.mark.parametrize("overlap_depth", [0, 1, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", ["keep", "recompute"])
def test_one_request_bears_both_versions(mode: str, policy: InFlight, overlap_depth: int) -> None:
    core = Core(overlap_depth=overlap_depth)
    core.submit(request(1, max_new_tokens=60))
    core.turn(8)
    update(core, NEW, mode=mode, in_flight=policy)
    core.settle()
    assert [version for version, _ in core.spans(1)] == ["default", "v1"]
    assert core.tokens(1) == list(range(6, 66))
    assert core.link.deltas[1][-1].num_preemptions == (1 if policy == "recompute" else 0)
    check_live(core, NEW)


@pytest.mark.parametrize("mode", MODES)
def test_drain_finishes_what_started_under_the_old_weights(mode: str) -> None:
    core = Core(max_running_requests=2)
    core.submit(request(1, max_new_tokens=30), request(2, max_new_tokens=40), request(3, max_new_tokens=5))
    core.turn(4)
    report = update(core, NEW, mode=mode)
    assert core.finish_types(1, 2, 3) == ["length", "length", None]
    assert report.num_aborted == 0
    core.settle()
    assert core.spans(1) == [("default", 30)]
    assert core.spans(2) == [("default", 40)]
    assert core.spans(3) == [("v1", 5)]


@pytest.mark.parametrize("mode", MODES)
def test_abort_returns_partials_before_the_weights_change(mode: str) -> None:
    core = Core()
    core.submit(request(1, max_new_tokens=60), request(2, max_new_tokens=60))
    core.turn(5)
    report = update(core, NEW, mode=mode, in_flight="abort")
    assert report.num_aborted == 2
    assert core.finish_types(1, 2) == ["abort", "abort"]
    assert [version for version, _ in core.spans(1)] == ["default"]


@pytest.mark.parametrize("mode", MODES)
def test_old_kv_never_serves_a_new_request(mode: str) -> None:
    core = Core()
    prompt = list(range(1, 41))
    core.submit(request(1, prompt, 2))
    core.settle()
    core.submit(request(2, prompt, 60), request(3, [*prompt, 50], 60))
    core.turn(4)
    update(core, NEW, mode=mode, in_flight="keep")
    core.settle()
    assert core.link.deltas[2][-1].num_cached_tokens > 0
    core.submit(request(4, prompt, 2))
    core.settle()
    assert core.link.deltas[4][-1].num_cached_tokens == 0
    core.submit(request(5, prompt, 2))
    core.settle()
    assert core.link.deltas[5][-1].num_cached_tokens > 0


def test_steps_complete_while_a_shadow_is_staged() -> None:
    core = Core()
    core.submit(*(request(handle, max_new_tokens=100) for handle in range(1, 9)))
    core.turn(4)
    session = core.begin(NEW, mode="shadow", in_flight="keep")
    before = core.status().metrics["num_steps"]
    for name in NEW:
        core.stage(session, NEW, [name])
        core.turn(3)
    core.call(CommitUpdate, session, kind=UpdateReport)
    metrics = core.status().metrics
    assert metrics["staged_steps"] >= 15
    assert metrics["num_steps"] >= before + metrics["staged_steps"]
    core.settle()
    assert all([version for version, _ in core.spans(handle)] == ["default", "v1"] for handle in range(1, 9))


def test_no_step_runs_while_weights_are_written_in_place() -> None:
    core = Core()
    core.submit(request(1, max_new_tokens=100, deliver_every=1))
    core.turn(4)
    session = core.begin(NEW, mode="inplace", in_flight="keep")
    core.turn(4)
    core.stage(session, NEW, ["k.weight"])
    before = core.tokens(1)
    core.turn(10)
    core.submit(request(2))
    core.turn(10)
    assert core.tokens(1) == before
    assert core.refused(Resume).message.count("q.weight") == 1
    assert core.finish_types(2) == [None]
    core.stage(session, NEW, [name for name in NEW if name != "k.weight"])
    core.call(CommitUpdate, session, kind=UpdateReport)
    core.settle()
    assert core.finish_types(1, 2) == ["length", "length"]
    assert core.spans(2) == [("v1", 10)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pause_mode", ["keep", "recompute", "abort", "drain"])
def test_while_paused_an_update_is_applied_at_once(mode: str, pause_mode: str) -> None:
    core = Core()
    core.submit(request(1, max_new_tokens=40))
    core.turn(5)
    core.call(Pause, pause_mode)
    core.submit(request(2, max_new_tokens=5))
    core.turn()
    update(core, NEW, mode=mode)  # "drain" cannot wait for what is paused
    assert core.status().paused == pause_mode
    check_live(core, NEW)
    core.call(Resume)
    core.settle()
    assert core.spans(2) == [("v1", 5)]
    if pause_mode in ("keep", "recompute"):
        assert [version for version, _ in core.spans(1)] == ["default", "v1"]
        assert core.tokens(1) == list(range(6, 46))
    else:
        assert [version for version, _ in core.spans(1)] == ["default"]


def test_a_pause_ends_the_wait_of_a_draining_commit() -> None:
    core = Core()
    core.submit(request(1, max_new_tokens=200))
    core.turn(3)
    session = core.begin(NEW)
    core.stage(session, NEW)
    commit = core.start(CommitUpdate, session)
    core.turn(5)
    assert commit not in core.link.replies
    core.call(Pause, "keep")
    core.until(lambda: commit in core.link.replies)
    core.answer(commit, UpdateReport)
    core.call(Resume)
    core.settle()
    assert [version for version, _ in core.spans(1)] == ["default", "v1"]


def broken_manifests() -> dict[str, tuple[tuple[TensorInfo, ...], str]]:
    good = manifest_of(NEW)
    return {
        "missing": (good[1:], "embed.weight"),
        "unknown": ((*good, TensorInfo("extra.weight", (1,), "float32")), "extra.weight"),
        "doubled": ((*good, good[2]), "k.weight"),
        "misshapen": ((*good[:-1], TensorInfo("norm.weight", (5,), "float32")), "norm.weight"),
        "integer": ((*good[:-1], TensorInfo("norm.weight", (4,), "int64")), "norm.weight"),
    }


@pytest.mark.parametrize("name", list(broken_manifests()))
def test_a_wrong_manifest_is_refused_and_nothing_is_touched(name: str) -> None:
    manifest, guilty = broken_manifests()[name]
    core = Core()
    before = core.call(Digest, kind=dict[str, str])
    error = core.refused(BeginUpdate, "v1", manifest)
    assert (error.code, error.field) == ("WeightUpdateError", guilty)
    assert core.call(Digest, kind=dict[str, str]) == before
    assert (core.status().state, core.status().version) == ("ready", "default")
    update(core, NEW)


def test_a_second_session_is_refused_while_one_is_open() -> None:
    core = Core()
    session = core.begin(NEW)
    assert core.refused(BeginUpdate, "v2", manifest_of(NEW)).code == "UpdateConflictError"
    assert core.refused(UpdateFromDisk, "/nowhere", "v2").code == "UpdateConflictError"
    assert core.refused(CommitUpdate, session + 1).code == "UpdateConflictError"
    assert core.refused(AbortUpdate, session + 1).code == "UpdateConflictError"
    core.call(AbortUpdate, session)
    assert core.refused(AbortUpdate, session).code == "UpdateConflictError"
    update(core, NEW)


def test_a_commit_with_tensors_missing_names_them_and_stays_open() -> None:
    core = Core()
    session = core.begin(NEW)
    core.stage(session, NEW, ["q.weight", "v.weight"])
    error = core.refused(CommitUpdate, session)
    assert (error.code, error.field) == ("WeightUpdateError", "embed.weight")
    core.stage(session, NEW, ["embed.weight", "k.weight", "norm.weight"])
    assert core.refused(Stage, session, *bucket("q.weight", 0)).message.count("twice") == 1
    core.call(CommitUpdate, session, kind=UpdateReport)
    check_live(core, NEW)


def bucket(name: str, offset: int) -> tuple[BufferRef, tuple[BufferEntry, ...]]:
    return BufferRef("/proc/self/fd/0", 1 << 12), (BufferEntry(list(NEW).index(name), offset),)


@pytest.mark.parametrize(
    ("ref", "entries", "code"),
    [
        (BufferRef("/nowhere", 4096), (BufferEntry(0, 0),), "RequestError"),
        (BufferRef("/nowhere", 64), (BufferEntry(0, 0),), "WeightUpdateError"),
        (BufferRef("/nowhere", 4096), (BufferEntry(0, -4),), "WeightUpdateError"),
        (BufferRef("/nowhere", 4096), (BufferEntry(9, 0),), "WeightUpdateError"),
        (BufferRef("/nowhere", 4096), (BufferEntry(0, 0), BufferEntry(0, 128)), "WeightUpdateError"),
    ],
    ids=["gone", "short", "negative", "index", "doubled"],
)
def test_a_bad_bucket_is_refused_whole(ref: BufferRef, entries: tuple[BufferEntry, ...], code: str) -> None:
    core = Core()
    session = core.begin(NEW, mode="inplace")
    assert core.refused(Stage, session, ref, entries).code == code
    core.call(AbortUpdate, session)
    assert core.status().state == "ready"  # nothing had been written


@pytest.mark.parametrize("mode", MODES)
def test_a_wrong_digest_is_refused_by_name(mode: str) -> None:
    core = Core()
    manifest = list(manifest_of(NEW))
    manifest[3] = TensorInfo(manifest[3].name, manifest[3].shape, "float32", "0" * 64)
    session = core.call(BeginUpdate, "v1", tuple(manifest), mode, kind=dict)["session_id"]
    stage = core.start_stage(session, NEW)
    core.until(lambda: stage in core.link.replies)
    assert core.error(stage).field == "v.weight"
    assert core.refused(CommitUpdate, session).field == "v.weight"
    core.call(AbortUpdate, session)
    assert core.status().state == ("ready" if mode == "shadow" else "poisoned")


def test_commit_waits_for_buckets_sent_before_it() -> None:
    core = Core()
    session = core.begin(NEW)
    stage = core.start_stage(session, NEW)
    commit = core.start(CommitUpdate, session)
    core.settle()
    core.answer(stage)
    core.answer(commit, UpdateReport)
    order = [output.call_id for output in core.link.outputs if hasattr(output, "call_id")]
    assert order.index(stage) < order.index(commit)
    check_live(core, NEW)


def test_an_aborted_shadow_leaves_the_old_weights_bit_for_bit() -> None:
    core = Core()
    before = core.call(Digest, kind=dict[str, str])
    core.submit(request(1, max_new_tokens=100))
    core.turn(3)
    session = core.begin(NEW)
    core.stage(session, NEW)
    core.call(AbortUpdate, session)
    assert core.call(Digest, kind=dict[str, str]) == before
    core.settle()
    assert core.spans(1) == [("default", 100)]
    assert core.status().state == "ready"


def test_a_torn_update_in_place_poisons_and_a_full_one_heals() -> None:
    core = Core()
    core.submit(request(1, max_new_tokens=100), request(2, max_new_tokens=100))
    core.turn(5)
    session = core.begin(NEW, mode="inplace", in_flight="keep")
    core.stage(session, NEW, ["q.weight"])
    core.submit(request(3))
    core.turn()
    core.call(AbortUpdate, session)
    assert core.status().state == "poisoned"
    core.submit(request(4))
    core.turn()
    assert core.finish_types(1, 2, 3, 4) == ["error"] * 4
    for handle in (1, 4):
        finish = core.finish(handle)
        assert finish is not None and finish.error is not None
        assert finish.error.code == "PoisonedError"
    assert len(core.tokens(1)) >= 3  # what it had is not lost
    partial = {"q.weight": NEW["q.weight"]}
    fields = ("v2", manifest_of(partial), "auto", "drain", True)
    assert core.refused(BeginUpdate, *fields).field == "partial"
    session = core.begin(NEW, mode="inplace")
    core.submit(request(5))
    core.turn()
    assert core.finish_types(5) == ["error"]
    core.stage(session, NEW)
    core.call(CommitUpdate, session, kind=UpdateReport)
    check_live(core, NEW)
    core.submit(request(6))
    core.settle()
    assert core.spans(6) == [("v1", 10)]


def tied_head(value: float) -> tuple[WeightStore, dict[str, torch.Tensor]]:
    return tiny_store(), {"lm_head.weight": torch.full((8, 4), value)}


def transposed(value: float) -> tuple[WeightStore, dict[str, torch.Tensor]]:
    """A tensor that lies in its parameter with its axes transposed, so that blocks are made ready beside it."""
    piece = Piece("down", Box.whole((3, 4)), Box.whole((4, 3)), axes=(1, 0))
    weight_map = WeightMap([ParamSpec("down", (4, 3))], [WeightRule("down", (3, 4), (piece,))])
    store = WeightStore(weight_map, torch.float32, torch.device("cpu"), memory=lambda: 1 << 40)
    store.fill_random(1)
    return store, {"down": torch.full((3, 4), value)}


@pytest.mark.parametrize("make", [tied_head, transposed])
@pytest.mark.parametrize("is_finite", [True, False])
def test_a_refusal_before_the_first_write_in_place_leaves_the_old_weights(make: Any, is_finite: bool) -> None:
    store, tensors = make(9.0 if is_finite else torch.nan)
    core = Core(FreeExecutor(VOCAB_SIZE, weights=store))
    before = core.call(Digest, kind=dict[str, str])
    core.submit(request(1, max_new_tokens=30))
    core.turn(2)
    session = core.begin(tensors, mode="inplace", in_flight="keep", partial=True)
    stage = core.start_stage(session, tensors)
    core.until(lambda: stage in core.link.replies)
    if make is transposed and is_finite:
        assert core.link.replies[stage].error is None
        core.call(AbortUpdate, session)
        assert core.status().state == "poisoned"
        return
    assert core.error(stage).field in ("lm_head.weight", "down")
    assert core.call(Digest, kind=dict[str, str]) == before  # also while it is open
    core.call(AbortUpdate, session)
    assert (core.status().state, core.status().version) == ("ready", "default")
    core.settle()
    assert core.spans(1) == [("default", 30)]


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_folder_that_is_refused_before_the_first_write_in_place_leaves_the_old_weights(
    tmp_path: Path, suffix: str
) -> None:
    """The head, which comes first, owns no memory, and the next file has changed."""
    files = {"1": {"lm_head.weight": NEW["embed.weight"]}, "2": NEW}
    for number, tensors in files.items():
        save = save_file if suffix == "safetensors" else torch.save
        save(tensors, tmp_path / f"{number}.{suffix}")
    places = {name: f"{number}.{suffix}" for number, tensors in files.items() for name in tensors}
    stem = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
    (tmp_path / f"{stem}.index.json").write_text(json.dumps({"weight_map": places}))

    class Changing(DiskExecutor):
        def checkpoint(self, folder: Path, root: Path | None) -> Any:
            manifest, tensors = yield from super().checkpoint(folder, root)

            def changing() -> Iterator[tuple[str, Any]]:
                yield from islice(tensors, 1)
                os.truncate(folder / f"2.{suffix}", 10)
                yield from tensors

            return manifest, changing()

    core = Core(Changing(VOCAB_SIZE, weights=tiny_store()))
    before = core.call(Digest, kind=dict[str, str])
    error = core.refused(UpdateFromDisk, str(tmp_path), "disk", "inplace")
    assert (error.code, error.field) == ("CheckpointError", f"2.{suffix}")
    assert core.status().state == "ready" and core.call(Digest, kind=dict[str, str]) == before


def test_a_commit_that_fails_half_way_poisons_and_a_full_update_heals(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core()
    core.submit(request(1, max_new_tokens=100))
    core.turn(3)
    session = core.begin(NEW, mode="shadow", in_flight="keep")
    core.stage(session, NEW)
    copy, num_copies = torch.Tensor.copy_, 0

    def failing_copy(target: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal num_copies
        num_copies += 1
        if num_copies == 3:
            raise RuntimeError("the device is out of memory")
        return copy(target, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "copy_", failing_copy)
        error = core.refused(CommitUpdate, session)
    assert "the commit failed" in error.message and "out of memory" in error.message
    assert core.status().state == "poisoned"
    assert core.finish_types(1) == ["error"]
    session = core.begin(NEW)
    core.stage(session, NEW)
    core.call(CommitUpdate, session, kind=UpdateReport)
    check_live(core, NEW)
    core.submit(request(2))
    core.settle()
    assert core.spans(2) == [("v1", 10)]


class LateTicket:
    """Done when it is told: the device copies at that moment, or answers with `fault`."""

    def __init__(self, commit: Callable[[], Enqueued]) -> None:
        self.commit = commit
        self.num_looks = 0
        self.num_looks_needed = 1 << 60
        self.fault: Exception | None = None

    def is_done(self) -> bool:
        self.num_looks += 1
        if self.num_looks < self.num_looks_needed:
            return False
        if self.fault is not None:
            raise self.fault
        return self.commit().is_done()


class LateStore(WeightStore):
    """A memory whose commits go on after they were begun, as a device's do."""

    def commit(self) -> Any:
        self.ticket = LateTicket(super().commit)
        return self.ticket


def late_core() -> tuple[Core, LateStore]:
    store = LateStore(tiny_weight_map(), torch.float32, torch.device("cpu"), memory=lambda: 1 << 40)
    store.fill_random(1)
    return Core(FreeExecutor(VOCAB_SIZE, weights=store)), store


def begin_late_commit(mode: str) -> tuple[Core, LateStore, int, int]:
    """A core whose commit is under way beside a request, with the session and the call."""
    core, store = late_core()
    core.submit(request(1, max_new_tokens=200, deliver_every=1))
    core.turn(3)
    session = core.begin(NEW, "v1", mode=mode, in_flight="keep")
    core.stage(session, NEW)
    call = core.start(CommitUpdate, session)
    core.turn(5)
    assert store.ticket.num_looks > 1
    return core, store, session, call


@pytest.mark.parametrize("mode", MODES)
def test_no_reply_no_step_and_no_pause_time_precedes_the_copy_of_a_commit(mode: str) -> None:
    core, store, _, call = begin_late_commit(mode)
    num_tokens = len(core.tokens(1))
    time.sleep(0.02)
    core.turn(5)
    assert call not in core.link.replies and len(core.tokens(1)) == num_tokens and core.is_busy
    status = core.status()
    assert (status.state, status.epoch, status.last_version) == ("updating", 0, "default")
    store.ticket.num_looks_needed = 0
    report = core.call_answer(call, UpdateReport)
    assert report.version == "v1" and 20.0 <= report.pause_ms == core.status().metrics["last_update_pause_ms"]
    check_live(core, NEW)
    core.settle()
    assert core.finish_types(1) == ["length"]
    assert core.spans(1) == [("default", num_tokens), ("v1", 200 - num_tokens)]


@pytest.mark.parametrize("how", ["abort", "give up", "deadline", "shutdown"])
def test_a_commit_that_is_under_way_is_not_undone(how: str) -> None:
    core, store, session, call = begin_late_commit("shadow")
    store.ticket.num_looks_needed = store.ticket.num_looks + 3
    if how == "abort":
        assert "committed" in core.refused(AbortUpdate, session).message
    elif how == "give up":
        core.call(GiveUp, call)
    elif how == "deadline":
        core.clock.now += 1e6
    else:
        core.call(Shutdown)
    report = core.call_answer(call, UpdateReport)
    assert report.version == "v1" and report.epoch == 1
    if how != "shutdown":
        check_live(core, NEW)


def test_a_read_that_meets_a_commit_under_way_is_of_the_new_weights() -> None:
    core, store, _, _ = begin_late_commit("shadow")
    call = core.start(Digest)
    core.turn(3)
    assert call not in core.link.replies
    store.ticket.num_looks_needed = 0
    core.until(lambda: call in core.link.replies)
    assert core.answer(call, dict[str, str]) == {name: digest_of(tensor) for name, tensor in NEW.items()}


@pytest.mark.parametrize("mode", MODES)
def test_a_commit_that_fails_under_way_poisons_and_a_full_update_heals(mode: str) -> None:
    core, store, _, call = begin_late_commit(mode)
    store.ticket.num_looks_needed, store.ticket.fault = 0, RuntimeError("a rank did not take it")
    core.until(lambda: call in core.link.replies)
    assert "the commit failed" in core.error(call).message and core.status().state == "poisoned"
    session = core.begin(NEW, "v2", mode=mode)
    core.stage(session, NEW)
    call = core.start(CommitUpdate, session)
    core.turn(5)
    store.ticket.num_looks_needed = 0
    assert core.call_answer(call, UpdateReport).version == "v2"
    check_live(core, NEW)


def test_a_partial_update_changes_what_it_names() -> None:
    core = Core()
    before = core.call(Digest, kind=dict[str, str])
    update(core, {"q.weight": NEW["q.weight"]}, partial=True)
    after = core.call(Digest, kind=dict[str, str])
    assert [name for name in before if before[name] != after[name]] == ["q.weight"]


@pytest.mark.parametrize("mode", MODES)
def test_a_forgotten_session_is_aborted_at_its_deadline(mode: str) -> None:
    core = Core()
    session = core.begin(NEW, mode=mode, timeout_s=20.0)
    core.clock.now += 15.0
    core.stage(session, NEW, ["q.weight"])
    core.clock.now += 15.0
    core.turn()
    assert core.status().updating  # every command moves the deadline
    core.clock.now += 5.1
    core.turn()
    assert core.status().state == ("ready" if mode == "shadow" else "poisoned")
    refused = core.refused(CommitUpdate, session)
    assert refused.code == "DeadlineError" and "was aborted 20 s after its last command" in refused.message
    update(core, NEW)
    assert "was committed" in core.refused(CommitUpdate, session + 1).message


def test_a_drain_that_outlives_the_session_answers_the_commit() -> None:
    core = Core()
    core.submit(request(1, max_new_tokens=200))
    core.turn(3)
    session = core.begin(NEW, timeout_s=20.0)
    core.stage(session, NEW)
    commit = core.start(CommitUpdate, session)
    core.turn(3)
    core.submit(request(2, max_new_tokens=5))
    core.turn(3)
    core.clock.now += 20.0
    core.turn(2)
    assert core.error(commit).code == "DeadlineError"
    core.settle()
    assert core.spans(1) == [("default", 200)]
    assert core.spans(2) == [("default", 5)]


def test_requests_behind_a_draining_update_are_refused_in_time() -> None:
    core = Core(pause_timeout=10.0, max_running_requests=8)
    core.submit(request(1, max_new_tokens=200))
    core.turn(3)
    session = core.begin(NEW)
    core.stage(session, NEW)
    commit = core.start(CommitUpdate, session)
    core.submit(request(2))
    core.turn(3)
    core.clock.now += 10.5
    core.turn(2)
    assert core.finish_types(2) == ["error"]
    core.until(lambda: commit in core.link.replies)
    core.answer(commit, UpdateReport)


def test_abort_of_a_session_answers_what_waits_for_it() -> None:
    core = Core()
    core.submit(request(1, max_new_tokens=200))
    core.turn(3)
    session = core.begin(NEW)
    core.stage(session, NEW)
    commit = core.start(CommitUpdate, session)
    core.turn(3)
    assert core.refused(CommitUpdate, session).code == "UpdateConflictError"
    core.call(AbortUpdate, session)
    assert core.error(commit).code == "UpdateConflictError"
    core.settle()
    assert core.spans(1) == [("default", 200)]


def test_a_reader_of_a_bucket_lets_go_of_it() -> None:
    core = Core()
    session = core.begin(NEW)
    core.stage(session, NEW)
    size = sum(info.num_bytes for info in manifest_of(NEW))
    maps = Path("/proc/self/maps").read_text().count("memfd:headrace")
    core.buffer.close()
    with SharedBuffer.create(size) as fresh:
        assert fresh.ref.size == size
        assert Path("/proc/self/maps").read_text().count("memfd:headrace") <= maps


class DiskExecutor(FreeExecutor):
    """The free executor with a checkpoint reader."""

    def checkpoint(self, folder: Path, root: Path | None) -> Any:
        return LocalExecutor.checkpoint(self, folder, root)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", MODES)
def test_an_update_from_disk_is_one_call(tmp_path: Path, mode: str) -> None:
    save_file(NEW | {"lm_head.weight": NEW["embed.weight"].clone()}, tmp_path / "model.safetensors")
    core = Core(DiskExecutor(VOCAB_SIZE, weights=tiny_store()))
    core.submit(request(1, max_new_tokens=30), request(2, max_new_tokens=30))
    core.turn(4)
    report = core.call(UpdateFromDisk, str(tmp_path), "disk", mode, "keep", kind=UpdateReport)
    assert (report.version, report.epoch, report.num_tensors, report.mode) == ("disk", 1, 6, mode)
    check_live(core, NEW)
    core.settle()
    assert [version for version, _ in core.spans(1)] == ["default", "disk"]


def test_a_folder_that_does_not_fit_leaves_the_old_weights(tmp_path: Path) -> None:
    save_file(NEW | {"norm.weight": torch.ones(5)}, tmp_path / "model.safetensors")
    core = Core(DiskExecutor(VOCAB_SIZE, weights=tiny_store()))
    before = core.call(Digest, kind=dict[str, str])
    assert core.refused(UpdateFromDisk, str(tmp_path), "disk").field == "norm.weight"
    assert core.refused(UpdateFromDisk, str(tmp_path / "nothing"), "disk").code == "CheckpointError"
    assert core.call(Digest, kind=dict[str, str]) == before
    assert (core.status().state, core.status().updating) == ("ready", False)


class SlowDiskExecutor(DiskExecutor):
    """Reading a tensor takes ten seconds."""

    core: Core

    def checkpoint(self, folder: Path, root: Path | None) -> Any:
        manifest, tensors = yield from super().checkpoint(folder, root)
        return manifest, self._slowly(tensors)

    def _slowly(self, tensors: Any) -> Any:
        for pair in tensors:
            self.core.clock.now += 10.0
            yield pair


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["late", "given up"])
def test_an_update_from_disk_does_not_outlive_its_caller(tmp_path: Path, mode: Any, how: str) -> None:
    """However often a tensor is staged in between."""
    save_file(NEW, tmp_path / "model.safetensors")
    executor = SlowDiskExecutor(VOCAB_SIZE, weights=tiny_store())
    core = executor.core = Core(executor)
    core.loop.replica.update.advance = _one_block(core.loop.replica.update.advance)  # type: ignore[method-assign]
    command = partial(UpdateFromDisk, path=str(tmp_path), version="disk", mode=mode, in_flight="keep")
    started_at = core.clock.now
    disk = core.start(partial(command, deadline=started_at + 25.0))
    core.until(lambda: core.clock.now > started_at)  # the first tensor is read
    assert disk not in core.link.replies
    if how == "given up":
        core.call(GiveUp, disk)
    core.until(lambda: disk in core.link.replies)
    assert core.error(disk).code == "DeadlineError"
    core.settle()
    status = core.status()
    assert (status.last_version, status.epoch, status.updating) == ("default", 0, False)
    assert (status.state, status.version) == (("ready", "default") if mode == "shadow" else ("poisoned", ""))
    update(core, NEW)


def _one_block(advance: Any) -> Any:
    return lambda budget_s, now: advance(0.0, now)


@pytest.mark.parametrize("how", ["late", "given up"])
def test_a_commit_that_waits_too_long_ends_its_session(how: str) -> None:
    core = Core()
    core.submit(request(1, max_new_tokens=200))
    core.turn(3)
    session = core.begin(NEW)
    core.stage(session, NEW)
    commit = core.start(CommitUpdate, session, deadline=core.clock.now + 20.0)
    core.turn(3)
    assert core.loop._time_to_deadline() <= 20.0
    if how == "late":
        core.clock.now += 20.0
        core.turn()
    else:
        core.call(GiveUp, commit)
    assert core.error(commit).code == "DeadlineError"
    assert not core.status().updating
    core.settle()
    assert core.spans(1) == [("default", 200)]
    update(core, NEW)


@pytest.mark.parametrize("how", ["late", "given up"])
def test_a_bucket_that_waits_too_long_is_read_no_more(how: str) -> None:
    core = Core()
    core.submit(request(1, max_new_tokens=200))
    core.turn(3)
    session = core.begin(NEW, mode="inplace")
    stage = core.start_stage(session, NEW)
    core.link.commands[-1] = msgspec.structs.replace(core.link.commands[-1], deadline=core.clock.now + 20.0)
    core.turn(3)
    if how == "late":
        core.clock.now += 20.0
        core.turn()
    else:
        core.call(GiveUp, stage)
    assert core.error(stage).code == "DeadlineError"
    core.buffer.view[:] = bytes(len(core.buffer.view))  # its owner fills it again
    core.settle()
    core.stage(session, NEW)
    core.call(CommitUpdate, session, kind=UpdateReport)
    check_live(core, NEW)


@pytest.mark.parametrize("mode", MODES)
def test_a_session_whose_opener_gave_up_is_dropped(mode: str) -> None:
    core = Core()
    begin = core.start(BeginUpdate, "never", manifest_of(NEW), mode)
    core.turn()
    core.answer(begin, dict)
    core.call(GiveUp, begin)
    assert (core.status().updating, core.status().state) == (False, "ready")
    update(core, NEW)
    core.begin(NEW)
    core.call(GiveUp, begin)
    assert core.status().updating  # that one is another's


def test_whichever_session_is_open_can_be_aborted() -> None:
    core = Core()
    core.call(AbortUpdate, None)
    core.begin(NEW)
    core.call(AbortUpdate, None)
    assert not core.status().updating
    update(core, NEW)


BIG = {"embed.weight": torch.arange(32, dtype=torch.float32).view(8, 4)} | {
    name: tensor for name, tensor in NEW.items() if name != "embed.weight"
}


def send_piece(core: Core, session: int, start: int, stop: int, *, replaces: bool = False) -> int:
    """Stage bytes of the first tensor."""
    core.buffer, _ = bucket_of([BIG["embed.weight"].view(-1)[start // 4 : stop // 4]])
    return core.start(Stage, session, core.buffer.ref, (BufferEntry(0, 0, start, stop - start, replaces),))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cuts", [[0, 64, 128], [0, 4, 8, 124, 128], [0, 128]])
def test_a_tensor_may_come_in_pieces(mode: str, cuts: list[int]) -> None:
    core = Core()
    session = core.begin({**BIG, "lm_head.weight": BIG["embed.weight"]}, mode=mode)
    for start, stop in pairwise(cuts):
        assert core.refused(CommitUpdate, session).field == "embed.weight"
        stage = send_piece(core, session, start, stop)
        core.until(lambda stage=stage: stage in core.link.replies)  # type: ignore[misc]
        core.answer(stage)
    core.stage(session, {**BIG, "lm_head.weight": BIG["embed.weight"]}, [*list(BIG)[1:], "lm_head.weight"])
    core.call(CommitUpdate, session, kind=UpdateReport)
    check_live(core, BIG)


@pytest.mark.parametrize(
    "pieces",
    [[(64, 128)], [(0, 64), (0, 64), (32, 128)], [(0, 64), (96, 128)], [(0, 64), (64, 130)], [(0, 128), (0, 64)]],
    ids=["not the first", "overlap", "hole", "too long", "twice"],
)
def test_no_element_is_written_twice_or_never(pieces: list[tuple[int, int]]) -> None:
    core = Core()
    session = core.begin(BIG)
    calls = [send_piece(core, session, *piece) for piece in pieces[:-1]]
    core.until(lambda: all(call in core.link.replies for call in calls))
    *_, last = [send_piece(core, session, *pieces[-1])]
    core.until(lambda: last in core.link.replies)
    assert core.error(last).code == "WeightUpdateError" and core.error(last).field == "embed.weight"


@pytest.mark.parametrize("mode", MODES)
def test_a_tensor_that_is_being_replaced_is_missing_until_it_is_whole(mode: str) -> None:
    core = Core()
    session = core.begin(BIG, mode=mode)
    core.stage(session, {**BIG, "embed.weight": BIG["embed.weight"] + 1})
    doubled = send_piece(core, session, 0, 128)
    core.until(lambda: doubled in core.link.replies)
    assert core.error(doubled).message == "embed.weight was staged twice"
    first = send_piece(core, session, 0, 64, replaces=True)
    core.until(lambda: first in core.link.replies)
    assert "embed.weight" in core.refused(CommitUpdate, session).message
    last = send_piece(core, session, 64, 128, replaces=True)
    core.until(lambda: last in core.link.replies)
    core.call(CommitUpdate, session, kind=UpdateReport)
    check_live(core, BIG)


def test_a_piece_that_was_dropped_is_begun_with_its_tensor_again() -> None:
    core = Core()
    core.submit(request(1, max_new_tokens=100))
    core.turn(3)
    session = core.begin(BIG, in_flight="keep")
    first = send_piece(core, session, 0, 64)
    core.until(lambda: first in core.link.replies)
    core.store.stage(0, memoryview(bytes(64)), 64)  # begun, and never done
    again = send_piece(core, session, 64, 128)
    core.until(lambda: again in core.link.replies)
    assert core.error(again).field == "embed.weight"
    core.stage(session, BIG)
    core.call(CommitUpdate, session, kind=UpdateReport)
    check_live(core, BIG)


def test_a_tied_tensor_with_other_values_rolls_back(tmp_path: Path) -> None:
    save_file(NEW | {"lm_head.weight": NEW["embed.weight"] + 1}, tmp_path / "model.safetensors")
    core = Core(DiskExecutor(VOCAB_SIZE, weights=tiny_store()))
    before = core.call(Digest, kind=dict[str, str])
    error = core.refused(UpdateFromDisk, str(tmp_path), "disk", "shadow")
    assert error.field == "lm_head.weight"
    assert core.call(Digest, kind=dict[str, str]) == before
    assert (core.status().state, core.status().updating) == ("ready", False)


def test_many_updates_leave_no_descriptor_and_no_mapping() -> None:
    core = Core()

    def held() -> tuple[int, int]:
        core.buffer.close()
        return len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count("memfd:headrace")

    update(core, NEW)
    gc.collect()  # earlier tests' garbage would end during this one and hide a leak
    num_files, num_mappings = held()
    for number in range(100):
        update(core, new_tensors(float(number)), mode=MODES[number % 2])
        core.buffer.close()
    assert held()[0] <= num_files and held()[1] <= num_mappings


def test_a_large_tensor_is_staged_across_many_steps() -> None:
    big = {"embed.weight": torch.arange(8 << 20, dtype=torch.float32).view(4096, 2048)}
    weight_map = WeightMap([ParamSpec("embed", (4096, 2048))], [whole_rows("embed.weight", "embed", 0, (4096, 2048))])
    store = WeightStore(weight_map, torch.float32, torch.device("cpu"), memory=lambda: 1 << 40)
    store.load([("embed.weight", torch.zeros(4096, 2048))])
    core = Core(FreeExecutor(VOCAB_SIZE, weights=store), page_size=16, kv_pool_tokens=4096)
    core.submit(*(request(handle, max_new_tokens=200) for handle in range(1, 9)))
    core.turn(3)
    session = core.begin(big, mode="shadow", in_flight="keep")
    stage = core.start_stage(session, big)
    core.turn(2)
    assert stage not in core.link.replies
    core.until(lambda: stage in core.link.replies)
    core.call(CommitUpdate, session, kind=UpdateReport)
    assert core.status().metrics["staged_steps"] >= 3
    check_live(core, big)


@pytest.mark.parametrize("is_committed", [True, False])
def test_what_an_update_leaves_mapped_is_let_go_of_beside_running_steps(
    monkeypatch: pytest.MonkeyPatch, is_committed: bool
) -> None:
    """After the reply, a slice between two steps, and not again once nothing is left."""
    core = Core()
    core.submit(request(1, max_new_tokens=60))
    core.turn(3)
    session = core.begin(NEW, "v1", mode="shadow", in_flight="keep")
    core.stage(session, NEW)
    left, steps = [4], list[int]()

    def let_go(budget_s: float) -> bool:
        assert core.loop.replica.update.machine.session is None and 0 < budget_s < 1
        left[0] -= 1
        steps.append(core.loop.replica.stepper.num_completed)
        return left[0] > 0

    monkeypatch.setattr(core.store, "let_go", let_go)
    core.turn(5)
    assert left == [4]
    core.call(CommitUpdate if is_committed else AbortUpdate, session, kind=Any)
    core.settle()
    assert left == [0] and len(set(steps)) == 4
    assert not core.status().updating


def test_a_session_of_another_core_is_none_of_this_one() -> None:
    """Whoever was not told that a server was started anew."""
    first, second = Core(), Core()
    stale = first.begin(new_tensors(7.0))
    session = second.begin(new_tensors(7.0))
    assert stale != session and min(stale, session) > 1 << 32, "by chance once in 2^30"
    assert second.refused(CommitUpdate, stale).field == "session_id"
    assert second.status().updating
