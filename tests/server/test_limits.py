"""Bounds at the door: sizes, and how long a client may take."""

from __future__ import annotations

import asyncio
import functools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from starlette.types import Message

from headrace.config.json_bounds import JsonBounds, excess
from headrace.server import limits, wire
from headrace.server.connections import CLIENT
from headrace.server.errors import error_body, respond
from headrace.server.limits import Limits
from headrace.server.options import ServerOptions
from headrace.text import INLINE_CHARACTERS
from headrace.types.errors import ConfigError
from tests.server.conftest import START, Served

HUGE = 100 << 20


def exchange(served: Served, *parts: bytes) -> bytes:
    """What the server answers to raw bytes, until it closes or is silent."""
    with socket.create_connection(("127.0.0.1", served.handle.port), timeout=10) as connection:
        for part in parts:
            connection.sendall(part)
        received = b""
        while b"\r\n\r\n" not in received:
            data = connection.recv(65536)
            if not data:
                break
            received += data
        return received


def test_an_announced_huge_body_is_refused_before_it_is_sent(served: Served) -> None:
    head = f"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: {HUGE}\r\n\r\n".encode()
    assert exchange(served, head).startswith(b"HTTP/1.1 413 ")
    absurd = b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999999999999999\r\n\r\n"
    assert exchange(served, absurd)[9:10] == b"4"


@pytest.fixture(scope="module")
def small(served: Served) -> Iterator[Served]:
    """The shared engine, served by another that takes bodies of 1 MiB."""
    found = Served(served.engine, max_body_bytes=1 << 20)
    yield found
    found.close()


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/continue_generation"])
def test_a_huge_body_is_413(small: Served, path: str) -> None:
    reply = small.http.post(path, content=b"x" * (1 << 21), headers={"content-type": "application/json"})
    assert reply.status_code == 413
    assert reply.json()["param"] == "body"


def test_a_huge_body_that_nobody_reads_is_not_waited_for(served: Served) -> None:
    for line, status in ((b"POST /nothing", b"404"), (b"GET /model_info", b"200")):
        head = line + f" HTTP/1.1\r\nhost: localhost\r\ncontent-length: {HUGE}\r\n\r\n".encode()
        answer = exchange(served, head)
        assert answer.split()[1] == status and b"connection: close" in answer


def test_an_unannounced_huge_body_is_413(start: START) -> None:
    served = start(max_body_bytes=1 << 20)

    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b"x" * (1 << 16)

    reply = httpx.post(f"{served.url}/generate", content=chunks(), timeout=30)
    assert reply.status_code == 413
    assert served.generate(input_ids=[1], sampling_params={"max_new_tokens": 1})["output_ids"]


def test_huge_headers_are_refused(served: Served) -> None:
    big = b"POST /generate HTTP/1.1\r\nhost: localhost\r\nx-big: " + b"y" * (1 << 20)
    assert exchange(served, big[: 1 << 17]).split()[1] in (b"400", b"431")
    query = served.http.get("/v1/loads?include=" + "z" * 20_000)
    assert query.status_code == 431


