"""Reading live weights between steps: slices, one version, and what an update in between does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from headrace.core import reading
from headrace.core.fake_executor import FreeExecutor
from headrace.ipc import SharedBuffer
from headrace.types.messages import (
    AbortUpdate,
    Command,
    CommitUpdate,
    CoreStatus,
    DescribeWeights,
    Digest,
    GetStatus,
    GetWeight,
    GiveUp,
    Pause,
    SetVersion,
    Shutdown,
    WeightPart,
    WeightsChecker,
)
from headrace.types.weights import UpdateReport, WeightsDescription
from tests.core.harness import VOCAB_SIZE, Core, digest_of, manifest_of, new_tensors, request, tiny_store

NEW = new_tensors(5.0)
READS: dict[str, Callable[[int], Command]] = {
    "digest": Digest,
    "describe": DescribeWeights,
    "snapshot": lambda call_id: WeightsChecker(call_id, "snapshot"),
    "compare": lambda call_id: WeightsChecker(call_id, "compare"),
}


class OneBlock:
    """A clock on which every block takes as long as a boundary may."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Core:
    monkeypatch.setattr(reading, "time", OneBlock())
    core = Core(FreeExecutor(VOCAB_SIZE, weights=tiny_store()))
    core.call(WeightsChecker, "snapshot", kind=dict[str, str])
    return core


def updated(core: Core, **fields: Any) -> None:
    session = core.begin(NEW, **fields)
    core.stage(session, NEW)
    core.call(CommitUpdate, session, kind=UpdateReport)


@pytest.mark.parametrize("name", READS)
def test_steps_go_on_between_two_blocks(core: Core, name: str) -> None:
    core.submit(*(request(handle, max_new_tokens=60, deliver_every=1) for handle in range(1, 4)))
    core.turn(4)
    before = len(core.tokens(1))
    call = core.start(READS[name])
    core.until(lambda: call in core.link.replies)
    assert len(core.tokens(1)) - before >= 5  # a block of each of five tensors, and a step between any two
    core.settle()
    assert core.finish_types(1, 2, 3) == ["length"] * 3


@pytest.mark.parametrize("name", ["digest", "compare"])
@pytest.mark.parametrize("when", range(1, 8))
def test_an_update_in_between_begins_the_read_again(core: Core, name: str, when: int) -> None:
    """So what is told is of one version, whenever the commit comes."""
    session = core.begin(NEW)
    core.stage(session, NEW)
    call = core.start(READS[name])
    core.turn(when)
    is_before = call in core.link.replies
    core.call(CommitUpdate, session, kind=UpdateReport)
    core.until(lambda: call in core.link.replies)
    found = core.answer(call, dict[str, str])
    new = {name: digest_of(tensor) for name, tensor in NEW.items()}
    if name == "digest":
        assert (found == new) != is_before
        assert not is_before or not set(found.items()) & set(new.items())
    else:
        assert found == ({} if is_before else new)


@pytest.mark.parametrize("name", READS)
def test_weights_that_are_being_written_are_not_read(core: Core, name: str) -> None:
    session = core.begin(NEW, mode="inplace")
    started = core.start(READS[name])
    core.turn()
    core.stage(session, NEW, ["q.weight"])
    core.until(lambda: started in core.link.replies)
    assert core.refused(READS[name]).code == "UpdateConflictError"
    if core.link.replies[started].error is not None:
        assert core.error(started).code == "UpdateConflictError" and core.error(started).retryable
    core.call(AbortUpdate, session)
    assert core.refused(Digest).code == core.refused(WeightsChecker, "snapshot").code == "PoisonedError"
    assert core.refused(SetVersion, "v9").code == "PoisonedError"
    status = core.status()
    assert (status.state, status.version, status.last_version) == ("poisoned", "", "default")
    updated(core)
    assert core.call(Digest, kind=dict[str, str])["q.weight"] == digest_of(NEW["q.weight"])


def test_a_write_that_is_over_between_two_blocks_begins_the_read_again(core: Core) -> None:
    session = core.begin(NEW, mode="inplace")
    call = core.start(Digest)
    core.turn(2)
    assert call not in core.link.replies
    control = core.loop.replica.update
    staged = core.start_stage(session, NEW)
    core.turn()
    core.send(AbortUpdate(900, session))  # with the turn in which it staged, between two looks of the reader
    core.until(lambda: {staged, 900, call} <= core.link.replies.keys())
    assert control.live_stamp > 0
    if core.link.replies[call].error is None:
        assert core.answer(call, dict[str, str]) == core.call(Digest, kind=dict[str, str])


