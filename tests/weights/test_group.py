"""A rank of a trainer's group by itself: how far it goes ahead, and who may be told more than was announced."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, cast

import pytest
import torch

from headrace.types.errors import DeadlineError, UpdateConflictError, WeightUpdateError
from headrace.types.messages import JoinGroup
from headrace.types.weights import SEPARATE, TOGETHER, TensorInfo
from headrace.weights import arrival_memory
from headrace.weights import group as group_module
from headrace.weights.arrival_memory import ArrivalBuffer, ArrivalMemory
from headrace.weights.group import Broadcast, GroupArrivals, TorchGroup, _passes_on, _timer
from tests.engine.group_trainer import TrainerProcess
from tests.free_ports import free_port

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trainer() -> Iterator[TrainerProcess]:
    process = TrainerProcess()
    yield process
    process.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.002)


def joined(trainer: TrainerProcess, world_size: int = 2) -> list[TorchGroup]:
    """All ranks but the trainer's."""
    port = free_port()
    trainer.tell(do="init", port=port, name="g", world_size=world_size)
    ranks = range(1, world_size)
    groups = [TorchGroup(JoinGroup(0, "g", "127.0.0.1", port, rank, world_size, "gloo"), CPU, 30) for rank in ranks]
    wait_for(lambda: all(group.is_joined for group in groups))
    trainer.hear()
    return groups


def infos(*sizes: int) -> list[TensorInfo]:
    return [TensorInfo(f"t{number}", (size,), "float32") for number, size in enumerate(sizes)]


def test_no_more_is_received_ahead_than_there_is_memory_for(
    trainer: TrainerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrival_memory, "MAX_AHEAD_BYTES", 2 << 20)
    (group,) = joined(trainer)
    sizes = [100] * 6 + [1 << 20, 100]  # one that is larger than all memory comes when nothing else is there
    arrivals = group.receive(infos(*sizes), SEPARATE, 30)
    trainer.tell(do="send_sizes", name="g", sizes=sizes)
    wait_for(lambda: len(arrivals._ready) == 2)
    time.sleep(0.2)
    assert len(arrivals._ready) == 2
    seen = set[int]()
    for place, size in enumerate(sizes):
        wait_for(lambda: bool(arrivals._ready))
        ((taken, data),) = arrivals.take(1)
        assert taken == place
        values = torch.frombuffer(data, dtype=torch.float32)
        assert len(values) == size and bool((values == 1).all())
        seen.add(values.data_ptr())
        assert len(arrivals._ready) <= 1 and group._memory._num_bytes <= max(2 << 20, 4 * size)
        arrivals.free()
    assert arrivals.is_complete and len(seen) < len(sizes), "memory is used again"
    trainer.hear()
    group.fail("the test has ended")


class Device:
    """Broadcasts of which one is over at every `looks`th look, and what happened to them, in order."""

    looks = 1
    name = "g"

    def __init__(self) -> None:
        self.story, self.num_looks = list[str](), 0
        self.fails_at, self.problem = -1, None

    def broadcast(self, into: torch.Tensor, _: float) -> Callable[[], bool]:
        number = sum(each.startswith("begin") for each in self.story)
        self.story.append(f"begin {number}")

        def is_over() -> bool:
            self.num_looks += 1
            if self.num_looks % self.looks:
                return False
            if number == self.fails_at:
                raise RuntimeError("it was lost")
            into.fill_(number)
            self.story.append(f"end {number}")
            return True

        return is_over

    def check_open(self) -> None:
        pass


