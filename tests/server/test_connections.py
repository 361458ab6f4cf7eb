"""Connections of clients that take their time, come in crowds, or announce one body and send another."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import pytest
from starlette.requests import Request

from headrace.server import connections, half_closed
from headrace.server.connections import CLIENT
from headrace.server.half_closed import INTERIM
from headrace.server.limits import Limits
from headrace.server.listening import EmbeddedServer, listen
from headrace.server.waiting import WaitingCalls
from headrace.types.errors import UnavailableError
from tests.arch.source import ROOT
from tests.server.bare import GET, Bare, answer, status
from tests.server.conftest import START, Served

HUGE = 100 << 20


@pytest.fixture
def bare() -> Iterator[Callable[..., Bare]]:
    started: list[Bare] = []

    def start_bare(**options: float) -> Bare:
        started.append(Bare(**options))
        return started[-1]

    yield start_bare
    for each in started:
        each.close()


def is_closed(client: socket.socket) -> bool:
    """Waits for the server to close; what it still sends is read and forgotten."""
    with contextlib.suppress(ConnectionError):
        while client.recv(1 << 16):
            pass
    return True


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


def chunks(num_bytes: int) -> Iterator[bytes]:
    for _ in range(num_bytes >> 16):
        yield b"x" * (1 << 16)


@pytest.mark.parametrize("is_announced", [True, False])
def test_a_blocking_client_with_a_huge_body_sees_the_413(served: Served, is_announced: bool) -> None:
    """It reads nothing before it has sent everything: a connection closed meanwhile would be a reset to it."""
    client = http.client.HTTPConnection("127.0.0.1", served.handle.port, timeout=60)
    body = b"x" * HUGE if is_announced else chunks(HUGE)
    client.request("POST", "/generate", body, {"content-type": "application/json"}, encode_chunked=not is_announced)
    reply = client.getresponse()
    assert (reply.status, json.loads(reply.read())["param"]) == (413, "body")
    client.close()


def test_urllib_sees_it_too_and_without_a_key_the_401(start: START) -> None:
    served = start(api_key="key")
    for headers, expected in (({"Authorization": "Bearer key"}, 413), ({}, 401), ({"Authorization": "x"}, 401)):
        size = HUGE if expected == 413 else 20 << 20
        call = urllib.request.Request(f"{served.url}/generate", b"x" * size, headers)
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(call, timeout=60)
        assert raised.value.code == expected
        raised.value.close()


def test_chunks_beside_a_length_are_refused(bare: Callable[..., Bare]) -> None:
    server = bare()
    for length in (0, 5, 1 << 40):
        head = f"POST / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\ncontent-length: {length}\r\n\r\n"
        with server.connect(head.encode(), b"5\r\nhello\r\n0\r\n\r\n") as client:
            assert status(client) == 400
            assert is_closed(client)


def test_what_is_counted_is_what_comes(served: Served) -> None:
    """In chunks of one byte as in large ones."""
    for size in (1, 1 << 20):
        chunk = b"%x\r\n%s\r\n" % (size, b"x" * size)
        head = b"POST /generate HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
        with socket.create_connection(("127.0.0.1", served.handle.port), timeout=60) as client:
            client.sendall(head)
            with contextlib.suppress(ConnectionError):
                for _ in range(100 if size > 1 else 10):
                    client.sendall(chunk)
                client.sendall(b"0\r\n\r\n")
            assert status(client) == (413 if size > 1 else 400)


def test_headers_that_never_end_and_idle_connections_are_closed(
    bare: Callable[..., Bare], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
    monkeypatch.setattr(connections, "FIRST_BYTE_SECONDS", 0.6)
    server = bare()
    silent, slow, honest = server.connect(), server.connect(b"GET / HTTP/1.1\r\n"), server.connect(GET)
    assert status(honest) == 200
    stop = threading.Event()

    def trickle() -> None:
        with contextlib.suppress(OSError):
            while not stop.wait(0.05):
                slow.sendall(b"a: b\r\n")

    thread = threading.Thread(target=trickle)
    thread.start()
    assert is_closed(slow) and is_closed(silent)
    stop.set()
    thread.join()
    honest.sendall(GET)  # between two requests a client may rest
    assert status(honest) == 200
    honest.sendall(GET[:20])
    assert is_closed(honest)
    for each in (silent, slow, honest):
        each.close()


def test_a_crowd_of_idle_connections_keeps_nobody_out(bare: Callable[..., Bare]) -> None:
    server = bare()
    server.server.max_connections = 100
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(server.connect(b"GET / HT"))
        client = stack.enter_context(server.connect(GET))
        assert status(client) == 200
        wait_for(lambda: len(server.server.server_state.connections) <= 100)


def test_a_crowd_of_busy_connections_leaves_health_alone(bare: Callable[..., Bare]) -> None:
    server = bare()
    server.server.max_connections = 100
    with contextlib.ExitStack() as stack:
        busy = [stack.enter_context(server.connect(GET.replace(b"/health", b"/slow"))) for _ in range(100)]
        wait_for(lambda: all(not each.is_idle for each in server.server._connections()))
        wait_for(lambda: len(server.server._connections()) == 100)
        assert status(stack.enter_context(server.connect(GET.replace(b"/health", b"/other")))) == 503
        for _ in range(100):
            assert status(stack.enter_context(server.connect(GET))) == 200
        for each in busy:
            each.setblocking(False)
            with pytest.raises(BlockingIOError):
                each.recv(1)


def test_no_descriptor_left_neither_spins_nor_fills_the_log() -> None:
    """The limit of a child is filled with files; it answers again when they are closed."""
    script = """
