"""Ranks from their beginning to their settings, and how long they wait for what rank 0 says first."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from contextlib import closing
from typing import Any

import msgspec
import pytest

from headrace.config import EngineConfig
from headrace.config.devices import CudaDevice
from headrace.core import awaited_settings, begun_ranks, rank_member, rank_process
from headrace.core.begun_ranks import BegunRanks
from headrace.core.rank_messages import SETTINGS, START, TELL, RankStart, encode_message
from headrace.core.rank_opening import Opening
from headrace.core.rank_start import start_ranks
from headrace.engine import core_host
from headrace.ipc import PeerClosed
from headrace.ipc.rank_channel import RankChannel
from headrace.ipc.rank_page import RankPage
from headrace.types.errors import DeadlineError, DeviceLostError, InternalError
from tests.core.faulty_rank import FAULT
from tests.core.harness import tiny_config
from tests.core.ranks import begun_ranks as begun_ranks_of

PLACE = RankStart(1, 2, 4242, "secret", False, "127.0.0.1", True)


class Child:
    """A rank that a test looks at; `is_gone`: it has ended already."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.channel = self
        self.is_gone = False
        self.sent: list[tuple[int, bytes]] = []
        self.ended: list[float] = []

    def send(self, kind: int, payload: bytes) -> None:
        if self.is_gone:
            raise PeerClosed("it is gone")
        self.sent.append((kind, payload))

    def close(self, seconds: float) -> None:
        self.ended.append(seconds)


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[Child]:
    """Those that have begun."""
    found: list[Child] = []

    def start(rank: int, *, shares_process: bool) -> Child:
        assert not shares_process
        found.append(Child(rank))
        return found[-1]

    monkeypatch.setattr(begun_ranks, "start_rank", start)
    return found


def test_each_rank_is_told_its_own_device_once(children: list[Child]) -> None:
    device = CudaDevice("H200", 1 << 37, (9, 0), 132, 3)
    resolved = msgspec.structs.replace(tiny_config(tp_size=4), device="cuda", cuda=device)
    ranks = BegunRanks()
    ranks.begin(3)
    children[0].is_gone = True  # how it ended is said later
    ranks.settle(resolved)
    ranks.begin(4)
    ranks.settle(resolved)
    assert [child.rank for child in children] == [1, 2, 3]
    assert [len(child.sent) for child in children] == [0, 1, 1]
    for child in children[1:]:
        [(kind, payload)] = child.sent
        assert kind == SETTINGS
        assert msgspec.msgpack.decode(payload, type=type(resolved)) == resolved.of_rank(child.rank)
    taken: list[Any] = [*ranks.take()]
    assert taken == children
    ranks.close()
    assert not any(child.ended for child in children)  # whoever took them has them


