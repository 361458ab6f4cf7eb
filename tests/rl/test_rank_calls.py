"""Calls that ranks make together: who waits for whom, and what they hear. Threads are ranks, over a store in memory."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import distributed

from headrace.rl import meeting, rank_calls
from headrace.rl.frames import Beat, Done, Hello, PeerGone, Wire
from headrace.rl.meeting import meet
from headrace.types.errors import ConfigError, DeadlineError, HeadraceError, UnavailableError, WeightUpdateError
from headrace.types.weights import BufferRef

RANKS = [4, 5, 7]
TIMEOUT = 1.5


class Ranks:
    """Ranks of one mesh, each in a thread of its own while it does something."""

    def __init__(self) -> None:
        self.calls: dict[int, Any] = {}

    def each(self, work: Callable[[int], Any], ranks: list[int] = RANKS) -> dict[int, Any]:
        """What `work` returns or raises on these ranks, at the same time."""
        found: dict[int, Any] = {}

        def run(rank: int) -> None:
            try:
                found[rank] = work(rank)
            except (HeadraceError, ValueError) as error:
                found[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert set(found) == set(ranks)
        return found

    def call(self, name: str = "call", lead: Callable[[], bytes] = lambda: b"answer", **options: Any) -> dict[int, Any]:
        """All make one call."""
        return self.each(lambda rank: self.calls[rank].call(name, lead), **options)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    store = distributed.HashStore()  # type: ignore[attr-defined]
    monkeypatch.setattr(meeting, "trainer_store", lambda: store)
    met = Ranks()
    met.calls = met.each(lambda rank: meet(RANKS, rank, TIMEOUT))
    yield met
    for calls in met.calls.values():
        calls.close()


def told(found: dict[int, Any]) -> dict[int, tuple[str, str, str]]:
    return {
        rank: (type(error).__name__, getattr(error, "field", ""), getattr(error, "message", str(error)))
        for rank, error in found.items()
    }


def test_all_get_the_answer_or_the_error_of_rank_0(ranks: Ranks) -> None:
    large = bytes(range(256)) * (1 << 16)
    assert ranks.call(lead=lambda: large) == dict.fromkeys(RANKS, large)

    def refuse() -> bytes:
        raise ConfigError("no", field="dtype")

    def stumble() -> bytes:
        raise ValueError("boom")

    assert told(ranks.call(lead=refuse)) == dict.fromkeys(RANKS, ("ConfigError", "dtype", "no"))
    found = ranks.call(lead=stumble)
    assert isinstance(found.pop(4), ValueError)
    message = "call: rank 4 failed: ValueError: boom"
    assert told(found) == dict.fromkeys(RANKS[1:], ("UnavailableError", "rank", message))
    found = told(ranks.each(lambda rank: ranks.calls[rank].call("call", stumble, None, WeightUpdateError)))
    assert [found[rank][0] for rank in RANKS] == ["ValueError", "WeightUpdateError", "WeightUpdateError"]
    assert ranks.call() == dict.fromkeys(RANKS, b"answer")


def test_who_does_not_come_is_named_to_the_others_and_is_in_step_again(ranks: Ranks) -> None:
    started = time.monotonic()
    found = told(ranks.call("generate", ranks=[4, 7]))
    assert time.monotonic() - started < TIMEOUT + 5
    message = "generate: rank 5 has not come to it within 1.5 s; every rank makes every call"
    assert found == dict.fromkeys([4, 7], ("DeadlineError", "rank_timeout", message))

    def late(rank: int) -> Any:
        if rank == 5:  # it comes to the call that the others have given up, and then to theirs
            with pytest.raises(HeadraceError, match="rank 5 has come to generate after the others had gone on"):
                ranks.calls[5].call("generate", lambda: b"")
        return ranks.calls[rank].call("next", lambda: b"answer")

    assert ranks.each(late) == dict.fromkeys(RANKS, b"answer")


def test_a_rank_0_that_does_not_come_is_named(ranks: Ranks) -> None:
    found = told(ranks.call("flush", ranks=[5, 7]))
    message = "flush: rank 4 has not come to it within 1.5 s; every rank makes every call"
    assert found == dict.fromkeys([5, 7], ("DeadlineError", "rank_timeout", message))
    ranks.call("flush", ranks=[4])  # it was only late: its ranks are counted as there, and have gone on
    assert ranks.call() == dict.fromkeys(RANKS, b"answer")


def test_rank_0_may_take_longer_than_the_others_wait_for_each_other(ranks: Ranks) -> None:
    def lead() -> bytes:
        time.sleep(2.5 * TIMEOUT)
        return b"slow"

    assert ranks.call(lead=lead) == dict.fromkeys(RANKS, b"slow")


def test_a_rank_that_is_gone_is_named_at_once_and_from_then_on(ranks: Ranks) -> None:
    ranks.calls[7].close()
    for _ in range(2):
        started = time.monotonic()
        found = told(ranks.call("generate", ranks=[4, 5]))
        assert found == dict.fromkeys([4, 5], ("UnavailableError", "rank", "generate: rank 7 is gone"))
        assert time.monotonic() - started < TIMEOUT
    found = told(ranks.call(ranks=[7]))
    assert found[7][0] == "ShutdownError"
    ranks.calls[4].close()
    found = told(ranks.call("generate", ranks=[5]))
    assert found == {5: ("UnavailableError", "rank", "generate: rank 4 is gone")}


def test_ranks_that_make_different_calls_hear_so(ranks: Ranks) -> None:
    found = told(ranks.each(lambda rank: ranks.calls[rank].call("flush" if rank == 7 else "generate", lambda: b"")))
    message = "rank 4 calls generate, rank 7 calls flush"
    assert found == dict.fromkeys(RANKS, ("RequestError", "rank", message))


def test_what_a_following_rank_fails_with_is_raised_by_the_leading_one(ranks: Ranks) -> None:
    leading = ranks.calls[4]
    assert isinstance(leading, rank_calls.LeadingCalls)

    def follow() -> None:
        raise UnavailableError("no memory", field="named_tensors")

    def lead() -> bytes:
        leading.receive(leading.peers[1], "update")
        return b""

    found = ranks.each(lambda rank: ranks.calls[rank].call("update", lead, follow if rank == 7 else None))
    assert told(found) == dict.fromkeys(RANKS, ("UnavailableError", "named_tensors", "no memory"))
    assert ranks.call() == dict.fromkeys(RANKS, b"answer")


def test_who_does_not_come_to_the_meeting_is_named_and_the_next_meeting_is_another(ranks: Ranks) -> None:
    found = told(ranks.each(lambda rank: meet(RANKS, rank, TIMEOUT), [4, 5]))
    message = "VerlEngine: rank 7 has not come to it within 1.5 s; every rank makes every call"
    assert found == dict.fromkeys([4, 5], ("DeadlineError", "rank_timeout", message))
    late = told(ranks.each(lambda rank: meet(RANKS, rank, TIMEOUT), [7]))
    assert late[7][2] == "VerlEngine: rank 4 has not come to it within 1.5 s; every rank makes every call"
    again = ranks.each(lambda rank: meet(RANKS, rank, 10.0))
    assert all(not isinstance(calls, HeadraceError) for calls in again.values())
    for calls in again.values():
        calls.close()


@pytest.mark.parametrize("alone", [[4], [5, 7], [7]])
def test_ranks_that_have_tried_more_often_than_others_meet_them(ranks: Ranks, alone: list[int]) -> None:
    for _ in range(2):
        found = ranks.each(lambda rank: meet(RANKS, rank, 0.2), alone)
        assert {type(each).__name__ for each in found.values()} == {"DeadlineError"}
    first, ranks.calls = ranks.calls, ranks.each(lambda rank: meet(RANKS, rank, 10.0))
    assert ranks.call() == dict.fromkeys(RANKS, b"answer")
    for each in first.values():
        each.close()


def test_a_rank_that_is_late_meets_the_others_as_they_try_again(ranks: Ranks) -> None:
    def met(rank: int) -> Any:
        if rank == 7:
            time.sleep(1.5 * TIMEOUT)
        else:
            with pytest.raises(DeadlineError):
                meet(RANKS, rank, TIMEOUT)
        return meet(RANKS, rank, 10.0)

    first, ranks.calls = ranks.calls, ranks.each(met)
    assert ranks.call() == dict.fromkeys(RANKS, b"answer")
    for each in first.values():
        each.close()


def test_a_rank_that_gave_up_comes_again_to_where_rank_0_still_waits(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_given_up = threading.Event()
    monkeypatch.setattr(rank_calls, "MAX_BEAT_SECONDS", 0.1)

    def met(rank: int) -> Any:
        if rank == 5:
            with pytest.raises(DeadlineError):
                meet(RANKS, rank, 0.5)
            has_given_up.set()
        if rank == 7:
            has_given_up.wait(10)
        return meet(RANKS, rank, 10.0)

    first, ranks.calls = ranks.calls, ranks.each(met)
    assert ranks.call() == dict.fromkeys(RANKS, b"answer")
    for each in first.values():
        each.close()


@pytest.mark.parametrize("which", RANKS)
def test_a_call_within_a_call_is_refused_on_every_rank(ranks: Ranks, which: int) -> None:
    leading = ranks.calls[4]

    def nested(rank: int) -> bytes:
        if rank == which:
            ranks.calls[rank].call("generate", lambda: b"")
        return b""

    def lead() -> bytes:
        for peer in leading.peers if which != 4 else []:
            if peer.rank == which:
                leading.receive(peer, "update")
        return nested(4)

    def call(rank: int) -> Any:
        return ranks.calls[rank].call("update", lead, lambda: nested(rank) and None)

    message = "generate is called within update, which waits for it"
    assert told(ranks.each(call)) == dict.fromkeys(RANKS, ("RequestError", "rank", message))
    assert ranks.call() == dict.fromkeys(RANKS, b"answer")


def test_a_call_of_another_thread_waits_for_the_one_before_it_but_not_for_ever() -> None:
    calls, found, threads = meet([4], 4, 0.5), list[Any](), list[threading.Thread]()

    def second() -> None:
        try:
            found.append(calls.call("generate", lambda: b"second"))
        except DeadlineError as error:
            found.append((error.field, error.message))

    def within(seconds: float) -> bytes:
        threads.append(threading.Thread(target=second))
        threads[-1].start()
        threads[-1].join(seconds)
        return b"first"

    assert calls.call("update", lambda: within(30)) == b"first"
    assert found == [("rank_timeout", "generate: update of this rank has not ended within 0.5 s")]
    calls.call("update", lambda: within(0))
    threads[1].join(30)
    assert found[1:] == [b"second"]
    calls.close()


def test_a_stranger_is_not_let_in(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """It connects before the ranks do, and says nothing, or nonsense, or another secret."""
    connected: list[Any] = []
    original = meeting._accept

    def accept(listener: socket.socket, *args: Any) -> Any:
        for said in (
            b"",
            b"GET / HTTP/1.1\r\n\r\n",
            (1 << 60).to_bytes(8, "little"),
            (3).to_bytes(8, "little") + b"abc",
        ):
            stranger = socket.create_connection(listener.getsockname())
            stranger.sendall(said)
            stranger.shutdown(socket.SHUT_WR)
            connected.append(stranger)
        other = Wire(socket.create_connection(listener.getsockname()))
        other.send(Hello(5, bytes(rank_calls.SECRET_BYTES), BufferRef("/proc/self/fd/0", 64)), time.monotonic() + 1)
        connected.append(other)
        return original(listener, *args)

    monkeypatch.setattr(meeting, "_accept", accept)
    first, ranks.calls = ranks.calls, ranks.each(lambda rank: meet(RANKS, rank, 10.0))
    assert ranks.call() == dict.fromkeys(RANKS, b"answer")
    for each in (*connected, *first.values()):
        each.close()


def test_a_wire_goes_on_after_a_deadline_and_ends_with_its_peer() -> None:
    ours, theirs = (Wire(each) for each in socket.socketpair())
    with pytest.raises(TimeoutError):
        ours.receive(time.monotonic() + 0.05)
    theirs.send(Beat(), time.monotonic() + 1)
    theirs.send(Done(3, answer=b"x"), time.monotonic() + 1)
    assert ours.receive(time.monotonic() + 1) == Beat()
    assert ours.receive(time.monotonic() + 1) == Done(3, answer=b"x")
    with pytest.raises(TimeoutError):  # nobody reads it
        theirs.send(Done(4, answer=bytes(64 << 20)), time.monotonic() + 0.2)
    with pytest.raises(PeerGone):  # half a frame has come
        ours.receive(time.monotonic() + 1)
    with pytest.raises(PeerGone):
        theirs.receive(time.monotonic() + 1)
    ours.close()
