"""A trainer's groups in the core, turn by turn: the group is a script, the rest is real."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

import pytest
import torch

from headrace.core.fake_executor import FreeExecutor
from headrace.types.errors import HeadraceError, UpdateConflictError, WeightUpdateError
from headrace.types.messages import (
    AbortUpdate,
    CommitUpdate,
    Discard,
    GiveUp,
    GroupTensor,
    JoinGroup,
    LeaveGroup,
    Receive,
    Shutdown,
)
from headrace.types.weights import SEPARATE, TOGETHER, TensorInfo
from tests.core.harness import VOCAB_SIZE, Core, digest_of, manifest_of, new_tensors, request, tiny_store

TENSORS = new_tensors(3.0)
NAMES = list(TENSORS)


class ScriptArrivals:
    """What a test lets come."""

    def __init__(self, tensors: Sequence[TensorInfo], packing: int, seconds: float, skipped: Collection[int]) -> None:
        self.skipped = skipped
        self.names = [info.name for info in tensors]
        self.packing = packing
        self.seconds = seconds
        self.is_dropped = False
        self.problem: HeadraceError | None = None
        self.ready: deque[tuple[int, memoryview]] = deque()
        self.num_come = self.num_taken = self.num_freed = 0

    def come(self, *values: torch.Tensor) -> None:
        for value in values:
            if self.num_come not in self.skipped:
                self.ready.append((self.num_come, memoryview(value.numpy().tobytes())))
            self.num_come += 1

    @property
    def is_complete(self) -> bool:
        return self.num_freed + len(self.skipped) == len(self.names)

    def take(self, most: int) -> list[tuple[int, memoryview]]:
        assert self.num_taken == self.num_freed, "what was taken comes first"
        if not self.ready and self.problem is not None:
            raise self.problem
        found = [self.ready.popleft() for _ in range(min(most, len(self.ready)))]
        self.num_taken += len(found)
        return found

    def free(self) -> None:
        self.num_freed = self.num_taken

    def drop(self) -> None:
        self.is_dropped = True


class ScriptGroup:
    """A group that does nothing by itself."""

    def __init__(self, terms: JoinGroup, seconds: float) -> None:
        self.terms, self.seconds = terms, seconds
        self.is_joined = False
        self.problem: HeadraceError | None = None
        self.calls: list[ScriptArrivals] = []
        self.counted = f"weight group {terms.name!r}"

    def refusal(self) -> HeadraceError | None:
        return None if self.problem is None else UpdateConflictError(self.problem.message)

    def receive(
        self, tensors: Sequence[TensorInfo], packing: int, seconds: float, skipped: Collection[int] = ()
    ) -> ScriptArrivals:
        self.calls.append(ScriptArrivals(tensors, packing, seconds, skipped))
        return self.calls[-1]

    def fail(self, reason: str) -> None:
        self.problem = self.problem or WeightUpdateError(f"group: {reason}")


class GroupExecutor(FreeExecutor):
    def __init__(self) -> None:
        super().__init__(VOCAB_SIZE, weights=tiny_store())
        self.groups: list[ScriptGroup] = []

    def join_group(self, terms: JoinGroup, seconds: float) -> ScriptGroup:
        self.groups.append(ScriptGroup(terms, seconds))
        return self.groups[-1]


class GroupCore(Core):
    def __init__(self, **settings: Any) -> None:
        self.groups = GroupExecutor()
        super().__init__(self.groups, **settings)

    def start_join(self, name: str = "g", seconds: float = 30.0) -> int:
        joining = functools.partial(JoinGroup, deadline=self.clock.now + seconds)
        return self.start(joining, name, "localhost", 1, 1, 2, "gloo")

    def join(self, name: str = "g") -> ScriptGroup:
        call_id = self.start_join(name)
        self.turn()
        self.groups.groups[-1].is_joined = True
        self.call_answer(call_id)
        return self.groups.groups[-1]

    def receiving(self, seconds: float = 60.0) -> Any:
        return functools.partial(Receive, deadline=self.clock.now + seconds)

    def start_receive(self, session_id: int, names: Sequence[str] = NAMES, **fields: Any) -> int:
        infos = {info.name: info for info in manifest_of(TENSORS)}
        tensors = tuple(GroupTensor(infos[name], NAMES.index(name), **fields) for name in names)
        return self.start(self.receiving(), session_id, "g", tensors)


@pytest.fixture
def core() -> GroupCore:
    return GroupCore()


def test_tensors_are_staged_as_they_come(core: GroupCore) -> None:
    group, session_id = core.join(), core.begin(TENSORS)
    call_id = core.start_receive(session_id)
    core.turn()
    assert not core.is_busy, "nothing has come: the loop may rest"
    (arrivals,) = group.calls
    for value in TENSORS.values():
        assert call_id not in core.link.replies
        arrivals.come(value)
        core.turn(2)
    core.answer(call_id)
    core.call(CommitUpdate, session_id, kind=dict)
    store = core.groups.weights
    found = dict(filter(None, store.digest_in_slices()))
    assert found == {name: digest_of(tensor) for name, tensor in TENSORS.items()}


def test_a_loop_that_waits_for_a_tensor_looks_again_soon(core: GroupCore) -> None:
    core.join()
    session_id = core.begin(TENSORS)
    assert core.loop._time_to_deadline() > 1
    core.start_receive(session_id)
    core.turn()
    assert 0 < core.loop._time_to_deadline() < 0.01
    core.call(AbortUpdate, session_id)
    core.turn()
    assert core.loop._time_to_deadline() > 1
    core.start_join("other")
    core.turn()
    assert 0 < core.loop._time_to_deadline() < 0.01


def test_steps_go_on_while_nothing_comes(core: GroupCore) -> None:
    core.join()
    session_id = core.begin(TENSORS, mode="shadow")
    core.start_receive(session_id)
    core.submit(request(1))
    core.until(lambda: core.finish(1) is not None)
    assert core.spans(1) == [("default", 10)]


def test_one_group_that_waits_does_not_hold_up_another(core: GroupCore) -> None:
    group, session_id = core.join(), core.begin(TENSORS)
    first, second = core.start_receive(session_id, NAMES[:2]), core.start_receive(session_id, NAMES[2:])
    core.turn()
    group.calls[1].come(*(TENSORS[name] for name in NAMES[2:]))
    core.call_answer(second)
    assert first not in core.link.replies


def test_a_call_that_is_refused_lets_pass_what_it_announces(core: GroupCore) -> None:
    group = core.join()
    assert core.refused(core.receiving(), 77, "g", _announced(), TOGETHER).code == "UpdateConflictError"
    (arrivals,) = group.calls
    assert arrivals.is_dropped and arrivals.packing == TOGETHER and arrivals.names == NAMES and arrivals.seconds == 60


def test_a_call_that_comes_too_late_lets_pass_what_it_announces(core: GroupCore) -> None:
    group = core.join()
    assert core.refused(core.receiving(-1.0), 77, "g", _announced(), SEPARATE).code == "DeadlineError"
    assert group.calls[0].is_dropped and group.calls[0].seconds >= 5


def test_a_call_that_was_given_up_before_lets_pass_what_it_announces(core: GroupCore) -> None:
    group, session_id = core.join(), core.begin(TENSORS)
    call_id = core.start_receive(session_id)
    core.start(GiveUp, call_id)
    core.settle()
    assert core.error(call_id).code == "DeadlineError" and group.calls[0].is_dropped


@pytest.mark.parametrize("how", ["given up", "deadline", "abort", "wrong values", "shutdown"])
def test_a_call_that_ends_early_lets_the_rest_pass(core: GroupCore, how: str) -> None:
    group, session_id = core.join(), core.begin(TENSORS, timeout_s=1000.0)
    call_id = core.start_receive(session_id)
    core.turn()
    (arrivals,) = group.calls
    if how == "given up":
        core.start(GiveUp, call_id)
    elif how == "deadline":
        core.clock.now += 61
    elif how == "abort":
        core.start(AbortUpdate, session_id)
    elif how == "wrong values":
        arrivals.come(torch.full((8, 4), float("nan")))
    else:
        core.start(Shutdown)
    core.until(lambda: call_id in core.link.replies)
    error = core.error(call_id)
    assert arrivals.is_dropped
    assert "'g'" in error.message or how != "deadline"


def test_what_failed_may_come_again_and_what_came_may_not(core: GroupCore) -> None:
    group, session_id = core.join(), core.begin(TENSORS)
    call_id = core.start_receive(session_id)
    core.turn()
    group.calls[0].come(*list(TENSORS.values())[:2])
    core.turn(3)
    group.calls[0].problem = WeightUpdateError("the trainer has died")
    core.until(lambda: call_id in core.link.replies)
    assert core.error(call_id).message == "the trainer has died"
    again = core.start_receive(session_id)
    core.until(lambda: again in core.link.replies)
    assert "staged twice" in core.error(again).message
    replacing = core.start_receive(session_id, replaces=True)
    core.turn()
    group.calls[-1].come(*TENSORS.values())
    core.call_answer(replacing)
    core.call(CommitUpdate, session_id, kind=dict)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"shape": (1,)}, NAMES[0]),
        ({"dtype": "bfloat16"}, NAMES[0]),
        ({"name": NAMES[1]}, NAMES[1]),
    ],
)
def test_what_the_manifest_does_not_say_is_refused_by_name(core: GroupCore, change: dict[str, Any], field: str) -> None:
    core.join()
    session_id = core.begin(TENSORS)
    entries = {"name": NAMES[0], "shape": tuple(TENSORS[NAMES[0]].shape), "dtype": "float32"} | change
    tensors = (GroupTensor(TensorInfo(**entries), 0),)
    error = core.refused(core.receiving(), session_id, "g", tensors, SEPARATE)
    assert error.code == "WeightUpdateError" and error.field == field


def test_a_tensor_named_twice_is_refused(core: GroupCore) -> None:
    core.join()
    session_id = core.begin(TENSORS)
    tensors = _announced()[:1] * 2
    assert core.refused(core.receiving(), session_id, "g", tensors, SEPARATE).field == "names"


def test_a_tensor_that_nobody_wants_is_received_and_forgotten(core: GroupCore) -> None:
    group, session_id = core.join(), core.begin(TENSORS)
    tensors = (GroupTensor(TensorInfo("rotary_emb.inv_freq", (2,), "float32"), -1), _announced()[0])
    call_id = core.start(core.receiving(), session_id, "g", tensors, SEPARATE)
    core.turn()
    group.calls[0].come(torch.zeros(2), TENSORS[NAMES[0]])
    core.call_answer(call_id)
    assert group.calls[0].is_complete


def test_what_nobody_can_count_ends_the_group(core: GroupCore) -> None:
    group = core.join()
    core.call(Discard, "g", (), SEPARATE, 5.0)
    assert group.refusal() is None and group.calls[-1].is_dropped
    core.call(Discard, "unknown", None, SEPARATE, 5.0)
    core.call(Discard, "g", None, SEPARATE, 5.0)
    assert group.problem is not None
    assert core.refused(core.receiving(), 1, "g", (), SEPARATE).code == "UpdateConflictError"


def test_joining_is_answered_by_its_deadline(core: GroupCore) -> None:
    call_id = core.start_join(seconds=5)
    core.turn()
    assert core.groups.groups[0].seconds == 5 and call_id not in core.link.replies
    core.clock.now += 6
    core.until(lambda: call_id in core.link.replies)
    error = core.error(call_id)
    assert error.code == "DeadlineError" and "'g'" in error.message and error.field == "group_name"
    assert core.groups.groups[0].problem is not None, "its thread is to end"


@pytest.mark.parametrize("how", ["given up", "left", "problem", "shutdown"])
def test_joining_ends_early(core: GroupCore, how: str) -> None:
    call_id = core.start_join()
    core.turn()
    group = core.groups.groups[0]
    if how == "given up":
        core.start(GiveUp, call_id)
    elif how == "left":
        core.start(LeaveGroup, "g")
    elif how == "problem":
        group.problem = WeightUpdateError("group 'g' failed")
    else:
        core.start(Shutdown)
    core.until(lambda: call_id in core.link.replies)
    assert core.link.replies[call_id].error is not None and group.problem is not None
    if how != "shutdown":
        core.join()


def test_a_group_that_was_joined_for_nobody_is_left(core: GroupCore) -> None:
    group = core.join()
    core.start(GiveUp, 1)  # the call that joined it, answered when nobody listened any more
    core.settle()
    assert group.problem is not None
    core.join()


def test_a_name_is_free_when_its_group_is_of_no_use(core: GroupCore) -> None:
    group = core.join()
    second = core.start_join()
    core.until(lambda: second in core.link.replies)
    assert core.error(second).code == "UpdateConflictError"
    group.fail("the trainer has died")
    core.join()
    core.call(LeaveGroup, "g")
    assert core.refused(LeaveGroup, "g").field == "group_name"


def _announced() -> tuple[GroupTensor, ...]:
    return tuple(GroupTensor(info, at) for at, info in enumerate(manifest_of(TENSORS)))