def test_ranks_that_nobody_takes_end_where_one_cannot_begin(
    children: list[Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EAGAIN, "no room")

    ranks = BegunRanks()
    ranks.begin(2)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no room"):
        patch.setattr(begun_ranks, "start_rank", fail)
        ranks.begin(3)
    ranks.begin(3)  # when there is
    ranks.close()
    ranks.close()
    assert [(child.rank, child.ended) for child in children] == [(1, [0.0]), (2, [0.0])]


@pytest.mark.parametrize(
    ("settings", "executor", "expected"),
    [
        ({}, "local", 1),
        ({"tp_size": 2}, "local", 2),
        ({"tp_size": 2, "pp_size": 2}, "local", 4),
        ({"tp_size": 4, "nnodes": 2, "dist_init_addr": "127.0.0.1:1"}, "local", 2),
        ({"nnodes": 2, "dist_init_addr": "127.0.0.1:1"}, "local", 1),  # which is refused later
        ({"tp_size": 64, "pp_size": 8}, "local", 4),
        ({"tp_size": 2}, "free", 0),
    ],
)
def test_no_more_ranks_begin_than_gain_by_it(
    settings: dict[str, Any], executor: Any, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Any] = []
    monkeypatch.setattr(core_host, "available_cores", lambda: 4)
    monkeypatch.setattr(core_host, "begin_process", lambda **given: begun.append(given))
    core_host.begin_core(EngineConfig(model="m", **settings), executor)
    assert begun == [{"executor": executor, "num_ranks": expected}]


class Said:
    """A channel over which rank 0 says one thing after the other, each so many seconds after the one before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *said: tuple[float, list[tuple[int, bytes]]]) -> None:
        self._now, self._said = 0.0, list(said)
        monkeypatch.setattr(time, "monotonic", lambda: self._now)

    def receive(self, timeout: float) -> list[tuple[int, memoryview]]:
        after, frames = self._said.pop(0) if self._said else (float("inf"), [])
        self._now += min(after, timeout)
        if after > timeout:
            return []
        return [(kind, memoryview(payload)) for kind, payload in frames]


def test_a_rank_waits_for_settings_as_long_as_the_front_may_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """And then for the others as long as a start may take; both may come at once."""
    resolved = tiny_config(tp_size=2, start_timeout=300.0)
    settings, start = (SETTINGS, encode_message(resolved)), (START, encode_message(PLACE))
    for said in ([(500.0, [settings]), (250.0, [start])], [(500.0, [settings, start])]):
        opening: Any = Opening(Said(monkeypatch, *said))  # type: ignore[arg-type]
        assert opening.settings() == resolved
        assert opening.start(300.0) == PLACE
    opening = Opening(Said(monkeypatch, (500.0, [settings]), (350.0, [start])))  # type: ignore[arg-type]
    opening.settings()
    with pytest.raises(DeadlineError, match="no RankStart within 300 s"):
        opening.start(300.0)
    opening = Opening(Said(monkeypatch, (700.0, [settings])))  # type: ignore[arg-type]
    with pytest.raises(DeadlineError, match="no ResolvedConfig within 600 s"):
        opening.settings()


@pytest.mark.parametrize("frame", [(START, encode_message(PLACE)), (TELL, b""), (SETTINGS, b"\xc1"), (SETTINGS, b"")])
def test_whatever_else_rank_0_says_is_refused(monkeypatch: pytest.MonkeyPatch, frame: tuple[int, bytes]) -> None:
    opening: Any = Opening(Said(monkeypatch, (1.0, [frame])))  # type: ignore[arg-type]
    with pytest.raises(InternalError, match="ResolvedConfig"):
        opening.settings()


def test_a_rank_prepares_its_device_before_it_hears_where_all_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """And begins to load only then."""
    done: list[str] = []
    prepared = threading.Event()

    def prepare(device: CudaDevice, _: str | None) -> None:
        done.append(f"prepares {device.index}")
        prepared.set()

    def serve(resolved: Any, start: RankStart, *_: Any, on_begin: Any, on_built: Any) -> None:
        on_begin()
        done.append(f"serves rank {start.rank} on {resolved.cuda.index}")

    def say_where(channel: RankChannel) -> None:
        if prepared.wait(60.0):
            channel.send(START, encode_message(PLACE))
        else:
            channel.close()

    monkeypatch.setattr(awaited_settings, "prepare", prepare)
    monkeypatch.setattr(rank_process, "load_torch", lambda *_: None)
    monkeypatch.setattr(rank_member, "serve_rank", serve)
    device = CudaDevice("H200", 1 << 37, (9, 0), 132, 4)
    resolved = msgspec.structs.replace(tiny_config(tp_size=2), device="cuda", cuda=device, attention_backend="triton")
    near, far = map(RankChannel, socket.socketpair())
    with closing(near), closing(far), closing(RankPage(bytearray(4096))) as page:
        near.send(SETTINGS, encode_message(resolved))
        threading.Thread(target=say_where, args=(near,)).start()
        assert rank_process._serve(far, page, os.getpid()) == 0
    assert done == ["prepares 4", "serves rank 1 on 4"]


@pytest.mark.parametrize(
    ("fault", "how"),
    [
        ("torch", "ended with exit code 1: OSError: no libtorch"),
        ("join", r"was killed by signal 9 \(Killed\)"),  # while this one waits for it in the group of all
    ],
)
def test_a_rank_that_ends_before_all_have_joined_is_named(
    monkeypatch: pytest.MonkeyPatch, fault: str, how: str
) -> None:
    monkeypatch.setenv(FAULT, fault)
    monkeypatch.setattr("headrace.ipc.rank_spawn.RANK_MODULE", "tests.core.faulty_rank")
    resolved = tiny_config(tp_size=2)
    with pytest.raises(DeviceLostError, match=rf"the ranks cannot start: rank 1 \(process \d+\) {how}"):
        start_ranks(
            resolved, lambda _: pytest.fail("no rank has joined"), begun_ranks_of(resolved), shares_process=True
        )