class Plain:
    """Memory of a device that is none."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.bytes = capacity, torch.zeros(capacity, dtype=torch.uint8)

    def armed(self, size: int, num_integer: int) -> torch.Tensor:
        return self.bytes[:size]

    def mismatch(self, size: int) -> str:
        return ""

    def part(self, info: TensorInfo, start: int) -> Any:
        return self.bytes[start : start + info.num_bytes]


@pytest.mark.parametrize("fails_at", [-1, 2])
def test_broadcasts_begin_before_the_ones_ahead_are_over(monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    """As many as there is memory for; tensors are handed on in order, and what was under way when one failed is not."""
    monkeypatch.setattr(arrival_memory, "MAX_DEVICE_BYTES", 3 << 20)
    device, memory = Device(), ArrivalMemory(Plain)
    device.fails_at, device.looks = fails_at, 4
    arrivals = GroupArrivals(cast(Any, device), memory, infos(*[100] * 8), SEPARATE, time.monotonic() + 30)
    failure = list[Exception]()

    def fill() -> None:
        try:
            arrivals.fill(device.broadcast)
        except RuntimeError as error:
            failure.append(error)

    thread = threading.Thread(target=fill)
    thread.start()
    for number in range(8 if fails_at < 0 else fails_at):
        wait_for(lambda: bool(arrivals._ready))
        ((taken, data),) = arrivals.take(1)
        assert taken == number and bool((data == number).all())
        arrivals.free()
    thread.join(30)
    assert device.story[:4] == ["begin 0", "begin 1", "begin 2", "end 0"]
    assert [each for each in device.story if each.startswith("end")] == [
        f"end {number}" for number in range(8 if fails_at < 0 else fails_at)
    ]
    assert [str(each) for each in failure] == ([] if fails_at < 0 else ["it was lost"])
    assert memory._num_bytes == sum(each.capacity for each in memory._free), "all of it was put back"


@pytest.mark.parametrize("packing", [SEPARATE, 1000, TOGETHER])
@pytest.mark.parametrize("skipped", [set(), {0}, {3}, {1, 2}, {4, 5}, set(range(6))])
def test_what_has_come_is_taken_together_and_what_is_skipped_is_not(packing: int, skipped: set[int]) -> None:
    device, memory = Device(), ArrivalMemory(Plain)
    tensors = infos(*[100] * 6)
    arrivals = GroupArrivals(cast(Any, device), memory, tensors, packing, time.monotonic() + 30, skipped)
    arrivals.fill(device.broadcast)
    wanted = [place for place in range(6) if place not in skipped]
    assert arrivals.is_complete == (not wanted)
    places = [place for place, data in arrivals.take(2) if data.nbytes == 400]
    assert places == wanted[:2] and arrivals.take(0) == []
    arrivals.free()
    places = [place for place, data in arrivals.take(6) if data.nbytes == 400]
    assert places == wanted[2:] and arrivals.is_complete == (not places)
    arrivals.free()
    assert arrivals.is_complete and arrivals.take(6) == []
    assert memory._num_bytes == sum(each.capacity for each in memory._free), "all of it was put back"


@pytest.mark.parametrize("packing", [SEPARATE, TOGETHER])
@pytest.mark.parametrize("num_short", [0, 8])
def test_integers_that_nobody_wants_may_end_in_any_bytes(packing: int, num_short: int) -> None:
    """As a buffer of int64 that ends in -1 does."""
    infos_of = [TensorInfo("w", (2,), "float32"), TensorInfo("i", (3,), "int64"), TensorInfo("b", (4,), "int8")]
    sizes = [sum(each.num_bytes for each in infos_of)] if packing == TOGETHER else [8, 24, 4]

    def broadcast(into: torch.Tensor, _: float) -> None:
        size = sizes.pop(0)
        into[: size - (num_short if size > 8 else 0)] = 255
        if size in (8, 36):  # it begins with the floats
            into[:8] = 0

    arrivals = GroupArrivals(cast(Any, Device()), ArrivalMemory(), infos_of, packing, time.monotonic() + 30, {1, 2})
    if num_short:
        with pytest.raises(WeightUpdateError, match="fewer came"):
            arrivals.fill(broadcast)
    else:
        arrivals.fill(broadcast)
        assert [bytes(data) for _, data in arrivals.take(3)] == [bytes(8)] and not sizes


def test_what_is_dropped_is_received_and_forgotten(trainer: TrainerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrival_memory, "MAX_AHEAD_BYTES", 2 << 20)
    (group,) = joined(trainer)
    dropped, kept = (group.receive(infos(*[100] * 6), SEPARATE, 30) for _ in range(2))
    trainer.tell(do="send_sizes", name="g", sizes=[100] * 6, value=1.0)
    trainer.tell(do="send_sizes", name="g", sizes=[100] * 6, value=2.0)
    wait_for(functools.partial(_has_come, dropped))
    assert len(dropped.take(1)) == 1
    dropped.drop()  # one is held, another has come, the rest has no memory yet
    dropped.drop()
    wait_for(functools.partial(_has_come, kept))
    ((_, data),) = kept.take(1)
    assert bytes(data) == torch.full((100,), 2.0).numpy().tobytes()
    kept.drop()
    trainer.hear()
    trainer.hear()
    group.fail("the test has ended")


class StandsStill(TorchGroup):
    """Joined, and then its thread waits for what never answers, as torch does for a store whose keeper is stopped."""

    answers = threading.Event()

    def _join(self) -> Broadcast:
        def broadcast(*_: object) -> None:
            self.answers.wait(60.0)

        return broadcast


def test_a_thread_that_stands_still_is_over_by_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it longer, and what is asked of the group after that is refused."""
    monkeypatch.setattr(group_module, "_GRACE_S", 0.2)
    group = StandsStill(JoinGroup(0, "g", "127.0.0.1", 1, 1, 2, "gloo"), CPU, 0.1)
    wait_for(lambda: group.is_joined)
    try:
        time.sleep(0.4)
        assert group.problem is None and group.refusal() is None, "nothing is waited for"
        first, second = (group.receive(infos(4), SEPARATE, seconds) for seconds in (0.3, 60.0))
        assert first.take(1) == []
        wait_for(lambda: group.refusal() is not None)
        for arrivals in (first, second):
            with pytest.raises(DeadlineError, match="'g'.*does not answer") as caught:
                arrivals.take(1)
            assert caught.value.field == "group_name"
        with pytest.raises(UpdateConflictError, match="destroy it and init it again"):
            raise group.refusal() or AssertionError
    finally:
        StandsStill.answers.set()
    wait_for(lambda: "weight group g" not in {thread.name for thread in threading.enumerate()})


