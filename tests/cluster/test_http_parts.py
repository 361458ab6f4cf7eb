"""Heads and chunks: what is read, and what is refused because two readers might read it differently."""

from __future__ import annotations

import contextlib
import random

import pytest

from headrace.cluster.http_parts import ChunkReader, FramingError, in_chunk, parse_answer, parse_request


def test_a_request_is_read() -> None:
    head = parse_request(b"POST /generate?x=1 HTTP/1.1\r\nHost: a\r\nContent-Length:  12 \r\nX-Y:")
    assert (head.method, head.path, head.target, head.body_size) == ("POST", "/generate", b"/generate?x=1", 12)
    assert head.headers == [(b"host", b"a"), (b"content-length", b"12"), (b"x-y", b"")] and head.keeps_alive
    assert parse_request(b"GET / HTTP/1.1\r\nTransfer-Encoding: Chunked").body_size is None
    assert not parse_request(b"GET / HTTP/1.0").keeps_alive
    assert parse_request(b"GET / HTTP/1.0\r\nConnection: Keep-Alive").keeps_alive
    assert not parse_request(b"GET / HTTP/1.1\r\nConnection: x, Close").keeps_alive


@pytest.mark.parametrize(
    "raw",
    [
        b"GET http://other/ HTTP/1.1",
        b"GET  / HTTP/1.1",
        b"GET / HTTP/2.0",
        b"get / HTTP/1.1",
        b"GET /\xc3\xa9 HTTP/1.1",
        b"GET / HTTP/1.1\r\nHost : a",
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
