"""What ranks compute together is the same on all of them, and one that does not come is named in time.

The ranks are threads here: gloo knows no difference.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from headrace.parallel import Mesh
from headrace.parallel.communicator import GroupCommunicator
from headrace.parallel.links import DeviceLink
from headrace.runner.memory import MemoryPlan
from headrace.types.errors import ConfigError
from headrace.types.plan import RankLost
from tests.parallel.pool import Job, dist, mesh_of

Value = TypeVar("Value")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_ranks(num_ranks: int, call: Callable[[Mesh], Value], seconds: float = 20.0) -> list[Value]:
    """What the call gives on each rank of a mesh."""
    store = dist.HashStore()

    def run(rank: int) -> Value:
        return call(mesh_of(store, Job(0, rank, num_ranks, "", {}), seconds))

    with ThreadPoolExecutor(num_ranks) as threads:
        return [each.result() for each in [threads.submit(run, rank) for rank in range(num_ranks)]]


def values_of(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_order", [False, True])
def test_a_sum_is_added_with_its_bias_once_and_is_the_same_on_all(
    num_ranks: int, dtype: torch.dtype, in_order: bool
) -> None:
    stream, bias = values_of(100, 7, 33, dtype=dtype), values_of(101, 33, dtype=dtype)

    def add(mesh: Mesh, *, bias: Tensor | None) -> Tensor:
        found, partial = stream.clone(), values_of(mesh.rank, 7, 33, dtype=dtype)
        mesh.communicator.reduce_add_(found, partial, bias, in_order=in_order)
        return found

    total = sum(values_of(rank, 7, 33, dtype=dtype).double() for rank in range(num_ranks))
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    for given in (bias, None):
        found = on_ranks(num_ranks, lambda mesh, given=given: add(mesh, bias=given))  # type: ignore[misc]
        assert all(torch.equal(each, found[0]) for each in found)
        expected = stream.double() + total + (0.0 if given is None else given.double())
        torch.testing.assert_close(found[0].double(), expected, atol=tolerance, rtol=0)


def test_in_order_a_row_has_the_same_bits_in_any_batch() -> None:
    def add(mesh: Mesh, num_rows: int) -> Tensor:
        found = torch.zeros(num_rows, 33)
        mesh.communicator.reduce_add_(found, values_of(mesh.rank, 40, 33)[:num_rows], None, in_order=True)
        return found

    whole = on_ranks(4, lambda mesh: add(mesh, 40))[0]
    for num_rows in (1, 2, 7, 39):
        assert torch.equal(on_ranks(4, lambda mesh, n=num_rows: add(mesh, n))[0], whole[:num_rows])  # type: ignore[misc]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_values_are_gathered_by_rank_and_sent_from_one(num_ranks: int) -> None:
    def tell(mesh: Mesh) -> Any:
        communicator = mesh.communicator
        parts = communicator.exchange(values_of(mesh.rank, 2 * num_ranks, 3))
        of_others = [values_of(rank, 2 * num_ranks, 3)[2 * mesh.rank : 2 * mesh.rank + 2] for rank in range(num_ranks)]
        assert all(torch.equal(part, other) for part, other in zip(parts, of_others, strict=True))
        gathered = communicator.all_gather(values_of(mesh.rank, 3, 2).t())
        least, most = torch.tensor([mesh.rank, -mesh.rank]), torch.tensor([mesh.rank])
        communicator.all_reduce_(least, "min")
        communicator.all_reduce_(most, "max")
        sent = values_of(mesh.rank, 2, 2)
        communicator.broadcast_(sent, num_ranks - 1)
        return gathered, least.tolist(), most.tolist(), sent

    for gathered, least, most, sent in on_ranks(num_ranks, tell):
        assert len(gathered) == num_ranks
        assert all(torch.equal(values, values_of(rank, 3, 2).t()) for rank, values in enumerate(gathered))
        assert (least, most) == ([0, 1 - num_ranks], [num_ranks - 1])
        assert torch.equal(sent, values_of(num_ranks - 1, 2, 2))


def test_nothing_of_nobody_is_nothing() -> None:
    """Steps that keep no token add up no rows."""

    def tell(mesh: Mesh) -> Tensor:
        empty = torch.zeros(0, 5)
        mesh.communicator.reduce_add_(empty, torch.zeros(0, 5), None)
        mesh.communicator.reduce_add_(empty, torch.zeros(0, 5), None, in_order=True)
        return mesh.communicator.all_gather(empty)

    for found in on_ranks(2, tell):
        assert [values.shape for values in found] == [(0, 5), (0, 5)]


def test_all_ranks_have_the_pages_of_the_one_with_least_room() -> None:
    def plan(mesh: Mesh) -> MemoryPlan:
        own = MemoryPlan(1000 << 20, (300 + 50 * (mesh.rank % 2)) << 20, 100 << 20, 50 << 20, 0.9)
        return own.tightest(mesh, torch.device("cpu"))

    alone, (first, *others) = on_ranks(1, plan)[0], on_ranks(3, plan)
    assert alone.pages == 450 << 20 and not alone.whose
    assert first.pages == 400 << 20 and all(other == first for other in others)
    for text in ("rank 1", "400 MiB", "450 MiB"):
        assert text in first.explain()
        with pytest.raises(ConfigError, match=text):
            first.check(0, least=401 << 20)


@pytest.mark.parametrize(
    "call",
    [
        lambda communicator: communicator.all_reduce_(torch.zeros(3)),
        lambda communicator: communicator.all_gather(torch.zeros(3)),
        lambda communicator: communicator.exchange(torch.zeros(2)),
        lambda communicator: communicator.broadcast_(torch.zeros(3), 1),
        lambda communicator: communicator.reduce_add_(torch.zeros(3, 3), torch.zeros(3, 3), None),
    ],
)
def test_a_rank_that_does_not_come_is_lost_at_the_deadline(call: Callable[[Any], object]) -> None:
    is_over = threading.Event()

    def wait(mesh: Mesh) -> float:
        if mesh.rank == 1:
            is_over.wait(30.0)
            return 0.0
        started = time.monotonic()
        try:
            for _ in range(2):  # and it stays lost
                with pytest.raises(RankLost, match="a rank is lost"):
                    call(mesh.communicator)
        finally:
            is_over.set()
        return time.monotonic() - started

    assert on_ranks(2, wait, seconds=1.0)[0] < 20.0


class _Nccl:
    """A group of NCCL's, whose abort waits until no graph is left."""

    def __init__(self, is_freed: threading.Event) -> None:
        self.num_aborts = 0
        self.is_freed = is_freed

    def size(self) -> int:
        return 2

    def name(self) -> str:
        return "nccl"

    def abort(self) -> None:
        self.num_aborts += 1
        self.is_freed.wait(20.0)


def test_all_groups_of_a_device_are_aborted_though_graphs_hold_each() -> None:
    """By whoever frees the graphs afterwards, too."""
    is_freed = threading.Event()
    groups = [_Nccl(is_freed) for _ in range(3)]
    own, before, everyone = (GroupCommunicator(group, 1.0) for group in groups)
    mesh = Mesh(0, 2, own, before=DeviceLink(before), everyone=everyone)
    began = time.monotonic()
    mesh.abort()
    mesh.abort()
    assert time.monotonic() - began < 10.0
    deadline = time.monotonic() + 10.0
    while [group.num_aborts for group in groups] != [1, 1, 1]:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    is_freed.set()
    mesh.close()
    mesh.close()
    assert "headrace-abort" not in {thread.name for thread in threading.enumerate()}
    assert [group.num_aborts for group in groups] == [1, 1, 1]


def test_a_group_of_a_device_that_was_not_aborted_is_when_it_is_closed() -> None:
    is_freed = threading.Event()
    is_freed.set()
    group = _Nccl(is_freed)
    GroupCommunicator(group, 1.0).close()
    assert group.num_aborts == 1
