"""Clients that go away, cores that die, and servers that stop."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from headrace import AsyncEngine, ConfigError, Engine, ShutdownError, serve, server
from headrace.types.http import (
    BYTES_TYPE,
    LENGTH_BYTES,
    MESSAGE_TYPE,
    PREFIX,
    BeginAsk,
    SessionBegun,
    StageHead,
    TensorPiece,
)
from headrace.types.weights import TensorInfo
from tests.free_ports import free_port
from tests.server.builders import SETTINGS
from tests.server.conftest import START, Served

HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
LONG = {"max_new_tokens": 1000, "ignore_eos": True, "temperature": 0}


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait for a condition; the test's own time limit is the bound."""
    while not condition():
        time.sleep(0.01)


def num_disconnects(served: Served) -> float:
    lines = served.http.get("/metrics").text.splitlines()
    (value,) = [line.split()[1] for line in lines if line.startswith("headrace_http_disconnects_total ")]
    return float(value)


def num_running(served: Served) -> float:
    metrics = served.engine.metrics()
    return metrics["num_running"] + metrics["num_waiting"]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"input_ids": [[1, 2, 3]] * 4, "sampling_params": LONG}),
        ("/v1/completions", {"prompt": "a", "n": 4, "max_tokens": 1000, "ignore_eos": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": 4, "ignore_eos": True}),
    ],
)
def test_a_client_that_goes_away_frees_its_memory(
    served: Served, path: str, body: dict[str, Any], is_stream: bool
) -> None:
    content = json.dumps({**body, "stream": is_stream}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n\r\n".encode()
    before, num_before = served.engine.metrics(), num_disconnects(served)
    with socket.create_connection(("127.0.0.1", served.handle.port), timeout=30) as connection:
        connection.sendall(head + content)
        wait_for(lambda: served.engine.metrics()["num_generated_tokens"] > before["num_generated_tokens"] + 20)
        if is_stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        assert num_running(served) == 4
    wait_for(lambda: num_running(served) == 0)
    assert num_disconnects(served) == num_before + 1
    after = served.engine.metrics()
    assert after["num_used_tokens"] == 0
    assert after["num_generated_tokens"] < before["num_generated_tokens"] + 4 * 990


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_is_gone_before_its_request_is_looked_at_is_noticed(served: Served, is_stream: bool) -> None:
    body = {"input_ids": [[1, 2, 3]] * 4, "sampling_params": LONG, "stream": is_stream}
    content, num_before = json.dumps(body).encode(), num_disconnects(served)
    head = f"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n\r\n".encode()
    for _ in range(10):
        with socket.create_connection(("127.0.0.1", served.handle.port), timeout=30) as connection:
            connection.sendall(head + content)
    wait_for(lambda: num_disconnects(served) == num_before + 10)
    wait_for(lambda: num_running(served) == 0)
    assert served.engine.metrics()["num_used_tokens"] == 0


def test_clients_that_get_their_answer_are_no_disconnects(start: START) -> None:
    served = start(settings={"pause_timeout": 0.1})
    calls: list[tuple[str, dict[str, Any]]] = [
        ("/generate", {"input_ids": [1], "sampling_params": {"max_new_tokens": 2}}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}),
    ]

    def post_all() -> set[int]:
        both = [(path, {**body, "stream": is_stream}) for path, body in calls for is_stream in (False, True)]
        return {httpx.post(served.url + path, json=body, timeout=60).status_code for path, body in both}

    assert post_all() == {200}
    served.engine.pause("keep")
    assert post_all() == {503}
    assert num_disconnects(served) == 0


def test_a_stream_whose_core_is_killed_ends_with_a_typed_error(start: START) -> None:
    served = start(settings={"inprocess": False})
    pid = served.engine.asynchronous.runtime.host.pid
    assert pid != os.getpid()
    with served.http.stream(
        "POST", "/generate", json={"input_ids": [1], "sampling_params": LONG, "stream": True}
    ) as reply:
        lines = reply.iter_lines()
        next(lines)
        os.kill(pid, signal.SIGKILL)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    error = json.loads(rest[-2][6:])["error"]
    assert (error["code"], error["retryable"]) == (503, True)
    wait_for(lambda: served.http.get("/ready").status_code == 503)
    assert served.http.get("/health").status_code == 503
    assert served.http.get("/health_generate").status_code == 503
    refused = served.http.post("/generate", json={"input_ids": [1]})
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    assert refused.json()["retryable"] is True
    assert served.http.get("/metrics").status_code == 200


