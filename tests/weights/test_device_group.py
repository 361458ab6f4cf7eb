"""A rank of NCCL's beside a library that only pretends: what is waited for, for how long, and what is let go of."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from headrace.types.errors import WeightUpdateError
from headrace.weights import device_group, nccl
from headrace.weights.device_group import NcclBroadcast
from headrace.weights.unique_id import find_unique_id
from tests.weights.test_unique_id import ID, pickled

IN_PROGRESS = 7
REMOTE_ERROR = 6


class Library:
    """NCCL, of which `num_looks` looks each find a call in progress; then it is `state`."""

    def __init__(self) -> None:
        self.num_looks = 3
        self.state = 0
        self.calls: list[Any] = []
        self._left = 0

    def _begin(self, *call: Any) -> int:
        self.calls.append(call)
        self._left = self.num_looks
        return IN_PROGRESS if self.num_looks else self.state

    def ncclCommInitRankConfig(self, into: Any, size: int, unique_id: Any, rank: int, config: Any) -> int:
        into._obj.value = 99
        found = config._obj
        assert (found.size, found.magic, found.version, found.blocking) == (24, 0xCAFEBEEF, 21400, 0)
        return self._begin("init", bytes(unique_id), rank, size)

    def ncclBroadcast(self, source: int, into: int, count: int, dtype: int, root: int, rank: Any, stream: int) -> int:
        assert source == into and (dtype, root, rank.value, stream) == (0, 0, 99, 5)
        ctypes.memset(into, 7, count)
        return self._begin("broadcast", count)

    def ncclAllReduce(self, source: int, into: int, count: int, dtype: int, sums: int, rank: Any, stream: int) -> int:
        assert source == into and (dtype, sums, rank.value, stream) == (7, 0, 99, 5)
        return self._begin("sum", count)

    def ncclCommGetAsyncError(self, rank: Any, state: Any) -> int:
        assert rank.value == 99
        self._left -= 1
        state._obj.value = IN_PROGRESS if self._left >= 0 else self.state
        return 0

    def ncclCommAbort(self, rank: Any) -> int:
        self.calls.append(("abort", rank.value))
        return 0

    def ncclGetErrorString(self, state: int) -> bytes:
        return b"remote process exited"

    def ncclGetLastError(self, _: Any) -> bytes:
        return b"Connection closed"


class Store:
    """Where an id is published at the `num_checks`th look."""

    def __init__(self, key: str, value: bytes, num_checks: int = 3) -> None:
        self.values, self.num_checks = {key: value}, num_checks

    def check(self, keys: list[str]) -> bool:
        self.num_checks -= 1
        return self.num_checks < 0 and all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        return self.values[key]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """It, and a device whose work is done at the second look."""
    found = Library()

    class Event:
        def __init__(self) -> None:
            self.num_looks = 0

        def record(self, _: Any) -> None:
            assert found._left < 0, "it is enqueued"

        def query(self) -> bool:
            self.num_looks += 1
            return self.num_looks > 1

    stream = SimpleNamespace(wait_stream=lambda _: None, cuda_stream=5)
    for name, value in {
        "Event": Event,
        "Stream": lambda *_, **__: stream,
        "current_stream": lambda _: None,
        "set_device": lambda _: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(device_group, "capture_by_thread", lambda: None)
    monkeypatch.setattr(nccl, "nccl_library", lambda: found)
    return found


def rank_of(find_id: Callable[[], bytes | None], is_over: Callable[[], bool] = lambda: False) -> NcclBroadcast:
    return NcclBroadcast(find_id, 1, 2, torch.device("cpu"), is_over)


def until_it_is_there(look: Callable[[], bool]) -> None:
    while not look():
        time.sleep(0.001)


@pytest.mark.parametrize("num_looks", [0, 3])
def test_torchs_ranks_meet_at_their_first_broadcast(library: Library, num_looks: int) -> None:
    library.num_looks = num_looks
    store = Store("0", ID)
    broadcast = rank_of(lambda: find_unique_id(store, "sglang"))
    assert not library.calls
    for size in (5, 300):
        into = torch.zeros(size, dtype=torch.uint8)
        until_it_is_there(broadcast(into, 10.0))
        assert bool((into == 7).all())
    broadcast.close()
    assert library.calls == [("init", ID, 1, 2), ("broadcast", 5), ("broadcast", 300), ("abort", 99)]


def test_vllms_ranks_meet_at_once_and_add_a_number_up(library: Library) -> None:
    store = Store("broadcast_from/0/0", pickled(ID))
    broadcast = rank_of(lambda: find_unique_id(store, "vllm"))
    until = time.monotonic() + 10
    broadcast.join(until)
    broadcast.warm_up(until)
    assert library.calls == [("init", ID, 1, 2), ("sum", 1)]


@pytest.mark.parametrize("rendezvous", ["sglang", "vllm"])
def test_what_is_no_id_is_refused(library: Library, rendezvous: Any) -> None:
    store = Store("0" if rendezvous == "sglang" else "broadcast_from/0/0", b"127 bytes or so")
    with pytest.raises(WeightUpdateError, match="no NCCL id"):
        rank_of(lambda: find_unique_id(store, rendezvous)).join(time.monotonic() + 10)
    assert not library.calls


@pytest.mark.parametrize("stage", ["id", "init", "broadcast"])
def test_nothing_is_waited_for_longer_than_there_is_time(library: Library, stage: str) -> None:
    broadcast = rank_of(lambda: None if stage == "id" else ID)
    if stage == "broadcast":
        until_it_is_there(broadcast(torch.zeros(1, dtype=torch.uint8), 10.0))
    library.num_looks = 1_000_000
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        until_it_is_there(broadcast(torch.zeros(1, dtype=torch.uint8), 0.1))
    assert time.monotonic() - began >= 0.1
    broadcast.close()
    assert library.calls[-1:] == ([] if stage == "id" else [("abort", 99)])


@pytest.mark.parametrize("stage", ["id", "init", "broadcast"])
def test_a_trainer_that_has_ended_is_not_waited_for(library: Library, stage: str) -> None:
    over: list[bool] = []
    broadcast = rank_of(lambda: None if stage == "id" else ID, lambda: bool(over))
    if stage == "broadcast":
        until_it_is_there(broadcast(torch.zeros(1, dtype=torch.uint8), 10.0))
    library.num_looks = 1_000_000
    over.append(True)
    with pytest.raises(ConnectionError, match="rank 0 has ended"):
        until_it_is_there(broadcast(torch.zeros(1, dtype=torch.uint8), 1000.0))


def test_what_has_come_counts_though_the_trainer_has_ended(library: Library) -> None:
    library.num_looks = 0
    assert rank_of(lambda: ID, lambda: True)(torch.zeros(1, dtype=torch.uint8), 10.0)()


@pytest.mark.parametrize("num_looks", [0, 3])
def test_what_nccl_says_is_raised(library: Library, num_looks: int) -> None:
    broadcast = rank_of(lambda: ID)
    library.num_looks, library.state = num_looks, REMOTE_ERROR
    with pytest.raises(RuntimeError, match=r"remote process exited \(Connection closed\)"):
        until_it_is_there(broadcast(torch.zeros(1, dtype=torch.uint8), 10.0))
