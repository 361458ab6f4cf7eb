"""Who is let in where ranks meet, and what a rank of another process shows over its connections."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace.ipc import SharedBuffer, rank_meeting
from headrace.ipc.rank_guest import GuestLink, GuestRank, Over, Seated, SentPage, Started, Word
from headrace.ipc.rank_meeting import (
    ROLES,
    GuestHello,
    Hello,
    Meeting,
    RankHello,
    StoreHello,
    StoreTunnel,
    WrongSecret,
    reach,
    shared_nonce,
)
from headrace.types.errors import ConfigError, DeadlineError, HeadraceError, RequestError
from headrace.types.weights import BufferRef

SECRET = b"of this test"
TERMS = {"model": "a", "tp_size": "2"}
NOWHERE = BufferRef("", 0)


def listening_at(port: int) -> set[str]:
    """Addresses, in hexadecimal, at which something listens at a port."""
    lines = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()]
    return {line[1] for line in lines if line[3] == "0A" and line[1].endswith(f":{port:04X}")}


@pytest.fixture
def meeting() -> Iterator[Meeting]:
    listener = socket.create_server(("127.0.0.1", 0))
    opened = Meeting(listener, SECRET, num_guests=1, kind="node", missing="not come")
    yield opened
    opened.close()


def hello_of(number: int = 1, terms: dict[str, str] = TERMS, error: HeadraceError | None = None) -> GuestHello:
    return GuestHello(number, f"node {number}", 1, terms, NOWHERE, b"place", None if error is None else error.info())


def come(meeting: Meeting, hello: Hello) -> socket.socket:
    return reach(meeting.address, SECRET, lambda _: hello)


def soon(seconds: float = 30.0) -> float:
    return time.monotonic() + seconds


def seated(meeting: Meeting, link: GuestLink) -> tuple[GuestRank, SentPage, socket.socket]:
    """Rank 1 of two, its page and its channel's far end."""
    found: list[GuestRank] = []
    thread = threading.Thread(target=lambda: found.extend(meeting.seat(1, 2, soon())))
    thread.start()
    assert link.hear(30.0) == Seated((1,))
    channel, page = (come(meeting, RankHello(1, role)) for role in ROLES)
    thread.join(30.0)
    return found[0], SentPage(page), channel


def until(condition: Callable[[], Any]) -> None:
    deadline = soon()
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_guests_rank_shows_its_page_and_hears_of_the_end(meeting: Meeting) -> None:
    link = GuestLink(come(meeting, hello_of()))
    meeting.gather(TERMS, soon())
    rank, page, channel = seated(meeting, link)
    assert rank.name == "rank 1 (node 1 at 127.0.0.1)" and rank.guest.place == b"place" and not rank.shares_memory
    page.beat()
    page.write_result(70, 0xFFFFFFFF)
    page.write_failure(3, "ü out of memory")
    until(lambda: rank.page.failed == 3)
    assert rank.page.result(70) == 0xFFFFFFFF and rank.page.text == "ü out of memory"
    assert abs(time.monotonic_ns() - rank.page.last_beat) < 10**9 * 30
    page.clear_failure()
    until(lambda: rank.page.failed is None)
    rank.has_started()
    assert link.hear(30.0) == Started() and rank.silent_seconds < 5.0
    assert rank.describe_exit() == "" and not rank.is_stopped
    page.write_text("the last words")
    page.close()
    assert rank.describe_exit(30.0) == "is gone: the last words"
    rank.kill()
    assert link.hear(30.0) == Over(is_lost=True)
    assert channel.recv(1) == b""
    rank.close(30.0)
    channel.close()
    link.close()


def test_a_page_that_is_none_ends_the_rank(meeting: Meeting) -> None:
    link = GuestLink(come(meeting, hello_of()))
    meeting.gather(TERMS, soon())
    rank, page, channel = seated(meeting, link)
    page._send((1 << 20).to_bytes(4, "little") + bytes(8))
    assert "its connection broke" in rank.describe_exit(30.0)
    for each in (rank, page, channel, link):
        each.close(0.0) if isinstance(each, GuestRank) else each.close()


@pytest.mark.parametrize("greeting", [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(1 << 16), b"short"])
def test_nothing_of_a_stranger_is_read(meeting: Meeting, greeting: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_meeting, "HELLO_SECONDS", 0.5)
    with socket.create_connection(meeting.address, 30.0) as stranger:
        stranger.sendall(greeting)
        received = b""
        with suppress(ConnectionError):
            while chunk := stranger.recv(4096):
                received += chunk
    assert len(received) <= 2 * rank_meeting.NONCE_BYTES and not meeting._arrived