def test_stopping_lets_requests_finish_and_refuses_new_ones(start: START) -> None:
    served = start()
    body: dict[str, Any] = {"input_ids": [1, 2], "sampling_params": {**LONG, "max_new_tokens": 180}}
    expected = served.generate(**body)["output_ids"]

    async def drain() -> tuple[Any, Any, Any]:
        async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
            await client.get("/health")
            running = asyncio.create_task(client.post("/generate", json=body))
            stream = asyncio.create_task(client.post("/generate", json={**body, "stream": True}))
            while served.engine.metrics()["num_running"] < 2:
                await asyncio.sleep(0.01)
            stopping = asyncio.create_task(asyncio.to_thread(served.handle.stop))
            while (ready := await client.get("/ready")).status_code == 200:
                await asyncio.sleep(0.01)
            refused = await client.post("/generate", json=body)
            assert refused.status_code == 503
            assert refused.json()["retryable"] is True
            replies = await asyncio.gather(running, stream)
            await stopping
            return ready, *replies

    ready, whole, stream = asyncio.run(drain())
    assert "draining" in ready.json()["message"]
    assert whole.json()["output_ids"] == expected
    assert json.loads(stream.text.split("\n\n")[-3][6:])["output_ids"] == expected
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{served.url}/health")
    assert served.engine.generate(input_ids=[1, 2], sampling_params=body["sampling_params"])[0].token_ids == expected


def test_what_does_not_finish_in_time_is_aborted_and_answered(start: START) -> None:
    served = start(drain_timeout=0.1)
    served.engine.pause("keep")
    replies: list[httpx.Response] = []
    body = {"input_ids": [1], "sampling_params": LONG}
    thread = threading.Thread(
        target=lambda: replies.append(httpx.post(f"{served.url}/generate", json=body, timeout=60))
    )
    thread.start()
    wait_for(lambda: num_running(served) == 1)
    served.handle.stop()
    thread.join()
    assert replies[0].status_code == 200
    reason = replies[0].json()["meta_info"]["finish_reason"]
    assert (reason["type"], "shutting down" in reason["message"]) == ("abort", True)


def test_stopping_twice_and_ending_the_engine_while_serving(model_folder: Any) -> None:
    with Engine(model_folder, inprocess=True, **SETTINGS) as engine:
        first, second = serve(engine), serve(engine)
        assert first.port != second.port
        first.stop()
        first.stop()
        assert httpx.get(f"{second.url}/health").status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{second.url}/health")


def test_an_address_that_is_taken_is_named(served: Served) -> None:
    with pytest.raises(ConfigError) as raised:
        serve(served.engine, port=served.handle.port)
    assert raised.value.field == "port"
    with pytest.raises(ConfigError) as outside:
        serve(served.engine, host="0.0.0.0")
    assert outside.value.field == "host"
    with pytest.raises(ConfigError) as unknown:
        serve(served.engine, colour="red")
    assert unknown.value.field == "colour"
    assert served.http.get("/health").status_code == 200


