"""What a client may send around its bytes: chunks, headers, trailers, paths; and whose turn it is to be parsed."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable

import h11
import pytest

from headrace.server.framing import (
    FRAMING_PER_BYTE,
    FREE_FRAMING_BYTES,
    MAX_HEADERS,
    SLICE_LINES,
    Parser,
    ParsingQueue,
)
from tests.server.conftest import START, Served
from tests.server.test_limits import exchange

HEAD = b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"


def status_of(served: Served, *parts: bytes) -> int:
    return int(exchange(served, *parts).split()[1])


def chunks(parts: Iterable[bytes]) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def test_the_head_of_a_reply_goes_with_its_first_bytes() -> None:
    for body in ([h11.Data(data=b"ab"), h11.Data(data=b"c")], []):
        parser = Parser(None)
        parser.receive_data(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        while parser.next_event() is not h11.NEED_DATA and parser.their_state is not h11.DONE:
            pass
        length = b"%d" % (3 if body else 0)
        assert parser.send(h11.Response(status_code=200, headers=[(b"content-length", length)])) == b""
        first, *others = [parser.send(event) for event in (*body, h11.EndOfMessage())]
        assert first == b"HTTP/1.1 200 \r\ncontent-length: " + length + b"\r\n\r\n" + (b"ab" if body else b"")
        assert others == ([b"c", b""] if body else [])


def answering(version: bytes, headers: list[tuple[str, str]]) -> Parser:
    """A parser that has sent the head of an answer."""
    parser = Parser(None)
    parser.receive_data(b"GET / HTTP/" + version + b"\r\nhost: a\r\n\r\n")
    while parser.next_event() is not h11.NEED_DATA and parser.their_state not in (h11.DONE, h11.MUST_CLOSE):
        pass
    parser.send(h11.Response(status_code=200, headers=headers))
    return parser


@pytest.mark.parametrize(
    ("version", "headers"), [(b"1.1", []), (b"1.0", []), (b"1.1", [("content-length", "6")])], ids=str
)
def test_a_further_part_is_what_h11_makes_of_it(version: bytes, headers: list[tuple[str, str]]) -> None:
    ours, theirs = (answering(version, headers) for _ in range(2))
    for data in (b"ab", b"", b"cde", b"f"):
        assert ours.part(data) == theirs.send(h11.Data(data=data))
    assert ours.send(h11.EndOfMessage()) == theirs.send(h11.EndOfMessage())
    for parser in (ours, theirs):
        with pytest.raises(h11.LocalProtocolError):
            parser.part(b"g")


def test_a_body_that_is_hardly_anything_but_framing_is_refused(served: Served) -> None:
    assert status_of(served, CHUNKED, b"1\r\n \r\n" * 18_000) == 400
    assert status_of(served, CHUNKED, b"1;" + b"x" * 20_000 + b"\r\n") == 400
    assert status_of(served, CHUNKED, b"0\r\n" + b"x: y\r\n" * 1000) == 400


def test_so_it_is_without_a_key(start: START) -> None:
    """Its answer comes at once; the connection then ends, though the body does not."""
    served = start(api_key="k")
    reply = exchange(served, CHUNKED, b"1\r\n \r\n" * 1000)
    assert b" 401 " in reply and b"connection: close" in reply.lower()


@pytest.mark.parametrize("size", [1, 3, 70, 5_000, 200_000])
def test_bodies_in_chunks_of_any_size_are_read(served: Served, size: int) -> None:
    padding = b" " * (600 if size == 1 else 200 * size)
    body = b'{"input_ids": [5],' + padding + b'"sampling_params": {"max_new_tokens": 1}}'
    whole = chunks(body[i : i + size] for i in range(0, len(body), size))
    assert status_of(served, CHUNKED, whole) == 200


def test_two_requests_may_come_at_once(served: Served) -> None:
    body = b'{"input_ids": [5], "sampling_params": {"max_new_tokens": 1}}'
    first = CHUNKED + chunks([body])
    second = HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    with socket.create_connection(("127.0.0.1", served.handle.port), timeout=20) as client:
        client.sendall(first + first + second)
        received = b""
        while data := client.recv(1 << 16):
            received += data
    assert received.count(b"HTTP/1.1 200 ") == 3


def test_the_number_of_headers_is_bounded(served: Served) -> None:
    def get(count: int) -> bytes:
        return b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + b"a: b\r\n" * count + b"\r\n"

    assert status_of(served, get(MAX_HEADERS - 10)) == 200
    assert status_of(served, get(MAX_HEADERS + 10)) == 431
    body = b'{"input_ids": [5],' + b"\n" * 1000 + b'"sampling_params": {"max_new_tokens": 1}}'
    lines = HEAD.replace(b"\r\n", b"\n") + b"content-length: %d\n\n" % len(body)
    assert status_of(served, lines + body) == 200  # lines of the body are none


def test_a_long_path_is_refused_as_what_it_is(served: Served) -> None:
    for size, expected in ((9_000, (414,)), (70_000, (414, 431)), (200_000, (414, 431))):
        assert status_of(served, b"GET /" + b"a" * size + b" HTTP/1.1\r\nhost: localhost\r\n\r\n") in expected


def test_no_length_is_no_body_however_it_is_written(served: Served) -> None:
    head = b"POST /continue_generation HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
    assert status_of(served, head + b"content-length: 00\r\n\r\n") == status_of(
        served, head + b"content-length: 0\r\n\r\n"
    )


def test_chunks_are_cut_into_slices_of_few_lines() -> None:
    parser = Parser(None)
    waiting = bytearray(CHUNKED + b"1\r\n \r\n" * 50_000)
    assert parser.size_of_slice(waiting) == len(CHUNKED)
    parser.receive_data(bytes(waiting[: len(CHUNKED)]))
    assert isinstance(parser.next_event(), h11.Request)
    del waiting[: len(CHUNKED)]
    assert 0 < waiting[: parser.size_of_slice(waiting)].count(b"\n") <= SLICE_LINES
    num_chunks = 0
    while not parser.is_wasteful:
        size = parser.size_of_slice(waiting)
        parser.receive_data(bytes(waiting[:size]))
        del waiting[:size]
        while parser.next_event() is not h11.NEED_DATA:
            num_chunks += 1
    assert num_chunks <= FREE_FRAMING_BYTES // (5 - FRAMING_PER_BYTE) + SLICE_LINES


def test_connections_are_parsed_in_turn() -> None:
    seen: list[str] = []

    class Sender:
        def __init__(self, name: str, count: int) -> None:
            self.name, self.count = name, count

        def parse_some(self) -> bool:
            seen.append(self.name)
            self.count -= 1
            queue.add(self)  # as when the application asks for more meanwhile
            return self.count > 0

    queue = ParsingQueue()

    async def run() -> None:
        for sender in (Sender("a", 4), Sender("b", 2)):
            queue.add(sender)
            queue.add(sender)
        while len(seen) < 6:
            await asyncio.sleep(0)

    asyncio.run(run())
    assert seen[:4] == ["a", "b", "a", "b"]