def test_who_knows_another_secret_is_told_so_and_learns_nothing(
    meeting: Meeting, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(WrongSecret):
        reach(meeting.address, b"another", lambda _: hello_of())
    with pytest.raises(DeadlineError, match="node 1 has not come") as missing:
        meeting.gather(TERMS, soon(0.2))
    assert missing.value.field == "start_timeout" and "the secrets differ" in caplog.text


def test_who_goes_on_without_the_secret_is_not_heard(meeting: Meeting) -> None:
    """A stranger who takes no offence at a proof that is none, and says what a guest says."""
    with socket.create_connection(meeting.address, 30.0) as stranger:
        drawn = stranger.recv(32)
        stranger.sendall(bytes(32) + rank_meeting._proof(b"another", b"guest", drawn, bytes(32)))
        assert stranger.recv(32) == bytes(32)
        body = msgspec.msgpack.encode(hello_of())
        with suppress(ConnectionError):
            stranger.sendall(len(body).to_bytes(4, "little") + body)
            assert stranger.recv(1) == b""
    assert not meeting._arrived


def test_who_does_not_know_the_secret_is_no_rank_0() -> None:
    """What a guest would say is not said to whoever listens at the address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        heard: list[bytes] = []

        def pretend() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(bytes(32))
                heard.append(connection.recv(64))
                connection.sendall(bytes(32))
                heard.append(connection.recv(1))

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(WrongSecret):
            reach(listener.getsockname(), SECRET, lambda _: hello_of())
        thread.join(30.0)
    assert heard[1] == b""


def test_a_hello_that_is_too_long_is_not_read(meeting: Meeting) -> None:
    link = GuestLink(come(meeting, hello_of(terms={"model": "x" * rank_meeting.MAX_HELLO_BYTES})))
    assert link.hear(30.0) == Over(is_lost=True)
    assert not meeting._arrived
    link.close()


def test_terms_that_differ_and_what_a_guest_cannot_are_named(meeting: Meeting) -> None:
    link = GuestLink(come(meeting, hello_of(terms={**TERMS, "model": "b"})))
    with pytest.raises(ConfigError, match="model is b of node 1 at 127.0.0.1, and a of rank 0") as refusal:
        meeting.gather(TERMS, soon())
    assert refusal.value.field == "model"
    meeting.refuse(refusal.value)
    word = link.hear(30.0)
    assert isinstance(word, Over) and word.error is not None and word.error.field == "model"
    link.close()


def test_what_keeps_a_guest_from_coming_is_told(meeting: Meeting) -> None:
    come(meeting, hello_of(error=RequestError("no memory", field="x"))).close()
    with pytest.raises(RequestError, match="node 1 at 127.0.0.1: no memory"):
        meeting.gather(TERMS, soon())


@pytest.mark.parametrize("number", [0, 2, 1])
def test_a_place_is_taken_once(meeting: Meeting, number: int) -> None:
    first = GuestLink(come(meeting, hello_of()))
    meeting.gather(TERMS, soon())
    link = GuestLink(come(meeting, hello_of(number)))
    word = link.hear(30.0)
    assert isinstance(word, Over) and word.error is not None and word.error.field == "node_rank"
    assert first.hear(0.1) is None
    first.close()
    again = GuestLink(come(meeting, hello_of()))  # its process was started again
    assert again.hear(0.3) is None
    meeting.gather(TERMS, soon())
    again.close()
    link.close()


def test_who_comes_to_a_rank_0_that_is_ending_is_to_come_again(meeting: Meeting) -> None:
    link = GuestLink(come(meeting, hello_of()))
    meeting.gather(TERMS, soon())
    rank, page, channel = seated(meeting, link)
    rank.kill()
    again = GuestLink(come(meeting, hello_of()))
    assert again.hear(30.0) == Over(is_lost=True)
    page.close()
    rank.close(0.0)
    for each in (link, again, channel):
        each.close()


def test_a_rank_connects_only_where_it_is_awaited(meeting: Meeting) -> None:
    for hello in (RankHello(1, "channel"), RankHello(7, "page"), StoreHello()):
        with come(meeting, hello) as connection:
            connection.settimeout(30.0)
            assert connection.recv(1) == b""


def test_memory_is_shared_with_whom_can_show_it(meeting: Meeting) -> None:
    buffers: list[SharedBuffer] = []

    def hello(drawn: bytes, is_own: bool) -> Hello:
        buffers.append(shared_nonce(drawn if is_own else bytes(32)))
        return GuestHello(1, "process", os.getpid(), TERMS, buffers[-1].ref, b"")

    for is_own in (False, True):
        connection = reach(meeting.address, SECRET, lambda drawn, is_own=is_own: hello(drawn, is_own))  # type: ignore[misc]
        meeting.gather(TERMS, soon())
        assert meeting._arrived[1].guest.shares_memory is is_own
        assert meeting._arrived[1].guest.pid == (os.getpid() if is_own else 0)
        connection.close()
        until(lambda: meeting._arrived[1].guest.is_gone)
    for buffer in buffers:
        buffer.close()


def test_the_store_is_reached_through_the_meeting_alone(meeting: Meeting) -> None:
    with socket.create_server(("127.0.0.1", 0)) as store:
        meeting._store = ("127.0.0.1", store.getsockname()[1])
        tunnel = StoreTunnel(meeting.address, SECRET)
        with socket.create_connection(("127.0.0.1", tunnel.port), 30.0) as client:
            served, _ = store.accept()
            with served:
                client.sendall(b"ask")
                assert served.recv(16) == b"ask"
                served.sendall(b"answer")
                assert client.recv(16) == b"answer"
                meeting.close()
                assert client.recv(16) == b"" and served.recv(16) == b""
        tunnel.close()
    assert {line[:8] for line in listening_at(tunnel.port)} <= {"0100007F"}


def test_it_listens_at_its_address_only_and_not_after_its_end(meeting: Meeting) -> None:
    link = GuestLink(come(meeting, hello_of()))
    assert listening_at(meeting.address[1]) == {f"0100007F:{meeting.address[1]:04X}"}
    meeting.close()
    assert not listening_at(meeting.address[1])
    words: list[Word | None] = [link.hear(30.0)]
    assert words == [Over()]
    with pytest.raises(OSError):
        come(meeting, hello_of())
    link.close()