def test_a_server_that_cannot_be_made_takes_no_address(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise ConfigError("no such template", field="chat_template")

    port = free_port()
    monkeypatch.setattr("headrace.server.run.create_app", fails)
    with pytest.raises(ConfigError, match="no such template") as caught:
        serve(served.engine, port)
    monkeypatch.undo()
    serve(served.engine, port).stop()
    assert caught.value.field == "chat_template"


def test_an_async_engine_is_served_from_any_loop_and_ends_its_servers(model_folder: Path) -> None:
    async def scenario() -> list[str]:
        async with AsyncEngine(model_folder, inprocess=True, **SETTINGS) as engine:
            here = await server.serve(engine)
            there = asyncio.run_coroutine_threadsafe(server.serve(engine), engine.loop)
            servers = [here, await asyncio.wrap_future(there)]
            async with httpx.AsyncClient() as client:
                for each in servers:
                    assert (await client.get(f"{each.url}/health")).status_code == 200
        with pytest.raises(ShutdownError):
            await server.serve(engine)
        return [each.url for each in servers]

    for url in asyncio.run(scenario()):
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


def test_each_way_to_serve_takes_its_kind_of_engine(served: Served) -> None:
    wrong: Any = served.engine
    with pytest.raises(ConfigError, match=r"headrace\.serve") as caught:
        asyncio.run(server.serve(wrong))
    assert caught.value.field == "engine"
    with pytest.raises(ConfigError, match=r"headrace\.server\.serve") as caught:
        serve(wrong.asynchronous)
    assert caught.value.field == "engine"


def test_serving_installs_no_signal_handlers(served: Served) -> None:
    assert {number: signal.getsignal(number) for number in HANDLERS} == HANDLERS


def test_a_stream_left_unread_is_dropped(start: START) -> None:
    """A client that reads nothing keeps its sequences only as long as the write timeout, and these take far longer."""
    served = start(write_timeout=0.3)
    body = {"input_ids": [[1, 2]] * 64, "sampling_params": LONG, "stream": True, "return_logprob": True}
    content = json.dumps(body).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", served.handle.port))
        head = f"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n\r\n".encode()
        connection.sendall(head + content)
        wait_for(lambda: num_running(served) > 0)
        wait_for(lambda: num_running(served) == 0)
    assert served.engine.metrics()["num_generated_tokens"] < 64 * 1000


def test_ending_the_engine_answers_what_still_runs(start: START) -> None:
    """The engine is shut down with its server on: requests get their time, then their partial answers."""
    served = start(drain_timeout=0.1)
    body = {"input_ids": [1], "sampling_params": LONG, "return_logprob": True}
    replies: list[httpx.Response] = []

    def post(is_stream: bool) -> None:
        replies.append(httpx.post(f"{served.url}/generate", json={**body, "stream": is_stream}, timeout=60))

    threads = [threading.Thread(target=post, args=(is_stream,)) for is_stream in (False, True)]
    for thread in threads:
        thread.start()
    wait_for(lambda: served.engine.metrics()["num_running"] == 2)
    served.engine.shutdown()
    for thread in threads:
        thread.join()
    assert [reply.status_code for reply in replies] == [200, 200]
    for reply in replies:
        last = json.loads(reply.text.split("\n\n")[-3][6:]) if reply.text.startswith("data") else reply.json()
        assert last["meta_info"]["finish_reason"]["type"] == "abort"
        assert len(last["output_ids"]) == last["meta_info"]["output_token_logprobs_length"] < 1000


def test_stopping_cuts_off_clients_that_never_read(start: START) -> None:
    served = start(drain_timeout=2.0)
    body = {"input_ids": [[1, 2]] * 16, "sampling_params": LONG, "stream": True, "return_logprob": True}
    content = json.dumps(body).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", served.handle.port))
        head = f"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n\r\n".encode()
        connection.sendall(head + content)
        wait_for(lambda: num_running(served) == 16)
        stopped = threading.Thread(target=served.handle.stop)
        stopped.start()
        stopped.join(60)
        assert not stopped.is_alive()
    wait_for(lambda: num_running(served) == 0)


WAITING: dict[str, tuple[str, dict[str, Any]]] = {
    "release_memory_occupation": ("/release_memory_occupation", {}),
    "resume_memory_occupation": (f"{PREFIX}/resume_memory_occupation", {}),
    "collective_rpc": ("/collective_rpc", {"method": "digest"}),
    "save_model": (f"{PREFIX}/save_model", {"path": "saved"}),
    "update_weights_from_disk": ("/update_weights_from_disk", {"model_path": "newer"}),
    "undoable_pause": ("/pause_generation", {"mode": "wait"}),
}


@pytest.mark.parametrize("method", WAITING)
def test_stopping_answers_control_calls_that_do_not_end_and_undoes_them_behind_the_answer(
    start: START, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long that takes: the call here comes to its end only when it was answered. One that nothing undoes may
    have been done then."""
    served, (path, body) = start(save_roots=(str(tmp_path),), weight_roots=(str(tmp_path),)), WAITING[method]
    (tmp_path / "newer").mkdir()
    body = {key: str(tmp_path / value) if "path" in key else value for key, value in body.items()}
    is_ours = path.startswith(PREFIX)
    sent: Any = {"content": msgspec.msgpack.encode(body), "headers": {"content-type": MESSAGE_TYPE}}
    said: list[str] = []
    is_answered = threading.Event()

    async def waits(*_: Any, **__: Any) -> int:
        said.append("waits")
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            while not is_answered.is_set():
                await asyncio.sleep(0.01)
            said.append("cancelled")
        return 7

    async def regret(_: int) -> None:
        said.append("undone")

    def undoable(*_: Any) -> Any:
        return waits(), regret

    is_undone = method == "undoable_pause"
    monkeypatch.setattr(served.engine.asynchronous, method, undoable if is_undone else waits)
    replies: list[httpx.Response] = []

    def post() -> None:
        try:
            replies.append(httpx.post(served.url + path, timeout=60, **(sent if is_ours else {"json": body})))
        finally:
            is_answered.set()

    caller = threading.Thread(target=post)
    caller.start()
    wait_for(lambda: bool(said))
    served.handle.stop()
    caller.join()
    (reply,) = replies
    error = "ShutdownError" if is_undone else "UnavailableError"
    assert (reply.status_code, reply.json()["retryable"], reply.json()["err_type"]) == (503, is_undone, error)
    assert ("retry-after" in reply.headers) == is_undone
    assert said == ["waits", "cancelled", *(["undone"] if is_undone else [])]


def test_a_pause_that_drains_is_answered_beside_what_it_waits_for(start: START) -> None:
    """Requests have their time; then they, and whoever waits for their end, are answered at once. The engine is as if
    the pause had not been asked for."""
    served = start(drain_timeout=0.1)
    served.engine.slow_down(0.05)
    replies: dict[str, httpx.Response] = {}

    def post(path: str, body: dict[str, Any]) -> threading.Thread:
        def run() -> None:
            replies[path] = httpx.post(served.url + path, json=body, timeout=60)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    threads = [post("/generate", {"input_ids": [1], "sampling_params": LONG})]
    wait_for(lambda: num_running(served) == 1)
    threads.append(post("/pause_generation", {"mode": "wait"}))
    wait_for(lambda: bool(served.http.get("/is_paused").json()["is_paused"]))
    served.handle.stop()
    for thread in threads:
        thread.join()
    assert replies["/generate"].json()["meta_info"]["finish_reason"]["type"] == "abort"
    assert (replies["/pause_generation"].status_code, replies["/pause_generation"].json()["retryable"]) == (503, True)
    served.engine.slow_down(None)
    assert served.engine.generate(input_ids=[1], sampling_params={"max_new_tokens": 2})


def test_a_client_that_sends_tensors_halfway_is_answered(start: START) -> None:
    served = start()
    name, data = "model.norm.weight", bytes(4 * 32)
    ask = BeginAsk(version="b", manifest=(TensorInfo(name, (32,), "float32"),), partial=True, timeout=60.0)
    kind = {"content-type": MESSAGE_TYPE}
    begun = served.http.post(f"{PREFIX}/begin_update", content=msgspec.msgpack.encode(ask), headers=kind)
    session = msgspec.msgpack.decode(begun.content, type=SessionBegun)
    head = msgspec.msgpack.encode(StageHead(session.session_id, (TensorPiece(0, 0, len(data)),)))
    body = len(head).to_bytes(LENGTH_BYTES, "little") + head + data
    words = f"POST {PREFIX}/stage HTTP/1.1\r\nhost: localhost\r\ncontent-type: {BYTES_TYPE}\r\n"
    with socket.create_connection(("127.0.0.1", served.handle.port), timeout=30) as connection:
        connection.sendall(f"{words}content-length: {len(body)}\r\n\r\n".encode() + body[:-1])
        time.sleep(0.5)
        served.handle.stop()
        reply = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert reply.startswith(b"HTTP/1.1 503") and b"ShutdownError" in reply
    assert served.engine.digest()