import asyncio, os, resource, socket, sys, threading, time
from tests.server.bare import Bare, GET, status
from headrace.server import listening
listening.raise_descriptor_limit = lambda: 200
server = Bare()
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
clients = [socket.socket() for _ in range(3)]
files = []
try:
    while True:
        files.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
for client in clients:
    client.settimeout(30)
    client.connect(("127.0.0.1", server.port))
    client.sendall(GET)
used = time.process_time()
time.sleep(1)
print(time.process_time() - used)
for each in files:
    os.close(each)
print([status(client) for client in clients])
for client in clients:
    client.close()
server.close()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seconds, statuses = done.stdout.splitlines()
    assert statuses == "[200, 200, 200]"
    assert float(seconds) < 0.5
    assert done.stderr.count("\n") <= 1, done.stderr


def test_the_descriptor_limit_is_raised() -> None:
    script = """
import resource
from headrace.server.listening import raise_descriptor_limit
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
print(raise_descriptor_limit() == resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 64)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_an_answer_left_unread_is_cut_off(bare: Callable[..., Bare]) -> None:
    server = bare(write_timeout=0.3)
    with server.connect(GET.replace(b"/health", b"/long")), server.connect(GET) as other:
        assert status(other) == 200
        wait_for(lambda: len(server.server._connections()) == 1)


def test_a_server_that_is_cancelled_closes_its_sockets() -> None:
    listener = listen("127.0.0.1", 0)
    server = EmbeddedServer(Limits(answer, 1 << 20, 60.0, ["/health"]), 60.0)

    async def cancelled() -> None:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server._connections():
            await asyncio.sleep(0.005)
        serving.cancel()
        await asyncio.wait([serving])

    with socket.create_connection(listener.getsockname(), timeout=30) as client:
        asyncio.run(cancelled())
        assert listener.fileno() == -1 and is_closed(client)


def test_closing_does_not_wait_for_clients_that_never_read(bare: Callable[..., Bare]) -> None:
    server = bare()
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(server.connect(GET.replace(b"/health", b"/long")))
        wait_for(lambda: any(each.transport.get_write_buffer_size() for each in server.server._connections()))
        started = time.monotonic()
        server.close()
        assert time.monotonic() - started < 30  # their writes may take 60 s


@pytest.mark.parametrize("sent", [b"{", b""])
def test_a_client_that_leaves_inside_its_body_writes_no_traceback(
    served: Served, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    head = b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n"
    chunked = head.replace(b"content-length: 1000", b"transfer-encoding: chunked")
    for start in (head + sent, chunked + b"5\r\n{    \r\n", chunked + b"zz\r\n", b"\x00\x01\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", served.handle.port), timeout=30) as client:
            client.sendall(start)
    with socket.create_connection(("127.0.0.1", served.handle.port), timeout=30) as client:
        client.sendall(GET)
        assert status(client) == 200
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


@pytest.mark.parametrize("more", [b"\r\n", GET])
def test_a_client_that_goes_away_is_missed_whatever_it_sent_behind_its_request(
    bare: Callable[..., Bare], more: bytes
) -> None:
    server = bare()
    client = server.connect(GET.replace(b"/health", b"/slow"))
    wait_for(lambda: any(not each.is_idle for each in server.server._connections()))
    client.sendall(more)
    time.sleep(0.1)
    client.close()
    wait_for(lambda: not server.server._connections())


def rest_of(client: socket.socket) -> bytes:
    """What comes until the connection ends, without interim answers."""
    received = b""
    while data := client.recv(1 << 16):
        received += data
    return received.replace(INTERIM, b"")


@pytest.mark.parametrize("stream", [False, True])
def test_who_closes_his_sending_side_behind_his_request_is_answered(served: Served, stream: bool) -> None:
    params = {"max_new_tokens": 60, "ignore_eos": True}
    body = json.dumps({"input_ids": [1], "sampling_params": params, "stream": stream}).encode()
    ask = b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    with socket.create_connection(("127.0.0.1", served.handle.port), timeout=30) as client:
        served.engine.pause("keep")  # no answer begins before the end is there
        client.sendall(ask + ask + GET + (ask[:-1] if stream else b"GET /hea"))
        client.shutdown(socket.SHUT_WR)
        assert client.recv(len(INTERIM), socket.MSG_WAITALL) == INTERIM
        served.engine.resume()
        answers = rest_of(client).split(b"HTTP/1.1 200 OK\r\n")[1:]
    assert len(answers) == 3 and [each.count(b'"completion_tokens":60') for each in answers] == [1, 1, 0]
    assert [each.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") for each in answers] == [stream, stream, False]


def test_who_closes_his_sending_side_on_a_stream_has_left_it(served: Served) -> None:
    """Also while it says nothing, and however long he listens."""
    params = {"max_new_tokens": 900, "ignore_eos": True}
    body = json.dumps({"input_ids": [1], "sampling_params": params, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", served.handle.port), timeout=30) as client:
        client.sendall(
            b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        assert client.recv(12, socket.MSG_WAITALL) == b"HTTP/1.1 200"
        served.engine.pause("keep")
        client.shutdown(socket.SHUT_WR)
        wait_for(lambda: served.engine.metrics()["num_running"] == 0)
    served.engine.resume()


def test_who_leaves_may_ask_again_by_the_same_name_at_once(served: Served) -> None:
    body = {"input_ids": [1], "rid": "same", "sampling_params": {"max_new_tokens": 900, "ignore_eos": True}}
    for _ in range(5):
        raw = json.dumps(body).encode()
        with socket.create_connection(("127.0.0.1", served.handle.port), timeout=30) as client:
            client.sendall(
                b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%b" % (len(raw), raw)
            )
            wait_for(lambda: served.engine.metrics()["num_running"] == 1)
        again = served.http.post("/generate", json={**body, "sampling_params": {"max_new_tokens": 1}})
        assert again.status_code == 200, again.text
        wait_for(lambda: served.engine.metrics()["num_running"] == 0)


def test_who_sends_half_a_request_and_no_more_is_answered_nothing(bare: Callable[..., Bare]) -> None:
    server = bare()
    post = GET.replace(b"GET /health", b"POST /x").replace(b"\r\n\r\n", b"\r\ncontent-length: 9\r\n\r\n")
    old = GET.replace(b"health", b"slow").replace(b"1.1", b"1.0")
    chunks = post.replace(b"content-length: 9", b"transfer-encoding: chunked") + b"5\r\nhello\r\n" * 3000
    for sent in (b"", GET[:-2], post + b"x", old, chunks):
        with server.connect(sent) as client:
            client.shutdown(socket.SHUT_WR)
            assert rest_of(client) == b""
    wait_for(lambda: not server.server._connections())


def test_a_reset_that_the_last_probe_brings_is_seen(bare: Callable[..., Bare], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has read what there was says nothing more when he closes."""
    monkeypatch.setattr(half_closed, "PROBE_SECONDS", (0.3,))
    server = bare()
    with server.connect(GET.replace(b"/health", b"/slow")) as client:
        client.shutdown(socket.SHUT_WR)
        assert client.recv(len(INTERIM), socket.MSG_WAITALL) == INTERIM
    wait_for(lambda: not server.server._connections())


