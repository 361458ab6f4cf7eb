"""Open-ended sessions on one replica: extension, completeness, labels, pauses, deadlines, giving up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headrace.types.messages import AbortUpdate, BeginUpdate, CommitUpdate, Digest, ExtendUpdate, GiveUp, Pause, Resume
from headrace.types.weights import TensorInfo, UpdateBegun, UpdateExtended, UpdateReport
from tests.core.harness import Core, digest_of, manifest_of, new_tensors, request

MODES = ["shadow", "inplace"]
NEW = new_tensors(3.0)
BUCKETS = [["norm.weight", "q.weight"], ["embed.weight"], [], ["v.weight", "k.weight"]]


def only(names: list[str]) -> dict[str, torch.Tensor]:
    return {name: NEW[name] for name in names}


def num_steps(core: Core) -> float:
    return core.status().metrics["num_steps"]


@pytest.mark.parametrize("version", ["", "v2"])
@pytest.mark.parametrize("mode", MODES)
def test_buckets_make_an_update_under_the_last_label(mode: str, version: str) -> None:
    core = Core()
    for epoch in (1, 2):
        core.submit(request(epoch, max_new_tokens=20))
        core.turn(3)
        session, num_missing = core.begin_open(mode, "keep"), []
        for names in BUCKETS:
            core.stage_part(session, only(names))
            num_missing.append(core.extend(session, only([])).num_missing)
        assert num_missing == [3, 2, 2, 0]
        report = core.call(
            lambda call_id, session=session: CommitUpdate(call_id, session, version=version), kind=UpdateReport
        )
        assert (report.version, report.epoch, report.mode) == (version or "v1", epoch, mode)
        assert (report.num_tensors, report.num_bytes) == (5, sum(tensor.nbytes for tensor in NEW.values()))
        assert core.call(Digest, kind=dict[str, str]) == {name: digest_of(tensor) for name, tensor in NEW.items()}
        core.settle()
        assert core.spans(epoch)[-1][0] == report.version


def test_steps_go_on_until_the_first_staged_byte_in_place_and_to_the_commit_beside() -> None:
    for mode in MODES:
        core = Core()
        core.submit(request(1, max_new_tokens=100))
        core.turn(3)
        session = core.begin_open(mode, "keep")
        core.extend(session, only(BUCKETS[0]))
        before = num_steps(core)
        core.turn(5)
        assert num_steps(core) > before
        core.stage_part(session, only(BUCKETS[1]))
        before = num_steps(core)
        core.turn(5)
        assert (num_steps(core) > before) == (mode == "shadow")


@pytest.mark.parametrize("mode", MODES)
def test_a_bucket_that_is_wrong_is_refused_as_a_whole(mode: str) -> None:
    core = Core()
    session = core.begin_open(mode)
    core.stage_part(session, only(BUCKETS[0]))
    fine = manifest_of(only(["embed.weight"]))
    for wrong, text in (
        (TensorInfo("nobody", (2,), "float32"), "not a tensor of this model"),
        (TensorInfo("q.weight", (4, 4), "float32"), "named twice"),
        (TensorInfo("k.weight", (4, 5), "float32"), "has shape"),
        (TensorInfo("k.weight", (4, 4), "int32"), "has dtype"),
    ):
        error = core.refused(ExtendUpdate, session, (*fine, wrong))
        assert (error.code, error.field) == ("WeightUpdateError", wrong.name) and text in error.message
    error = core.refused(ExtendUpdate, session, (*fine, *fine))
    assert error.field == "embed.weight"
    for names in BUCKETS[1:]:
        core.stage_part(session, only(names))
    core.call(CommitUpdate, session, kind=UpdateReport)
    assert core.call(Digest, kind=dict[str, str]) == {name: digest_of(tensor) for name, tensor in NEW.items()}


def test_a_commit_names_what_is_not_named_or_not_staged_and_the_session_stays() -> None:
    core = Core()
    session = core.begin_open()
    error = core.refused(CommitUpdate, session)
    assert error.code == "WeightUpdateError" and "embed.weight" in error.message
    core.extend(session, only(["k.weight"]))
    core.stage_part(session, only(BUCKETS[0]))
    error = core.refused(CommitUpdate, session)
    assert error.field == "k.weight" and "embed.weight, v.weight" in error.message and "q.weight" not in error.message
    assert core.refused(lambda call_id: CommitUpdate(call_id, session, version="x" * 2000)).code == "WeightUpdateError"
    assert core.status().updating and core.status().version == "default"


def test_a_partial_session_commits_what_it_has() -> None:
    core = Core()
    before = core.call(Digest, kind=dict[str, str])
    session = core.begin_open(partial=True)
    core.stage_part(session, only(["q.weight"]))
    report = core.call(CommitUpdate, session, kind=UpdateReport)
    assert report.num_tensors == 1
    assert core.call(Digest, kind=dict[str, str]) == before | {"q.weight": digest_of(NEW["q.weight"])}


def test_only_an_open_ended_session_is_extended() -> None:
    core = Core()
    session = core.begin(only(["q.weight"]), partial=True)
    error = core.refused(ExtendUpdate, session, manifest_of(only(["k.weight"])))
    assert error.code == "WeightUpdateError" and "of its manifest only" in error.message
    assert core.refused(ExtendUpdate, session + 1, ()).code == "UpdateConflictError"


def test_a_session_may_begin_with_a_part_and_a_wrong_one_opens_nothing() -> None:
    core = Core()

    def command(call_id: int, manifest: Any) -> BeginUpdate:
        return BeginUpdate(call_id, "v1", manifest, is_open=True)

    wrong = TensorInfo("nobody", (2,), "float32")
    assert core.refused(command, (wrong,)).field == "nobody"
    assert core.status().state == "ready" and not core.status().updating
    begun = core.call(command, manifest_of(only(["q.weight"])), kind=UpdateBegun)
    assert core.extend(begun.session_id, only(["k.weight"])) == UpdateExtended(1, 3)


@pytest.mark.parametrize("mode", MODES)
def test_generation_stays_paused_while_tensors_are_missing(mode: str) -> None:
    core = Core()
    core.submit(request(1, max_new_tokens=10))
    core.turn(3)
    core.call(Pause, "keep")
    session = core.begin_open(mode)
    error = core.refused(Resume)
    assert error.code == "UpdateConflictError" and "abort_update" in error.message and "embed.weight" in error.message
    for names in BUCKETS[:-1]:
        core.stage_part(session, only(names))
    error = core.refused(Resume)
    assert "k.weight, v.weight" in error.message and "q.weight" not in error.message
    assert core.status().paused == "keep"
    core.stage_part(session, only(BUCKETS[-1]))
    core.call(CommitUpdate, session, kind=UpdateReport)
    core.call(Resume)
    core.settle()
    assert [version for version, _ in core.spans(1)] == ["default", "v1"]


def test_another_update_is_told_what_is_open_and_how_it_ends() -> None:
    core = Core()
    session = core.begin_open()
    core.stage_part(session, only(BUCKETS[0]))
    error = core.refused(BeginUpdate, "v2", manifest_of(NEW))
    assert error.code == "UpdateConflictError"
    assert "abort_update" in error.message and "embed.weight" in error.message
    core.call(AbortUpdate, None)
    core.begin(NEW)


@pytest.mark.parametrize("mode", MODES)
def test_a_session_ends_at_its_deadline_and_each_part_moves_it(mode: str) -> None:
    core = Core()
    before = core.call(Digest, kind=dict[str, str])
    session = core.begin_open(mode)
    for names in BUCKETS[:2]:
        core.clock.now += 9.0
        core.turn()
        core.extend(session, only(names))
    core.clock.now += 10.0
    core.turn()
    error = core.refused(ExtendUpdate, session, ())
    assert (error.code, error.field) == ("DeadlineError", "session_id")
    assert core.status().state == "ready" and core.call(Digest, kind=dict[str, str]) == before


def test_an_extension_that_comes_late_or_is_given_up_is_not_begun() -> None:
    core = Core()
    session = core.begin_open()
    manifest = manifest_of(only(["q.weight"]))
    late = core.refused(lambda call_id: ExtendUpdate(call_id, session, manifest, deadline=core.clock.now - 1.0))
    assert late.code == "DeadlineError"
    call_id = core.start(ExtendUpdate, session, manifest)
    core.call(GiveUp, call_id)
    assert core.error(call_id).code == "DeadlineError"
    assert core.extend(session, only(["q.weight"])).first_index == 0


@pytest.mark.parametrize("mode", MODES)
def test_who_gives_up_the_begin_has_no_session(mode: str) -> None:
    core = Core()

    def command(call_id: int) -> BeginUpdate:
        return BeginUpdate(call_id, "v1", (), mode, is_open=True)  # type: ignore[arg-type]

    opening = core.start(command)
    begun = core.call_answer(opening, UpdateBegun)
    core.stage_part(begun.session_id, only(BUCKETS[0]))
    core.call(GiveUp, opening)
    assert core.status().state == ("ready" if mode == "shadow" else "poisoned")
    core.begin(NEW)


def test_an_extension_waits_for_no_bucket_and_none_comes_into_a_commit() -> None:
    core = Core()
    core.submit(request(1, max_new_tokens=30))
    core.turn(3)
    session = core.begin_open("shadow")
    call_id = core.start_part(session, NEW)
    assert core.extend(session, only([])).num_missing == 0
    core.call_answer(call_id)
    commit = core.start(CommitUpdate, session)
    core.turn()  # drains
    assert core.refused(ExtendUpdate, session, ()).message.endswith("is being committed")
    core.call_answer(commit, UpdateReport)
