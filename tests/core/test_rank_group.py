"""When a rank counts as lost, and when not; and what its page and its channel keep to."""

from __future__ import annotations

import mmap
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from headrace.core import rank_member
from headrace.core.begun_ranks import BegunRanks
from headrace.core.faults import DeviceLost
from headrace.core.rank_group import FAILED_SECONDS, STOPPED_SECONDS, OtherRanks
from headrace.core.rank_messages import TELL, CommitOn, RankAnswer, RankStart, command_decoder, encode_message
from headrace.core.service import build_executor
from headrace.ipc import PeerClosed
from headrace.ipc.rank_channel import RankChannel
from headrace.ipc.rank_page import RankPage
from headrace.ipc.rank_spawn import SILENT_SECONDS, RankProcess, start_rank
from headrace.parallel.rendezvous import Rendezvous
from headrace.types.errors import ConfigError, WeightUpdateError
from headrace.types.plan import RankLost
from tests.core.harness import tiny_config

OPEN: list[RankChannel] = []


def channels() -> tuple[RankChannel, RankChannel]:
    near, far = socket.socketpair()
    OPEN[len(OPEN) :] = RankChannel(near), RankChannel(far)
    return OPEN[-2], OPEN[-1]


@pytest.fixture(autouse=True)
def end_of_channels() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


@dataclass
class ScriptedProcess:
    """A rank of which a test says how it is; `far` is its end of the channel."""

    rank: int = 1
    is_stopped: bool = False
    end: str = ""
    shares_memory: bool = True
    silent_seconds: float = SILENT_SECONDS
    page: RankPage = field(default_factory=lambda: RankPage(bytearray(4096)))

    def __post_init__(self) -> None:
        self.name = f"rank {self.rank}"
        self.channel, self.far = channels()
        self.page.beat()

    def describe_exit(self, seconds: float = 0.0) -> str:
        return self.end

    def has_started(self) -> None:
        pass

    def kill(self) -> None:
        self.end = self.end or "was killed"

    def close(self, seconds: float) -> None:
        pass


def group_of(*processes: ScriptedProcess) -> OtherRanks:
    ranks: Any = processes
    return OtherRanks(ranks, shares_process=True)


def test_a_rank_that_is_at_work_is_not_lost() -> None:
    process = ScriptedProcess()
    group, now = group_of(process), time.monotonic()
    for seconds in (0.0, 10.0, SILENT_SECONDS - 5.0):
        assert group._problem(process, now + seconds) == ""
    found = group._problem(process, now + SILENT_SECONDS + 5.0)
    assert "has not run for 6" in found


def test_a_rank_is_lost_that_stays_stopped_or_fails_alone() -> None:
    process = ScriptedProcess()
    group, now = group_of(process), time.monotonic()

    def problem(seconds: float) -> str:
        return group._problem(process, now + seconds)

    process.is_stopped = True
    assert not problem(0.0) and not problem(STOPPED_SECONDS / 2)
    process.is_stopped = False
    assert not problem(STOPPED_SECONDS)
    process.is_stopped = True
    assert not problem(STOPPED_SECONDS + 1.0) and "stopped by a signal" in problem(2 * STOPPED_SECONDS + 1.0)
    process.is_stopped = False
    process.page.write_failure(7, "out of memory")
    assert not problem(20.0)
    process.page.clear_failure()
    assert not problem(30.0)
    process.page.write_failure(8, "out of memory")
    assert not problem(30.0) and "out of memory" in problem(30.0 + FAILED_SECONDS)
    process.end = "ended with exit code 1"
    assert problem(31.0) == "ended with exit code 1"


def test_the_watch_ends_all_and_tells_the_first_cause() -> None:
    first, second = ScriptedProcess(1), ScriptedProcess(2)
    group = group_of(first, second)
    broken = threading.Event()
    group.break_off = broken.set
    group.watch()
    second.end = "was killed by signal 9"
    assert broken.wait(30.0)
    assert first.end == "was killed" and group.lost == "rank 2 was killed by signal 9"
    for use in (group.check, group.look, lambda: group.ask(CommitOn)):
        with pytest.raises(DeviceLost, match="rank 2 was killed by signal 9"):
            use()
    assert str(group.lose("rank 1 was seen to end later")) == "rank 2 was killed by signal 9"
    group.close()


def answer(process: ScriptedProcess, error: WeightUpdateError | None = None) -> None:
    ((_, payload),) = process.far.receive(10.0)
    ticket = command_decoder.decode(payload).ticket
    process.far.send(TELL, encode_message(RankAnswer(ticket, None if error is None else error.info(), ("x",))))