def test_who_closes_his_sending_side_and_is_gone_later_is_missed(
    bare: Callable[..., Bare], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half_closed, "PROBE_SECONDS", (0.05,) * 100)
    server = bare()
    with server.connect(GET.replace(b"/health", b"/slow")) as client:
        client.shutdown(socket.SHUT_WR)
        assert client.recv(len(INTERIM), socket.MSG_WAITALL) == INTERIM
        assert len(server.server._connections()) == 1
    wait_for(lambda: not server.server._connections())


def test_an_answer_that_is_still_being_taken_does_not_give_way(bare: Callable[..., Bare]) -> None:
    server = bare()
    with contextlib.ExitStack() as stack:
        slow = stack.enter_context(server.connect(GET.replace(b"/health", b"/long")))
        wait_for(lambda: any(each.transport.get_write_buffer_size() for each in server.server._connections()))
        server.server.max_connections = 1
        for _ in range(10):
            stack.enter_context(server.connect(b"GET / HT"))
        reply = http.client.HTTPResponse(slow)
        reply.begin()
        assert len(reply.read()) > 1 << 24


@pytest.mark.parametrize("leaves", [False, True])
def test_what_came_to_its_end_in_the_moment_the_client_left_is_undone(leaves: bool) -> None:
    """No task is left to cancel then, and nobody reads the reply."""
    undone: list[int] = []

    class Client:
        is_gone = False
        on_lost: Callable[[], None] | None = None

        async def verdict(self) -> None:
            """Only then it is known that he did not merely stop sending."""
            self.is_gone = leaves

    client = Client()

    async def call() -> int:
        return 7

    async def regret(value: int) -> None:
        undone.append(value)

    async def run() -> int:
        request = Request({"type": "http", "state": {CLIENT: client}})
        return await WaitingCalls(lambda: None).run(request, call(), regret)

    if leaves:
        with pytest.raises(UnavailableError):
            asyncio.run(run())
    else:
        assert asyncio.run(run()) == 7
    assert undone == ([7] if leaves else [])