def test_a_deadline_that_has_passed_is_not_waited_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes next is told so at once, although the thread has not said yet that it gives up."""
    monkeypatch.setattr(group_module, "_GRACE_S", 60.0)
    StandsStill.answers.clear()
    group = StandsStill(JoinGroup(0, "g", "127.0.0.1", 1, 1, 2, "gloo"), CPU, 0.1)
    wait_for(lambda: group.is_joined)
    try:
        arrivals = group.receive(infos(4), SEPARATE, 0.2)
        assert group.refusal() is None
        wait_for(lambda: time.monotonic() >= arrivals.until and bool(group._doing))
        assert arrivals.take(1) == [], "whoever waits for it learns from the thread what became of it"
        refusal = group.refusal()
        assert refusal is not None and "not over by its deadline" in refusal.message
        with pytest.raises(DeadlineError, match="does not answer"):
            arrivals.take(1)
    finally:
        StandsStill.answers.set()


@pytest.mark.parametrize("seconds", [0.001, 0.0019, 1.4999])
def test_torch_waits_no_shorter_than_a_call_has_time(seconds: float) -> None:
    """It counts whole milliseconds."""
    from torch._C._distributed_c10d import BroadcastOptions

    options = BroadcastOptions()
    options.timeout = _timer(seconds)
    assert timedelta(seconds=seconds) <= options.timeout <= timedelta(seconds=seconds + 0.001)


def test_a_core_without_a_group_does_not_load_what_groups_need() -> None:
    script = """
import sys
import headrace.core.process, headrace.runner
assert not {"headrace.weights.group", "headrace.weights.arrival_memory"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize("world_size", [2, 3, 4, 5])
def test_every_rank_has_what_rank_0_sends(trainer: TrainerProcess, world_size: int) -> None:
    sizes = [3, 0, 70_000, 1]
    groups = joined(trainer, world_size)
    calls = [group.receive(infos(*sizes), SEPARATE, 30) for group in groups]
    trainer.tell(do="send_sizes", name="g", sizes=sizes)
    for arrivals in calls:
        for size in sizes:
            wait_for(functools.partial(_has_come, arrivals))
            ((_, data),) = arrivals.take(1)
            assert bytes(data) == torch.ones(size).numpy().tobytes()
            arrivals.free()
    trainer.hear()
    for group in groups:
        group.fail("the test has ended")


def test_leaves_of_the_tree() -> None:
    """gloo's broadcast: in round i the ranks below 2^i send to those 2^i above them."""
    for world_size in range(2, 40):
        sending = {rank for i in range(6) for rank in range(1 << i) if rank + (1 << i) < world_size}
        assert sending == {0} | {rank for rank in range(1, world_size) if _passes_on(rank, world_size)}


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 4096])
@pytest.mark.parametrize("guard", [0, 1 << 20])
def test_a_buffer_tells_whether_it_was_filled(size: int, guard: int) -> None:
    buffer = ArrivalBuffer(4096, guard)
    for _ in range(2):
        into = buffer.armed(size)
        assert into.nbytes == size + guard
        assert buffer.mismatch(size) == "fewer"
        into[: max(0, size - 1)] = 0
        assert buffer.mismatch(size) == ("fewer" if size == 1 else "")
        into[:size] = 0
        assert buffer.mismatch(size) == ""
        if guard:
            into[: size + 1] = 0
            assert buffer.mismatch(size) == "more"


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("num_before", [0, 6])
def test_integers_may_end_in_any_bytes(dtype: torch.dtype, num_before: int) -> None:
    """-1 is the very bytes of a NaN. What came short is found all the same."""
    buffer, values = ArrivalBuffer(4096, 0), torch.full((16,), -1).to(dtype)
    for number in range(1, 16):
        size = num_before + values[:number].nbytes
        into = buffer.armed(size, size - num_before)
        assert buffer.mismatch(size) == ("fewer" if size > 3 else "")
        into[:num_before] = 0
        assert buffer.mismatch(size) == ("fewer" if size - num_before > 3 else "")
        if (last := values.element_size()) >= 4:
            into[num_before : size - last] = values[: number - 1].view(torch.uint8)
            assert buffer.mismatch(size) == "fewer", "the last is missing"
        into[num_before:size] = values[:number].view(torch.uint8)
        assert buffer.mismatch(size) == ""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_one_element_that_is_missing_is_missed(dtype: torch.dtype) -> None:
    """And the greatest and least are no NaN."""
    buffer, of = ArrivalBuffer(4096, 0), torch.finfo(dtype)
    for number in range(1, 9):
        for value in (0.0, of.min, of.max, -math.inf):
            data = torch.full((number,), value, dtype=dtype).view(torch.uint8)
            into = buffer.armed(data.nbytes)
            into[: data.nbytes - dtype.itemsize] = data[: -dtype.itemsize]
            assert buffer.mismatch(data.nbytes) == "fewer"
            into[: data.nbytes] = data
            assert buffer.mismatch(data.nbytes) == ""


