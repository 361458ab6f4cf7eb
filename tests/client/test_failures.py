"""What a client tells of a server that is slow, gone, somebody else's, or that refuses it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from headrace import (
    AsyncClient,
    Client,
    ConfigError,
    DeadlineError,
    Engine,
    HeadraceError,
    NotFoundError,
    RequestError,
    Runtime,
    ShutdownError,
    UnavailableError,
    UnreachableError,
    WeightUpdateError,
)
from headrace.client.transport import HttpCall, _raise_for
from tests.arch.source import ROOT, child_environment
from tests.client.conftest import CONFIG, CONNECT, left_in_shared_memory
from tests.processes import runs

NORM = "model.norm.weight"
LONG: dict[str, Any] = {"max_new_tokens": 900, "ignore_eos": True}


@contextlib.contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server of one's own that does this with each connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, contextlib.suppress(OSError):
                        connection.recv(65536)
                        answer(connection)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def raised(call: Callable[..., Any], *arguments: Any, **options: Any) -> HeadraceError:
    with pytest.raises(HeadraceError) as caught:
        call(*arguments, **options)
    return caught.value


def raised_by_both(url: str, **options: Any) -> HeadraceError:
    """The error of a call, which is the same of both clients."""

    async def call() -> None:
        async with AsyncClient(url, **options) as client:
            await client.generate(input_ids=[1])

    with Client(url, **options) as client:
        ours, theirs = raised(lambda: client.generate(input_ids=[1])), raised(lambda: asyncio.run(call()))
    assert (type(ours), ours.field) == (type(theirs), theirs.field)
    assert "generate" in ours.message and "generate" in theirs.message
    return ours


def test_nobody_at_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    error = raised_by_both(url)
    assert type(error) is UnreachableError and isinstance(error, UnavailableError) and error.retryable


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf", b"nonsense\r\n\r\n", b"HTTP/1.1 200"]
)
def test_an_answer_that_breaks_off(answer: bytes) -> None:
    with answering(lambda connection: connection.sendall(answer)) as url:
        assert type(raised_by_both(url)) is UnreachableError


def test_a_stream_that_ends_without_its_last_part() -> None:
    part = b"\x04\x00\x00\x00\x93\x90\xc0\xc2"  # [[], None, False], behind its length
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s" % (len(part), part)
    with answering(lambda connection: connection.sendall(answer)) as url, Client(url) as client:
        assert type(raised(lambda: list(client.stream(input_ids=[1])))) is UnreachableError


def test_a_server_that_is_silent_or_trickles_meets_the_deadline() -> None:
    def trickle(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
        for _ in range(2000):
            connection.sendall(b"x")
            time.sleep(0.01)

    def be_silent(connection: socket.socket) -> None:
        while connection.recv(65536):
            pass

    for answer in (be_silent, trickle):
        with answering(answer) as url:
            error = raised_by_both(url, timeout=0.4)
            assert type(error) is DeadlineError and error.field == "timeout" and error.retryable


def test_somebody_else_s_server() -> None:
    def page(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 404 Not Found\r\ncontent-length: 6\r\nconnection: close\r\n\r\n<html>")

    with answering(page) as url:
        assert type(raised_by_both(url)) is NotFoundError
    reply = b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\nconnection: close\r\n\r\n<html>"
    with answering(lambda connection: connection.sendall(reply)) as url, Client(url) as client:
        assert raised(lambda: client.generate(input_ids=[1])).field == "url"


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:3000", "ftp://a", "http://", "http://a\0b", 7, "http://me:key@a", "http://a/?b=c"]
)
def test_what_is_no_address(url: Any) -> None:
    for kind in (Client, AsyncClient):
        assert (type(error := raised(kind, url)), error.field) == (ConfigError, "url")


def test_what_is_no_setting() -> None:
    wrong: dict[str, Any] = {"api_key": "", "admin_key": "a\nb", "timeout": 0}
    for field, value in wrong.items():
        assert raised(Client, "http://127.0.0.1:1", **{field: value}).field == field


def test_a_client_that_is_closed_or_on_another_loop(connect: CONNECT) -> None:
    client = connect()
    client.close()
    client.close()
    url, other = client.url, AsyncClient(client.url)
    for call in (client.status, lambda: list(client.stream(input_ids=[1]))):
        assert type(raised(call)) is ShutdownError

    async def pieces() -> list[Any]:
        return [piece async for piece in other.stream(input_ids=[1])]

    with asyncio.Runner() as first:
        assert first.run(other.status()).state == "ready"
        for ask in (other.status, other.status, pieces):
            assert "another event loop" in raised(lambda ask=ask: asyncio.run(ask())).message
        first.run(other.close())

    async def closed() -> None:
        async with AsyncClient(url) as left:
            await left.status()
        await left.status()

    assert type(raised(lambda: asyncio.run(closed()))) is ShutdownError


def test_a_stream_ends_with_its_client(connect: CONNECT) -> None:
    params = {"max_new_tokens": 900, "ignore_eos": True}
    client = connect()
    pieces = client.stream(input_ids=[1], sampling_params=params)
    next(pieces)
    client.close()
    assert type(raised(lambda: list(pieces))) is ShutdownError

    async def closed() -> None:
        other = AsyncClient(client.url)
        stream = other.stream(input_ids=[1], sampling_params=params)
        await anext(stream)
        await other.close()
        async for _ in stream:
            pass

    assert type(raised(lambda: asyncio.run(closed()))) is ShutdownError


@pytest.mark.parametrize("name", ["x" * 1025, "\ud800"])
def test_a_name_that_no_tensor_has(connect: CONNECT, engine: Engine, name: str) -> None:
    pairs = [(name, np.zeros(1, np.float32))]
    for target in (engine, connect()):
        session = target.begin_update("never", None)
        for error in (
            raised(target.stage, session, pairs),
            raised(target.update_weights_from_tensor, pairs, "never"),
            raised(target.update_weights_from_bucket, pairs, "never"),
        ):
            assert (type(error), error.field) == (WeightUpdateError, "named_tensors") and len(error.message) < 200
        target.abort_update()


def test_a_call_ends_with_its_client(connect: CONNECT) -> None:
    """Though another thread waits in it, behind a pause; the server drops its request."""
    watch, client = connect(), connect()
    watch.pause()
    found: list[Exception] = []
    thread = threading.Thread(target=lambda: found.append(raised(lambda: client.generate(input_ids=[1]))))
    thread.start()
    deadline = time.monotonic() + 30
    while not watch.status().num_waiting:
        assert time.monotonic() < deadline
    client.close()
    thread.join(30)
    assert [type(each) for each in found] == [ShutdownError]
    while watch.status().num_waiting:
        assert time.monotonic() < deadline
    watch.resume()

    async def closed() -> Exception:
        other = AsyncClient(client.url)
        call = asyncio.create_task(other.generate(input_ids=[1], sampling_params={"max_new_tokens": 900}))
        while not (await other.status()).num_running:
            pass
        await other.close()
        [found] = await asyncio.gather(call, return_exceptions=True)
        assert isinstance(found, Exception)
        return found

    assert type(asyncio.run(closed())) is ShutdownError


@pytest.fixture(scope="module")
def runtimes() -> Iterator[list[Runtime]]:
    started: list[Runtime] = []
    yield started
    for each in started:
        each.close()


@pytest.fixture
def runtime(model_folder: Path, runtimes: list[Runtime]) -> Runtime:
    """One for all tests, until one of them ends it."""
    if not runtimes or not runs(runtimes[-1].pid):
        runtimes.append(Runtime(model_folder, **CONFIG))
    return runtimes[-1]


def test_a_fork_has_connections_of_its_own(runtime: Runtime) -> None:
    def answer(first: int) -> list[int]:
        params = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
        return runtime.generate(input_ids=[first] * 5, sampling_params=params)[0].token_ids

    expected = {first: answer(first) for first in (1, 2)}
    assert expected[1] != expected[2]
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):  # whatever it is, pytest is not to go on here
            os._exit(0 if all(answer(2) == expected[2] for _ in range(20)) else 1)
        os._exit(2)
    answers = [answer(1) for _ in range(20)]
    assert os.waitpid(child, 0)[1] == 0 and answers == [expected[1]] * 20


def test_a_status_without_a_class_of_ours() -> None:
    call = HttpCall(name="generate", path="/", key=None, timeout=1.0)
    for status, kind in ((503, UnavailableError), (403, RequestError), (500, HeadraceError)):
        error = raised(_raise_for, call, status, b"<html>")
        assert type(error) is kind and not error.retryable and str(status) in error.message
    busy = b'{"message": "the engine is starting", "retryable": true}'
    assert raised(_raise_for, call, 503, busy).retryable


def test_keys(connect: CONNECT) -> None:
    both = connect({"api_key": "data", "admin_key": "admin"}, api_key="data", admin_api_key="admin")
    assert both.generate(input_ids=[1], sampling_params={"max_new_tokens": 1}) and both.digest() and both.health()
    data, wrong, none = (Client(both.url, key) for key in ("data", "wrong", None))
    with data, wrong, none:
        assert data.status().state == "ready" and none.health()
        session = both.begin_update("b", [(NORM, (32,), "float32")], partial=True)
        for call in (
            *(data.digest, data.resume, data.pause, data.flush_cache, lambda: data.get_weights_by_name(NORM)),
            *(data.abort_update, lambda: data.set_weight_version("x"), lambda: data.abort(all=True)),
            *(lambda: data.update_weights_from_disk("/", "x"), lambda: data.weights_checker("snapshot")),
            *(lambda: data.begin_update("x", []), lambda: data.commit(session)),
            lambda: data.update_weights_from_tensor({NORM: np.zeros(32, np.float32)}, "x", partial=True),
        ):
            assert (type(error := raised(call)), error.field) == (ConfigError, "api_key")
        for client in (wrong, none):
            for error in (raised(client.status), raised(client.metrics), raised(client.generate, input_ids=[1])):
                assert (type(error), error.field) == (ConfigError, "api_key")
    with Client(both.url, "data", "wrong") as client:
        assert raised(client.digest).field == "admin_key"


def test_a_call_that_is_late_leaves_nothing_running(connect: CONNECT, engine: Engine) -> None:
    client = connect({"timeout": 0.3})
    engine.pause("keep")
    for call, name in (
        (lambda: client.generate(input_ids=[1, 2], sampling_params=LONG), "generate"),
        (lambda: client.score(input_ids=[1, 2]), "score"),
        (lambda: list(client.stream(input_ids=[1, 2], sampling_params=LONG)), "stream"),
    ):
        error = raised(call)
        assert type(error) is DeadlineError and error.field == "timeout" and error.message.startswith(name)
    idle(engine)
    engine.resume()


def idle(engine: Engine) -> None:
    deadline = time.monotonic() + 30
    while (status := engine.status()).num_waiting + status.num_running:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_stream_that_is_left_is_dropped(connect: CONNECT, engine: Engine) -> None:
    client = connect()
    for _ in client.stream(input_ids=[[1, 2]] * 4, sampling_params=LONG):
        break
    idle(engine)

    async def leave() -> None:
        async with AsyncClient(client.url) as other:
            task = asyncio.create_task(other.generate(input_ids=[1, 2], sampling_params=LONG))
            await asyncio.sleep(0.2)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            async with contextlib.aclosing(other.stream(input_ids=[1, 2], sampling_params=LONG)) as pieces:
                await anext(pieces)

    asyncio.run(leave())
    idle(engine)


def test_an_update_that_fails_leaves_no_session(connect: CONNECT, engine: Engine) -> None:
    client, before = connect(), engine.digest()
    bad = {NORM: np.full(32, np.nan, np.float32)}
    assert raised(client.update_weights_from_tensor, bad, "b", partial=True).field == NORM
    assert not engine.status().updating

    async def leave() -> None:
        async with AsyncClient(client.url) as other:
            task = asyncio.create_task(_stalling_update(other))
            await asyncio.sleep(0.3)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            assert not engine.status().updating, "it is over before the caller hears of it"

    asyncio.run(leave())
    assert engine.digest() == before


async def _stalling_update(client: AsyncClient) -> None:
    """One that never comes to its commit, but is cancelled before."""
    client._uploads.stage = _never  # type: ignore[assignment, method-assign]
    await client.update_weights_from_tensor({NORM: np.ones(32, np.float32)}, "b", partial=True)


async def _never(*_: object) -> None:
    await asyncio.Event().wait()


def test_an_error_of_the_engine_keeps_its_class_in_a_stream(connect: CONNECT, engine: Engine) -> None:
    client = connect()
    pieces = client.stream(input_ids=[1, 2], sampling_params=LONG)
    next(pieces)
    engine.shutdown()
    with contextlib.suppress(ShutdownError, UnreachableError):
        last = [piece.finish_reason for piece in pieces][-1]
        assert last == "abort"


STAGER = """
import os, signal, sys
import numpy as np
from headrace import Client
client = Client(sys.argv[1], sys.argv[2], shares_memory=sys.argv[3] == "yes")
norm, other = ("model.norm.weight", (32,), "float32"), ("model.layers.0.input_layernorm.weight", (32,), "float32")
session = client.begin_update("dead", [norm, other], partial=True, timeout=1.0)
client.stage(session, {norm[0]: np.ones(32, np.float32)})
def dying():
    yield other[0], np.ones(32, np.float32)
    os.kill(os.getpid(), signal.SIGKILL)
