"""Heads and chunks: what is read, and what is refused because two readers might read it differently."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable

import pytest

from headrace.cluster.http_parts import (
    ChunkReader,
    FramingError,
    Head,
    HeadReader,
    in_chunk,
    parse_answer,
    parse_request,
)


def test_a_request_is_read() -> None:
    head = parse_request(b"POST /generate?x=1 HTTP/1.1\r\nHost: a\r\nContent-Length:  12 \r\nX-Y:")
    assert (head.method, head.path, head.target, head.body_size) == ("POST", "/generate", b"/generate?x=1", 12)
    assert head.headers == [(b"host", b"a"), (b"content-length", b"12"), (b"x-y", b"")] and head.keeps_alive
    assert parse_request(b"GET / HTTP/1.1\r\nTransfer-Encoding: Chunked").body_size is None
    assert not parse_request(b"GET / HTTP/1.0").keeps_alive
    assert parse_request(b"GET / HTTP/1.0\r\nConnection: Keep-Alive").keeps_alive
    assert not parse_request(b"GET / HTTP/1.1\r\nConnection: x, Close").keeps_alive
    assert parse_request(b"PUT / HTTP/1.1\r\nExpect: 100-Continue").expects_continue
    assert not parse_request(b"PUT / HTTP/1.0\r\nExpect: 100-Continue").expects_continue


@pytest.mark.parametrize(
    "raw",
    [
        b"GET http://other/ HTTP/1.1",
        b"GET  / HTTP/1.1",
        b"GET / HTTP/2.0",
        b"get / HTTP/1.1",
        b"GET /\xc3\xa9 HTTP/1.1",
        b"GET / HTTP/1.1\r\nHost : a",
        b"GET / HTTP/1.1\r\nHost: a\r\nhost: b",
        b"GET / HTTP/1.1\r\n folded: a",
        b"GET / HTTP/1.1\r\na: b\n c: d",
        b"GET / HTTP/1.1\r\na: b\rc",
        b"GET / HTTP/1.1\r\na: \0",
        b"GET / HTTP/1.1\r\nno colon",
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1",
        b"POST / HTTP/1.1\r\nContent-Length: +1",
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked",
        b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked",
        b"GET / HTTP/1.1" + b"\r\na: b" * 300,
    ],
)
def test_what_might_be_read_in_two_ways_is_refused(raw: bytes) -> None:
    with pytest.raises(FramingError):
        parse_request(raw)


def test_an_answer_is_read() -> None:
    assert parse_answer(b"HTTP/1.1 204 No Content").body_size == 0
    assert parse_answer(b"HTTP/1.1 200\r\nContent-Length: 3").body_size == 3
    chunked = parse_answer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked")
    assert chunked.body_size is None and not chunked.ends_with_connection
    assert parse_answer(b"HTTP/1.1 200 OK").ends_with_connection


def shown(read: Callable[[bytes], Head], raw: bytes) -> object:
    """What is read: the fields but for a content-length among the headers, or the error."""
    try:
        head = read(raw)
    except FramingError as error:
        return str(error), error.status
    headers = [header for header in head.headers if header[0] != b"content-length"]
    return headers, [getattr(head, field) for field in Head.__struct_fields__ if field not in ("headers", "_derived")]


LINES = [
    *(b"content-length: 5", b"Content-Length: 12", b"content-length:7", b"CONTENT-LENGTH: 0", b"content-length:  9 "),
    *(b"content-length: +1", b"content-length: 1234567890123456", b"x: content-length: 4", b"content-length: "),
    *(b"host: a", b"connection: close", b"transfer-encoding: chunked", b"expect: 100-continue", b"x-content-length: 3"),
]


@pytest.mark.parametrize(
    ("parse", "firsts"),
    [
        (parse_request, [b"POST /generate HTTP/1.1", b"GET / HTTP/1.0"]),
        (parse_answer, [b"HTTP/1.1 200 OK", b"HTTP/1.1 204 No Content", b"HTTP/1.0 200 OK"]),
    ],
)
def test_a_head_that_comes_again_is_read_as_the_first_time(parse: Callable[[bytes], Head], firsts: list[bytes]) -> None:
    """Heads that often differ in nothing but their content-length, where it stands, or whether it may be believed."""
    words, num_again = random.Random(1), 0
    for _ in range(300):
        reader, before = HeadReader(parse), None
        common = words.sample(LINES[9:], words.randrange(3))
        for _ in range(12):
            lines = [*common, *words.choices(LINES[:9], k=words.choice([0, 1, 1, 1, 1, 2]))]
            raw = b"\r\n".join([words.choice(firsts[:1] * 5 + firsts), *lines])
            assert shown(reader.read, raw) == shown(parse, raw), raw
            with contextlib.suppress(FramingError):
                head = reader.read(raw)
                num_again += head.headers is before
                before = head.headers
    assert num_again > 100


def test_a_size_that_is_no_number_is_no_part_of_the_line_before() -> None:
    reader = HeadReader(parse_request)
    assert reader.read(b"POST / HTTP/1.1\r\nhost: ax\r\ncontent-length: 5").body_size == 5
    with pytest.raises(FramingError):
        reader.read(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5x")


def test_what_is_derived_of_a_head_is_shared_by_those_of_another_size_alone() -> None:
    reader, asked = HeadReader(parse_request), list[bytes]()

    def host(head: Head) -> bytes:
        asked.append(head.header(b"host"))
        return asked[-1]

    for size in (3, 5, 3):
        head = reader.read(b"POST / HTTP/1.1\r\ncontent-length: %d\r\nhost: a" % size)
        assert (head.derived(host), head.body_size, head.headers) == (b"a", size, [(b"host", b"a")])
    assert reader.read(b"POST / HTTP/1.1\r\ncontent-length: 3\r\nhost: b").derived(host) == b"b"
    assert asked == [b"a", b"b"]
    assert head.changed(headers=[(b"host", b"c")]).derived(host) == b"c" and head.derived(host) == b"a"


def test_chunks_are_the_same_however_they_come() -> None:
    for seed in range(300):
        words = random.Random(seed)
        chunks = [words.randbytes(words.randrange(1, 300)) for _ in range(words.randrange(6))]
        raw = b"".join(map(in_chunk, chunks)) + b"0\r\n" + b"trailer: x\r\n" * words.randrange(2) + b"\r\nnext"
        reader, buffer, found = ChunkReader(1 << 20), bytearray(), []
        while raw:
            size = words.randrange(1, 100)
            buffer += raw[:size]
            raw = raw[size:]
            if not reader.is_complete:
                found += reader.read(buffer)
        assert found == chunks and reader.is_complete and buffer == b"next"


@pytest.mark.parametrize(
    "raw", [b"x\r\n", b"-1\r\n", b"1\r\nab\r\n", b"3 4\r\nabc\r\n", b"f" * 300, b"0\r\n" + b"a: b\r\n" * 300]
)
def test_chunks_that_are_none_are_refused(raw: bytes) -> None:
    with pytest.raises(FramingError):
        ChunkReader(1 << 20).read(bytearray(raw))


def test_a_body_over_its_bound_is_413_and_one_of_framing_is_wasteful() -> None:
    with pytest.raises(FramingError) as caught:
        ChunkReader(10).read(bytearray(b"ffffffff\r\n"))
    assert caught.value.status == 413
    reader = ChunkReader(1 << 20)
    reader.read(bytearray(b"1\r\nx\r\n" * 3000))
    assert reader.is_wasteful


def test_random_bytes_are_read_or_refused() -> None:
    for seed in range(2000):
        words = random.Random(seed)
        raw = bytes(words.choice(b"GET / HTTP/1.1\r\n: 0123456789abcdef;") for _ in range(words.randrange(80)))
        for read in (parse_request, parse_answer, lambda raw: ChunkReader(1 << 20).read(bytearray(raw))):
            with contextlib.suppress(FramingError):
                read(raw)