@pytest.mark.parametrize("how", ["late", "given up", "shutdown"])
def test_a_read_that_nobody_waits_for_ends(core: Core, how: str) -> None:
    core.call(Pause, "keep")
    with SharedBuffer.create(4096) as buffer:
        digest = core.start(Digest, deadline=core.clock.now + 10.0)
        read = core.start(GetWeight, "k.weight", buffer.ref, 0, None, deadline=core.clock.now + 10.0)
        core.turn()
        assert not {digest, read} & core.link.replies.keys()
        assert core.loop._time_to_deadline() <= 10.0
        if how == "late":
            core.clock.now += 10.0
            core.turn()
        elif how == "given up":
            core.call(GiveUp, digest)
            core.call(GiveUp, read)
        else:
            core.send(Shutdown(901))
            core.turn()
    code = "ShutdownError" if how == "shutdown" else "DeadlineError"
    assert core.error(digest).code == core.error(read).code == code
    assert not core.loop.replica.reading.reads


def test_a_read_ends_in_time_also_while_an_update_is_staged(core: Core) -> None:
    session = core.begin(NEW)
    core.loop.replica.update.advance = lambda budget_s, now: True  # type: ignore[method-assign]
    core.start_stage(session, NEW)
    digest = core.start(Digest, deadline=core.clock.now + 10.0)
    core.turn(3)
    core.clock.now += 10.0
    core.turn()
    assert core.error(digest).code == "DeadlineError"


def test_parts_of_one_tensor_say_whether_they_are_of_the_same_weights(core: Core) -> None:
    with SharedBuffer.create(32) as buffer:
        first = core.call(GetWeight, "k.weight", buffer.ref, kind=WeightPart)
        second = core.call(GetWeight, "k.weight", buffer.ref, 32, kind=WeightPart)
        assert (first.num_bytes, second.num_bytes, first.total) == (32, 32, 64)
        assert first.stamp == second.stamp
        updated(core)
        third = core.call(GetWeight, "k.weight", buffer.ref, 32, kind=WeightPart)
        assert third.stamp != second.stamp
        assert bytes(buffer.view) == NEW["k.weight"][2:].numpy().tobytes()
        core.call(WeightsChecker, "reset_tensors", kind=dict[str, str])
        assert core.refused(GetWeight, "k.weight", buffer.ref).code == "NeedsWeightsError"
        updated(core)
        assert core.call(GetWeight, "k.weight", buffer.ref, kind=WeightPart).stamp != third.stamp


def test_what_is_live_is_described_with_its_digests_and_parameters(core: Core) -> None:
    updated(core, version="new")
    found = core.call(DescribeWeights, kind=WeightsDescription)
    assert (found.version, found.epoch, found.stamp) == ("new", 1, core.loop.replica.update.live_stamp)
    expected = {info.name: (info.shape, info.dtype, digest_of(NEW[info.name])) for info in manifest_of(NEW)}
    assert {info.name: (info.shape, info.dtype, info.digest) for info in found.tensors} == expected
    (parameters,) = found.parameters
    assert [(info.name, info.shape) for info in parameters] == [("embed", (8, 4)), ("qkv", (12, 4)), ("norm", (4,))]


def test_parameters_are_read_as_they_lie(core: Core) -> None:
    updated(core)
    with SharedBuffer.create(4096) as buffer:
        part = core.call(GetWeight, "qkv", buffer.ref, 64, None, 0, kind=WeightPart)
        held = b"".join(NEW[f"{each}.weight"].numpy().tobytes() for each in "qkv")
        assert (part.info.shape, part.total) == ((12, 4), len(held))
        assert bytes(buffer.view[: part.num_bytes]) == held[64:]
        for name, rank in (("q.weight", 0), ("qkv", 1)):
            error = core.refused(GetWeight, name, buffer.ref, 0, None, rank)
            assert (error.code, error.field) == ("NotFoundError", "name")


def test_a_core_has_other_stamps_than_those_before_it() -> None:
    """Or parts of a tensor that two of them told would pass for one version's."""
    with SharedBuffer.create(4096) as buffer:
        stamps = {Core().call(GetWeight, "k.weight", buffer.ref, kind=WeightPart).stamp for _ in range(3)}
    assert len(stamps) == 3


def test_a_reader_that_fails_is_answered(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(rank: int | None) -> Iterator[None]:
        yield
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(core.executor.weights, "digest_in_slices", lost)
    assert "the device is lost" in core.refused(Digest).message
    core.call(GetStatus, kind=CoreStatus)