client.stage(session, dying())
"""


@pytest.mark.parametrize("shares_memory", ["yes", "no"])
def test_a_client_killed_in_a_stage_leaves_its_session_to_its_deadline(
    runtime: Runtime, model_folder: Path, shares_memory: str
) -> None:
    before = runtime.digest()
    words = [sys.executable, "-c", STAGER, runtime.url, runtime.api_key, shares_memory]
    with subprocess.Popen(words, cwd=ROOT, env=child_environment()) as stager:
        assert stager.wait(60) == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while runtime.status().updating:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert runtime.digest() == before
    for folder in (model_folder / "newer", model_folder):
        weights = load_file(folder / "model.safetensors")
        assert runtime.update_weights_from_tensor(weights, "b").num_tensors == len(weights)
        assert (runtime.digest() == before) == (folder == model_folder)
    assert not left_in_shared_memory(stager.pid, runtime.pid)
    held = [os.readlink(each) for each in Path(f"/proc/{runtime.pid}/fd").iterdir()]
    assert sum("memfd:headrace" in each for each in held) <= 3, "its own upload buffers and pulse, nothing lent"


def test_a_server_killed_in_a_stream_and_in_a_stage(runtime: Runtime) -> None:
    pieces = runtime.stream(input_ids=[1, 2], sampling_params=LONG)
    next(pieces)
    session = runtime.begin_update("b", [(NORM, (32,), "float32")], partial=True)

    def killing() -> Iterator[tuple[str, Any]]:
        os.kill(runtime.pid, signal.SIGKILL)
        yield NORM, np.zeros(32, np.float32)

    assert type(raised(lambda: runtime.stage(session, killing()))) is UnreachableError
    assert type(raised(lambda: list(pieces))) is UnreachableError
    weights = {NORM: np.zeros(32, np.float32)}
    error = raised(lambda: runtime.update_weights_from_tensor(weights, "c", partial=True))
    assert type(error) is UnreachableError and error.retryable
