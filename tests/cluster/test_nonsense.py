"""Replicas that answer nonsense, too much, or to one who does not ask: the router stays what it is, and says so."""

from __future__ import annotations

import asyncio
import re

import msgspec
import pytest

from headrace.cluster.upstream import BrokenAnswerError, Upstream
from tests.cluster.builders import Routed, raw_exchange
from tests.cluster.test_router import tell

DEEP = b'{"x":' + b"[" * 100_000


def answer(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


@pytest.mark.parametrize(
    ("path", "raw"),
    [
        ("/ready", answer(DEEP)),
        ("/health", answer(b"x" * (2 << 20))),
        ("/ready", answer(b"x" * (2 << 20))),
        ("/health", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nffffffff\r\n"),
    ],
    ids=["deep", "long", "long, too", "a chunk too long"],
)
def test_whoever_is_looked_at_is_looked_at_again(path: str, raw: bytes) -> None:
    """Nothing that a replica says of its health ends the looking, or fills the router."""

    async def story(found: Routed) -> None:
        (replica,) = found.replicas
        replica.raw[path] = raw
        replica.weight_version = "next"
        if raw == answer(DEEP):
            await asyncio.sleep(1.2)  # what it says may be passed over
        else:
            await found.until_healthy(0)
        replica.raw.clear()
        await found.until(lambda: all(each.weight_version == "next" for each in found.router.replicas))

    tell(story, num_replicas=1)


@pytest.mark.parametrize("url", [f"http://{'a' * 70}:80", "http://a..b:80", f"http://{'a.' * 150}b"])
def test_a_name_that_nobody_can_look_up_is_no_address(url: str) -> None:
    async def story(found: Routed) -> None:
        reply = await found.http.post("/workers", json={"url": url})
        assert (reply.status_code, reply.json()["param"]) == (400, "url")
        with pytest.raises(BrokenAnswerError, match="no connection"):
            await Upstream("a..b", 80, 1.0, 1.0).lend()

    tell(story, num_replicas=0)


@pytest.mark.parametrize("path", ["/pause_generation", "/weight_version", "/update_weights_from_disk", "/rewards"])
def test_what_is_nested_too_deeply_is_an_answer_like_another(path: str) -> None:
    async def story(found: Routed) -> None:
        for each in found.replicas:
            each.raw[path] = answer(DEEP)
        method = "GET" if path == "/weight_version" else "POST"
        reply = await found.http.request(method, path)
        assert reply.status_code == 200 and len(reply.json()["results"]) == 2
        for body in (b'{"url":"http://127.0.0.1:1","x":', b'{"weight_version":'):
            reply = await found.http.post("/workers", content=body + b"[" * 100_000)
            assert (reply.status_code, reply.json()["param"]) == (400, "body")

    tell(story)


@pytest.mark.parametrize(
    ("call", "body"),
    [
        ("begin_update", {"version": "v", "manifest": None, "timeout": 1.0}),
        ("join_update", {"manifest": (), "version": "v", "mode": "auto", "in_flight": "drain", "timeout": 1.0}),
        ("update_weights_from_disk", {}),
        ("abort", {}),
    ],
)
def test_an_answer_to_our_client_that_cannot_be_read_is_the_replicas_fault(call: str, body: object) -> None:
    """Not the client's: no field of his body is named."""

    async def story(found: Routed) -> None:
        for each in found.replicas:
            each.raw[f"/headrace/{call}"] = answer(b"\xc1")
        told = (await found.http.post(f"/headrace/{call}", content=msgspec.msgpack.encode(body))).json()
        assert (told["code"], told["err_type"], told["param"]) == (503, "UnreachableError", None)
        assert "replica-0: its answer cannot be read" in told["message"]
        assert found.router.replicas.fence.number == 0

    tell(story)


def test_one_who_reports_nonsense_of_a_commit_has_no_part_in_it() -> None:
    async def story(found: Routed) -> None:
        report = {"version": "v1", "epoch": 1, "num_tensors": 1, "num_bytes": 1, "mode": "shadow", "pause_ms": 0.0}
        for each, told in zip(found.replicas, (b"\xc1", msgspec.msgpack.encode(report)), strict=True):
            each.raw["/headrace/update_weights_from_disk"] = answer(told)
        reply = await found.http.post("/headrace/update_weights_from_disk", content=b"\x80")
        assert reply.status_code == 200
        assert [each.is_current for each in found.router.replicas] == [False, True]

    tell(story)


def test_a_dashboard_is_shown_whatever_one_replica_tells() -> None:
    async def story(found: Routed) -> None:
        history = {"source": "s", "last": 3, "points": {"time": ["x"]}, "updates": [], "samples": []}
        found.replicas[0].raw["/dashboard/state?since=0"] = answer(msgspec.json.encode({"history": history}))
        found.replicas[1].raw["/dashboard/state?since=0"] = answer(DEEP)
        for _ in range(3):
            assert (await found.http.get("/dashboard/state")).status_code == 200
            await asyncio.sleep(0.05)
        task = found.router._lookout._task
        assert task is not None and not task.done()

    tell(story)


def test_a_body_that_ends_with_its_connection_is_not_whole_when_the_router_cut_it() -> None:
    """Another update came: what is there is of older weights, and not all of it."""

    async def story(found: Routed) -> None:
        found.replicas[0].raw["/generate"] = b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (8 << 20)
        reader, writer = await asyncio.open_connection("127.0.0.1", found.port)
        writer.write(b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\r\n{}")
        await found.until(lambda: any(each.num_requests for each in found.router.replicas))
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(0.3)  # the router waits for its client, who reads nothing
        (replica,) = found.router.replicas
        replica.upstream.cut("no more")
        rest = await reader.read()
        assert not rest.endswith(b"0\r\n\r\n")
        writer.close()

    tell(story, num_replicas=1)


@pytest.mark.parametrize("size", [2, 3 << 20], ids=["small", "more than is read ahead"])
def test_an_answer_that_nobody_read_is_not_part_of_the_next_one(size: int) -> None:
    """Its client went away when it was there, and before it was passed on: the connection is not used again."""

    async def story(found: Routed) -> None:
        (replica,) = found.replicas
        replica.raw["/first"], replica.raw["/second"] = answer(b"x" * size), answer(b"own")
        upstream = Upstream("127.0.0.1", replica.port, 1.0, 1.0)
        for _ in range(2):
            connection = await upstream.lend()
            connection.send(b"GET /first HTTP/1.1\r\nhost: x\r\n\r\n", b"")
            await connection.read_head()
            async with asyncio.timeout(10):
                while not connection._parts or (size < 9 and not connection._is_complete):
                    await asyncio.sleep(0.01)
            upstream.give_back(connection)
            connection = await upstream.lend()
            connection.send(b"GET /second HTTP/1.1\r\nhost: x\r\n\r\n", b"")
            assert (await connection.read_head()).body_size == 3
            assert [await connection.read_part(), await connection.read_part()] == [b"own", b""]
            upstream.give_back(connection)
        upstream.close()

    tell(story, num_replicas=1)


def test_a_connection_that_nobody_waits_on_is_closed_when_something_comes() -> None:
    """A second answer, when the first was read and the connection lent to nobody: it would be kept for ever."""

    async def story() -> None:
        ended = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            for wanted in (b"first", b"second"):
                await reader.readuntil(wanted)
                writer.write(answer(b"own"))
            await reader.read()
            ended.set()
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            upstream = Upstream("127.0.0.1", server.sockets[0].getsockname()[1], 1.0, 1.0)
            connection = await upstream.lend()
            connection.send(b"first", b"")
            await connection.read_head()
            assert await connection.read_whole() == b"own"
            upstream.give_back(connection)
            connection._transport.write(b"second")
            await asyncio.wait_for(ended.wait(), 10)
            assert not connection.may_be_used_again
            upstream.close()

    asyncio.run(story())


def test_nothing_is_begun_behind_a_last_request() -> None:
    """Its client takes the answer slowly, and has sent another request behind it."""

    async def story(found: Routed) -> None:
        (replica,) = found.replicas
        replica.raw["/model_info"] = answer(b"x" * (16 << 20))
        last = b"GET /model_info HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        behind = b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\r\n{}"
        told = await raw_exchange(found.port, last + behind)
        assert told.endswith(b"x") and told.count(b"HTTP/1.1 ") == 1
        await found.generate(rid="another")
        assert [body for target, _, body in replica.seen if target == "POST /generate"] == [b'{"rid":"another"}']

    tell(story, num_replicas=1)


def test_clients_that_go_away_leave_the_answers_of_others_alone() -> None:
    async def story(found: Routed) -> None:
        async def leave(number: int) -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", found.port)
            body = b'{"rid":"gone"}'
            writer.write(b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: 14\r\n\r\n" + body)
            await asyncio.sleep(number % 20 * 2e-4)
            writer.transport.abort()

        for number in range(60):
            await asyncio.gather(*(leave(number + each) for each in range(5)))
            reply = await found.generate(rid=f"r{number}")
            assert reply.json()["text"] == f"r{number}"

    tell(story)


REFUSED = {
    "no route": b"GET /nope HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "not its method": b"GET /generate HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "not through a router": b"GET /get_load HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "another host": b"GET /workers HTTP/1.1\r\nhost: nowhere.example\r\n\r\n",
}
FINE = b"GET /liveness HTTP/1.1\r\nhost: localhost\r\n\r\n"
LAST = b"GET /liveness HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"


@pytest.mark.parametrize("refused", REFUSED.values(), ids=REFUSED)
def test_what_comes_behind_a_refused_request_is_answered(refused: bytes) -> None:
    async def story(found: Routed) -> None:
        told = await raw_exchange(found.port, FINE + refused + refused + FINE + LAST)
        statuses = [int(each) for each in re.findall(rb"HTTP/1\.1 (\d+)", told)]
        assert len(statuses) == 5 and [statuses[0], *statuses[3:]] == [200] * 3 and min(statuses[1:3]) >= 400

    tell(story, num_replicas=0)


@pytest.mark.parametrize(("target", "num"), [("/docs", 400), (f"/{'n' * 190}", 10_000)], ids=["answered", "refused"])
def test_a_client_that_asks_and_does_not_read_is_not_read(target: str, num: int) -> None:
    """Neither its requests nor their answers pile up here, and all come once it reads."""

    async def story(found: Routed) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", found.port, limit=1 << 16)
        writer.write(f"GET {target} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode() * num + LAST)
        await found.until(lambda: any(each._is_full for each in found.router._front._connections))
        await asyncio.sleep(0.1)
        (connection,) = found.router._front._connections
        assert connection._is_full and len(connection._buffer) + connection._transport.get_write_buffer_size() < 1 << 20
        told = await reader.read()
        assert told.count(b"HTTP/1.1 ") == num + 1
        writer.close()

    tell(story, num_replicas=0)


def test_a_client_of_http_1_0_sees_where_an_answer_without_a_length_ends() -> None:
    """It knows no chunks: so its connection has to end, whatever it asks for."""

    async def story(found: Routed) -> None:
        body = b'{"stream":true}'
        asked = b"POST /generate HTTP/1.0\r\nconnection: keep-alive\r\ncontent-length: %d\r\n\r\n" % len(body)
        told = await raw_exchange(found.port, asked + body + LAST)
        assert b"connection: close\r\n" in told and told.endswith(b"data: [DONE]\n\n") and told.count(b"HTTP/1") == 1

    tell(story, num_replicas=1)


def test_head_of_an_answer_without_a_length_has_no_body() -> None:
    async def story(found: Routed) -> None:
        chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
        found.replicas[0].raw["/model_info"] = chunked
        asked = b"HEAD /model_info HTTP/1.1\r\nhost: localhost\r\n\r\n"
        told = await raw_exchange(found.port, asked + LAST)
        assert told.count(b"HTTP/1.1 200") == 2 and b"abc" not in told

    tell(story, num_replicas=1)