def test_what_is_asked_is_done_when_all_have_answered_and_fails_with_the_first_error() -> None:
    ranks = [ScriptedProcess(rank) for rank in (1, 2)]
    group = group_of(*ranks)
    asked = group.ask(CommitOn)
    assert not asked.is_done()
    answer(ranks[1], WeightUpdateError("no", field="mode"))
    assert not asked.is_done()
    answer(ranks[0])
    with pytest.raises(WeightUpdateError, match=r"no \(on rank 2\)") as failure:
        asked.wait()
    assert failure.value.field == "mode"
    again = group.ask(CommitOn)
    for process in ranks:
        answer(process)
    assert again.wait() == [("x",), ("x",)]
    with pytest.raises(DeviceLost, match="rank 1 and rank 2 has not answered"):
        group.ask(CommitOn).wait(0.01)


def test_a_page_keeps_what_came_of_the_last_plans() -> None:
    page = RankPage(mmap.mmap(-1, 4096))
    assert [page.result(0), page.failed] == [None, None]
    for number in range(200):
        page.write_result(number, number * 7 & 0xFFFFFFFF)
    assert [page.result(number) for number in (135, 136, 199, 200)] == [None, 136 * 7, 199 * 7, None]
    page.write_result(200, 0)
    assert page.result(200) == 0
    page.write_failure(0, "ü" * 5000)
    assert page.failed == 0 and page.text.startswith("üü")
    page.close()
    assert page.failed == 0


def test_a_channel_brings_frames_of_any_size_and_tells_of_its_end() -> None:
    near, far = channels()
    found: list[tuple[int, memoryview]] = []

    def read() -> None:
        while len(found) < 3:
            found.extend(far.receive(10.0))

    reader = threading.Thread(target=read)
    reader.start()
    payloads = [b"", b"abc", bytes(5 << 20)]
    for kind, payload in enumerate(payloads):
        near.send(kind, payload)
    reader.join(60.0)
    assert [(kind, bytes(payload)) for kind, payload in found] == list(enumerate(payloads))
    assert far.receive(0.0) == []
    near.close()
    with pytest.raises(PeerClosed):
        far.receive(10.0)
    with pytest.raises(PeerClosed):
        far.send(0, b"x" * (1 << 20))


def test_on_cuda_ranks_do_not_share_a_callers_process() -> None:
    resolved = msgspec.structs.replace(tiny_config(tp_size=2), device="cuda")
    with pytest.raises(ConfigError, match="process of its own") as refusal:
        build_executor(resolved, "local", BegunRanks(shares_process=True), shares_process=True)
    assert refusal.value.field == "inprocess"


def test_ranks_end_where_the_first_cannot_load_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[RankProcess] = []

    def start(rank: int, *, shares_process: bool) -> RankProcess:
        found.append(start_rank(rank, shares_process=shares_process))
        return found[-1]

    monkeypatch.setattr("headrace.core.begun_ranks.start_rank", start)
    monkeypatch.setitem(sys.modules, "headrace.runner", None)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ImportError, match="headrace.runner"), closing(BegunRanks(shares_process=True)) as ranks:
        build_executor(tiny_config(tp_size=2), "local", ranks, shares_process=True)
    assert [rank.describe_exit() for rank in found] == ["was killed by signal 9 (Killed)"]
    assert os.listdir("/proc/self/fd") == before


def test_ranks_meet_on_loopback_alone_below_a_secret() -> None:
    meeting = Rendezvous.host()
    addresses = [
        line.split()[1]
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and line.split()[1].endswith(f":{meeting.port:04X}")
    ]
    assert addresses == [f"0100007F:{meeting.port:04X}"]
    assert len(meeting.secret) == 32 and Rendezvous.host().secret != meeting.secret


def test_a_rank_of_a_device_that_is_left_ends_what_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where rank 0 is gone while this rank's device waits for it; what was joined is let go of."""
    said: list[str] = []
    left = rank_member.Leave()
    mesh = SimpleNamespace(abort=lambda: said.append("aborted"), close=lambda: said.append("mesh closed"))
    rendezvous = SimpleNamespace(close=lambda: said.append("rendezvous closed"))

    def build(*_: Any, **__: Any) -> Any:
        left.set()
        raise RankLost("the others are gone")

    monkeypatch.setattr(Rendezvous, "reach", lambda *_: rendezvous)
    monkeypatch.setattr(rank_member, "mesh_of", lambda *_: mesh)
    monkeypatch.setattr(rank_member, "build_runner", build)
    resolved = msgspec.structs.replace(tiny_config(tp_size=2), device="cuda")
    near, far = channels()
    start = RankStart(1, 2, 1, "", False, "127.0.0.1", True)
    with pytest.raises(RankLost):
        rank_member.serve_rank(resolved, start, near, RankPage(mmap.mmap(-1, 4096)), is_left=left)
    assert said == ["aborted", "mesh closed", "rendezvous closed"]
    far.close()