def test_memory_that_cannot_be_had_is_an_error_in_time() -> None:
    memory = ArrivalMemory()
    held = memory.take(arrival_memory.MAX_AHEAD_BYTES, time.monotonic() + 1)
    with pytest.raises(TimeoutError):
        memory.take(1, time.monotonic() + 0.05)
    memory.put(held)
    memory.take(1, time.monotonic())
    with pytest.raises((OSError, OverflowError)):
        ArrivalMemory().take(1 << 62, time.monotonic())


def test_a_device_without_room_for_more_ahead_is_waited_for() -> None:
    """What is free goes first, and then what is in use has to be put back; without room for one alone it is an
    error."""
    left = 4 << 20

    def make(capacity: int) -> Plain:
        if capacity > left - memory._num_bytes:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Plain(capacity)

    memory = ArrivalMemory(make)
    first, second = memory.take_now(1 << 20), memory.take_now(3 << 20)
    assert first and second and memory.take_now(1) is None
    with pytest.raises(TimeoutError):
        memory.take(1, time.monotonic() + 0.05)
    memory.put(second)
    assert memory.take_now(1) and not memory._free and memory._num_bytes == 2 << 20
    memory.put(first)
    assert memory.take(1, time.monotonic()) is first
    memory = ArrivalMemory(make)
    with pytest.raises(torch.OutOfMemoryError):
        memory.take_now(5 << 20)


def test_no_addresses_behind_a_buffer_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrival_memory, "GUARD_BYTES", 1 << 60)
    assert ArrivalMemory().take(8, time.monotonic()).armed(8, 0).nbytes == 8


def test_nobody_listens_at_an_address_that_is_none() -> None:
    group = TorchGroup(JoinGroup(0, "g", "no.such.host.invalid", 1, 1, 2, "gloo"), CPU, 30)
    wait_for(lambda: group.problem is not None)
    assert isinstance(group.problem, WeightUpdateError) and "'g'" in group.problem.message


def test_a_group_is_left_while_it_waits_for_a_listener() -> None:
    group = TorchGroup(JoinGroup(0, "g", "127.0.0.1", free_port(), 1, 2, "gloo"), CPU, 300)
    group.fail("the test wants so")
    wait_for(lambda: not _lives("weight group g"))


def _has_come(arrivals: GroupArrivals) -> bool:
    return bool(arrivals._ready)


def _lives(name: str) -> bool:
    return any(thread.name == name for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("packing", "expected"),
    [
        (SEPARATE, [[0], [1], [2], [3], [4]]),
        (0, [[0, 1], [2], [3, 4]]),
        (399, [[0, 1], [2], [3, 4]]),
        (400, [[0, 1, 2], [3, 4]]),
        (1600, [[0, 1, 2, 3, 4]]),
        (TOGETHER, [[0, 1, 2, 3, 4]]),
    ],
)
def test_tensors_go_together_until_they_are_over_the_packing(packing: int, expected: list[list[int]]) -> None:
    """As vLLM packs them: with the one that makes it so much; nothing is left over for an empty one at the end."""
    arrivals = GroupArrivals(None, None, infos(0, 100, 100, 0, 100), packing, 0.0)  # type: ignore[arg-type]
    assert [list(places) for places in arrivals._broadcasts()] == expected
    assert [*GroupArrivals(None, None, (), packing, 0.0)._broadcasts()] == []  # type: ignore[arg-type]