def test_a_body_that_does_not_come_is_given_up(start: START) -> None:
    served = start(body_timeout=0.2)
    head = b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n{"
    assert exchange(served, head).startswith(b"HTTP/1.1 408 ")


def test_what_is_no_http_is_refused(served: Served) -> None:
    assert exchange(served, b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert exchange(served, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n").startswith(b"HTTP/1.1 200 ")


def threads_of(served: Served, monkeypatch: pytest.MonkeyPatch, method: str) -> Callable[[], set[bool]]:
    """Says whether the tokenizer's `method` was called on the engine's loop since it was last asked."""
    tokenizer, loop = served.engine.asynchronous.tokenizer, served.engine.asynchronous.loop
    original, seen = getattr(tokenizer, method), list[int]()

    def noted(*args: Any) -> Any:
        seen.append(threading.get_ident())
        return original(*args)

    async def identify() -> int:
        return threading.get_ident()

    def were_on_the_loop() -> set[bool]:
        own = asyncio.run_coroutine_threadsafe(identify(), loop).result()
        found = {thread == own for thread in seen}
        seen.clear()
        return found

    monkeypatch.setattr(tokenizer, method, noted)
    return were_on_the_loop


@pytest.mark.parametrize(
    ("path", "field", "more"),
    [
        ("/generate", "text", {"sampling_params": {"max_new_tokens": 0}}),
        ("/v1/completions", "prompt", {"max_tokens": 0}),
        ("/tokenize", "prompt", {}),
    ],
)
def test_long_lists_of_texts_are_encoded_off_the_loop(
    served: Served, monkeypatch: pytest.MonkeyPatch, path: str, field: str, more: dict[str, Any]
) -> None:
    were_on_the_loop = threads_of(served, monkeypatch, "encode")
    text = "a" * 1000
    for count, expected in ((2, {True}), (INLINE_CHARACTERS // len(text) + 1, {False})):
        served.http.post(path, json={field: [text] * count, **more}).raise_for_status()
        assert were_on_the_loop() == expected


def test_long_lists_of_ids_are_decoded_off_the_loop(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    were_on_the_loop = threads_of(served, monkeypatch, "decode")
    for count, expected in ((2, {True}), (INLINE_CHARACTERS // 1000 + 1, {False})):
        rows = [[5] * 1000] * count
        for tokens in (rows, [token for row in rows for token in row]):
            served.http.post("/detokenize", json={"tokens": tokens}).raise_for_status()
            assert were_on_the_loop() == expected


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/generate", {"text": ["a"] * 9}, "text"),
        ("/generate", {"text": ["a"] * 3, "sampling_params": {"n": 3}}, "text"),
        ("/v1/completions", {"prompt": ["a"] * 9}, "prompt"),
    ],
)
def test_too_many_prompts_are_refused_before_they_are_encoded(
    start: START, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], field: str
) -> None:
    served = start(settings={"max_running_requests": 4, "max_waiting_requests": 4})
    were_on_the_loop = threads_of(served, monkeypatch, "encode")
    reply = served.http.post(path, json=body)
    assert (reply.status_code, reply.json()["param"]) == (400, field)
    assert were_on_the_loop() == set()


@pytest.mark.parametrize(("status", "bound"), [(200, limits.LINGER_BYTES), (401, limits.STRANGER_LINGER_BYTES)])
def test_framing_counts_where_a_body_is_read_and_forgotten(status: int, bound: int) -> None:
    """Each part brings a mebibyte of framing and one byte."""
    num_parts, sent = 0, list[Message]()

    class Client:
        is_crowded = has_all = is_lingering = False

        @property
        def num_received(self) -> int:
            return num_parts << 20

    async def receive() -> Message:
        nonlocal num_parts
        num_parts += 1
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "path": "/x",
        "raw_path": b"/x",
        "query_string": b"",
        "headers": [(b"transfer-encoding", b"chunked")],
        "state": {CLIENT: Client()},
    }
    app = Limits(respond(error_body(status, "early")), 1 << 20, 60.0)
    asyncio.run(app(scope, receive, send))
    assert num_parts << 20 <= bound + (1 << 20)
    assert sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


def test_huge_bodies_are_decoded_one_at_a_time_and_others_meanwhile(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the generation route, and of a control call: each is the only one, and a small one does not wait for it."""
    held = threading.Semaphore(0)
    counts: list[int] = []
    num_inside = 0

    def slow_excess(raw: bytes, bounds: JsonBounds) -> str | None:
        nonlocal num_inside
        if len(raw) > 1 << 20:
            num_inside += 1
            counts.append(num_inside)
            held.acquire(timeout=30)
            num_inside -= 1
        return excess(raw, bounds)

    monkeypatch.setattr(wire, "excess", slow_excess)
    huge = b'{"input_ids": "' + b"x" * (1 << 20) + b'"}'
    paths = ("/generate", "/abort_request", "/generate")
    with ThreadPoolExecutor(len(paths)) as pool:
        post = functools.partial(httpx.post, content=huge, headers={"content-type": "application/json"}, timeout=60)
        replies = [pool.submit(post, served.url + path) for path in paths]
        for number, _ in enumerate(paths, 1):
            while len(counts) < number:
                time.sleep(0.01)
            for _ in range(3):
                assert served.generate(input_ids=[1, 2], sampling_params={"max_new_tokens": 1})
            held.release()
        assert [reply.result().status_code for reply in replies] == [400, 200, 400]
    assert counts == [1, 1, 1]


@pytest.mark.parametrize("name", ["body_timeout", "write_timeout"])
def test_a_client_is_given_some_time(name: str) -> None:
    for value in (0, -1, 1e10):
        with pytest.raises(ConfigError) as caught:
            ServerOptions.from_dict({name: value})
        assert caught.value.field == name
    assert ServerOptions(drain_timeout=0).drain_timeout == 0
