"""Data calls through a router, on real sockets: nothing is changed on the way, lost or doubled, whoever fails."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from headrace.cluster.options import RouterOptions
from headrace.cluster.router import ReplicaRouter
from headrace.server.half_closed import INTERIM
from headrace.server.listening import listen
from tests.cluster.builders import Routed, raw_exchange, routed
from tests.cluster.replica import FakeReplica

Story = Callable[[Routed], Awaitable[None]]


def tell(story: Story, num_replicas: int = 2, **options: Any) -> None:
    """Run a story over a router and its replicas."""

    async def run() -> None:
        async with routed(num_replicas, **options) as found:
            await story(found)

    asyncio.run(run())


def events_of(text: str) -> list[Any]:
    parts = [part.removeprefix("data: ") for part in text.split("\n\n")[:-1]]
    assert parts.pop() == "[DONE]"
    return [json.loads(part) for part in parts]


def test_a_body_and_its_headers_arrive_as_they_were_sent_and_so_does_the_answer() -> None:
    body = b'{ "rid" : "a", "nope":1e400, "custom_params": {"x": [1,  2]},\n"seed":7 }'

    async def story(found: Routed) -> None:
        headers = {"x-any": "thing", "content-type": "application/json", "authorization": "Bearer mine"}
        reply = await found.http.post("/generate?x=%20y", content=body, headers={**headers, "te": "trailers"})
        (seen,) = [seen for each in found.replicas for seen in each.seen]
        assert seen[0] == "POST /generate?x=%20y" and seen[2] == body
        assert {name: seen[1][name] for name in headers} == headers and "te" not in seen[1]
        assert seen[1]["host"] == f"127.0.0.1:{reply.json()['port']}"
        assert reply.headers["x-own"] == "yes" and reply.headers["x-headrace-replica"] in ("replica-0", "replica-1")

    tell(story)


def test_a_stream_comes_piece_by_piece_while_it_is_made() -> None:
    async def story(found: Routed) -> None:
        body = {"rid": "s", "stream": True, "num_events": 3, "event_seconds": 0.2}
        async with found.http.stream("POST", "/generate", json=body) as reply:
            pieces = reply.aiter_raw()
            first = await anext(pieces)
            assert found.router.replicas.find(reply.headers["x-headrace-replica"]).num_requests == 1
            rest = b"".join([piece async for piece in pieces])
        assert first == b'data: {"rid": "s", "number": 0}\n\n'
        assert [event["number"] for event in events_of((first + rest).decode())] == [0, 1, 2]
        await found.until(lambda: all(each.num_requests == each.num_tokens == 0 for each in found.router.replicas))

    tell(story)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_is_seen_by_the_replica(stream: bool) -> None:
    async def story(found: Routed) -> None:
        body = {"stream": stream, "num_events": 1000, "event_seconds": 0.01, "delay": 0 if stream else 60}
        asking = asyncio.ensure_future(found.generate(**body))
        await found.until(lambda: any(each.seen for each in found.replicas))
        await asyncio.sleep(0.05)
        asking.cancel()
        await found.until(lambda: sum(each.num_dropped for each in found.replicas) == 1)
        await found.until(lambda: all(each.num_requests == 0 for each in found.router.replicas))

    tell(story)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_closes_its_sending_side_is_answered(stream: bool) -> None:
    async def story(found: Routed) -> None:
        body = json.dumps({"rid": "a", "stream": stream, "num_events": 30, "delay": 0.2}).encode()
        head = b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body)
        metrics = b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n"
        for rest, num_answers in ((b"", 1), (head + body, 2), (metrics + b"GET /met", 2)):
            raw = await raw_exchange(found.port, head + body + rest, ends=True)
            answers = raw.replace(INTERIM, b"").split(b"HTTP/1.1 200 OK\r\n")[1:]
            assert len(answers) == num_answers
            assert answers[0].endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n" if stream else b"}")
        for nothing in (head + body[:-1], head.replace(b"1.1", b"1.0") + body, b""):
            assert await raw_exchange(found.port, nothing, ends=True) == b""
        await found.until(lambda: not found.router._front._connections)

    tell(story)


def test_who_closes_its_sending_side_before_it_takes_an_answer_gets_the_next_one_too() -> None:
    async def story(found: Routed) -> None:
        large = b"x" * (8 << 20)
        for each in found.replicas:
            each.raw["/v1/models"] = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(large), large)
        reader, writer = await asyncio.open_connection("127.0.0.1", found.port)
        writer.write(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n" * 3)
        await found.until(lambda: any(each._is_full for each in found.router._front._connections))
        writer.write_eof()
        await asyncio.sleep(0.05)
        raw = await reader.read()
        writer.close()
        assert raw.count(b"HTTP/1.1 200 OK") == 3
        await found.until(lambda: not found.router._front._connections)

    tell(story)


def test_an_answer_that_has_no_body_tells_no_length() -> None:
    async def story(found: Routed) -> None:
        for status in (204, 304):
            for each in found.replicas:
                each.raw["/v1/models"] = b"HTTP/1.1 %d Nothing\r\nx-own: yes\r\n\r\n" % status
            reply = await found.http.get("/v1/models")
            assert (reply.status_code, reply.headers["x-own"]) == (status, "yes")
            assert "content-length" not in reply.headers
        assert (await found.generate(rid="next")).json()["text"] == "next"

    tell(story)


@pytest.mark.parametrize("do", ["die", "half"])
def test_what_one_replica_does_not_answer_another_does(do: str) -> None:
    async def story(found: Routed) -> None:
        first = found.replicas[0]
        for number in range(4):
            reply = await found.generate(rid=f"x{number}", do=do, at=first.port)
            assert reply.status_code == 200 and reply.json()["text"] == f"x{number}"
        assert first.seen and "headrace_router_retries_total 0.0" not in (await found.http.get("/metrics")).text

    tell(story, policy="round_robin")


def test_a_replica_that_shuts_down_or_refuses() -> None:
    async def story(found: Routed) -> None:
        reply = await found.generate(do="shut")  # every replica says so: the last answer is passed on
        assert reply.status_code == 503 and reply.json()["err_type"] == "ShutdownError"
        assert sum(len(each.seen) for each in found.replicas) == 2
        for _ in range(20):
            assert (await found.generate(do="refuse")).status_code == 400
        assert sum(len(each.seen) for each in found.replicas) == 22  # a refusal is an answer, and asked for once
        assert all(each.is_healthy for each in found.router.replicas)

    tell(story, max_attempts=2)


@pytest.mark.parametrize("media_type", ["text/event-stream; charset=utf-8", "application/x-other"])
def test_a_stream_that_breaks_ends_with_an_error_that_says_so(media_type: str) -> None:
    async def story(found: Routed) -> None:
        body = {"stream": True, "break_at": 2, "media_type": media_type}
        if media_type.startswith("application"):
            with pytest.raises(httpx.RemoteProtocolError):
                await found.generate(**body)
            return
        *events, last = events_of((await found.generate(**body)).text)
        assert [event["number"] for event in events] == [0, 1]
        assert last["error"]["retryable"] is True and last["error"]["err_type"] == "UnreachableError"
        assert last["error"]["code"] == 503 and "broke off" in last["error"]["message"]

    tell(story)


def test_a_stream_that_breaks_before_its_first_event_is_begun_elsewhere() -> None:
    async def story(found: Routed) -> None:
        reply = await found.generate(stream=True, break_at=0)
        assert reply.status_code == 503 and reply.json()["retryable"] is True  # it breaks everywhere
        assert [len(each.seen) for each in found.replicas] == [1, 1]

    tell(story, max_attempts=2)


def test_a_dead_replica_is_not_chosen_and_one_that_is_back_is() -> None:
    async def story(found: Routed) -> None:
        first, second = found.replicas
        await first.die()
        replies = await asyncio.gather(*(found.generate(rid=str(number)) for number in range(20)))
        assert [reply.json()["text"] for reply in replies] == [str(number) for number in range(20)]
        await found.until_healthy(1)
        num_tried = len(first.seen)
        for _ in range(10):
            assert (await found.generate()).json()["port"] == second.port
        assert len(first.seen) == num_tried
        again = await FakeReplica().start(first.port)
        await found.until_healthy(2)
        await asyncio.gather(*(found.generate(n=number) for number in range(4)))
        assert again.seen
        await again.die()

    tell(story)


def test_a_replica_that_hangs_is_given_up_and_what_it_had_is_asked_elsewhere() -> None:
    async def story(found: Routed) -> None:
        first = found.replicas[0]
        asking = [asyncio.ensure_future(found.generate(n=number)) for number in range(2)]
        first.delay = 3600
        await found.until(lambda: len(first.seen) == 1)
        first.health = 0
        replies = await asyncio.gather(*asking)
        assert {reply.json()["port"] for reply in replies} == {found.replicas[1].port}
        assert [each.is_healthy for each in found.router.replicas] == [False, True]

    tell(story, policy="round_robin", stuck_timeout=0.0)


def test_ready_replicas_come_before_paused_ones_and_paused_before_none() -> None:
    async def story(found: Routed) -> None:
        first, second = found.replicas
        first.ready = 503
        await found.until(lambda: not next(iter(found.router.replicas)).is_ready)
        assert {(await found.generate(n=n)).json()["port"] for n in range(6)} == {second.port}
        assert (await found.http.get("/ready")).json()["num_ready"] == 1
        second.ready = 503
        await found.until(lambda: not any(each.is_ready for each in found.router.replicas))
        assert {(await found.generate(n=n)).json()["port"] for n in range(6)} == {first.port, second.port}
        assert (await found.http.get("/ready")).status_code == 503
        assert (await found.http.get("/health")).status_code == 200

    tell(story, policy="round_robin")


def test_a_request_waits_for_a_replica_and_is_503_when_none_comes() -> None:
    async def story(found: Routed) -> None:
        await found.replicas[0].die()
        await found.until_healthy(0)
        reply = await found.generate()
        assert reply.status_code == 503 and reply.json()["err_type"] == "UnreachableError"
        assert reply.headers["retry-after"] and "replica-0" in reply.json()["message"]
        assert (await found.http.get("/health")).status_code == 503
        assert (await found.http.get("/liveness")).status_code == 200

    async def waiting(found: Routed) -> None:
        await found.replicas[0].die()
        await found.until_healthy(0)
        asking = asyncio.ensure_future(found.generate(rid="late"))
        again = await FakeReplica().start(found.replicas[0].port)
        assert (await asking).json()["text"] == "late"
        await again.die()

    tell(story, num_replicas=1, wait_timeout=0.1)
    tell(waiting, num_replicas=1)


def test_an_idle_connection_that_the_replica_closed_costs_no_attempt() -> None:
    async def story(found: Routed) -> None:
        for _ in range(5):
            assert (await found.generate()).status_code == 200
            found.replicas[0].drop_idle()
        assert all(each.is_healthy for each in found.router.replicas)

    tell(story, num_replicas=1, max_attempts=1)


def test_head_is_answered_without_a_body() -> None:
    async def story(found: Routed) -> None:
        for path in ("/model_info", "/workers"):
            reply = await found.http.head(path)
            assert reply.status_code == 200 and int(reply.headers["content-length"]) > 0 and not reply.content

    tell(story)


def test_a_silent_replica_is_a_deadline() -> None:
    async def story(found: Routed) -> None:
        reply = await found.generate(delay=3600)
        assert reply.status_code == 504 and reply.json()["err_type"] == "DeadlineError"

    tell(story, answer_timeout=0.5)


def test_keys() -> None:
    async def story(found: Routed) -> None:
        http = found.http
        assert (await found.generate()).status_code == 401
        assert (await http.get("/health")).status_code == 200
        data, admin = ({"authorization": f"Bearer {key}"} for key in ("data", "admin"))
        for path in ("/workers", "/flush_cache"):
            assert (await http.get(path, headers=data)).status_code == 401
            assert (await http.get(path, headers=admin)).status_code == 200
        assert (await http.get("/nowhere")).status_code == 401
        assert (await http.post("/generate", json={}, headers=data)).status_code == 200
        assert (await http.post("/generate", json={}, headers=admin)).status_code == 200
        sent = {(seen[0].split("?")[0], seen[1]["authorization"]) for each in found.replicas for seen in each.seen}
        assert sent == {("POST /generate", "Bearer theirs"), ("GET /flush_cache", "Bearer their admin")}

    tell(
        story,
        api_key="data",
        admin_api_key="admin",
        replica_api_key="theirs",
        replica_admin_api_key="their admin",
    )


def test_pages_of_browsers_are_kept_out_of_a_router_without_a_key() -> None:
    async def story(found: Routed) -> None:
        for headers in ({"origin": "http://evil.example"}, {"host": "evil.example"}, {"sec-fetch-site": "cross-site"}):
            assert (await found.http.post("/generate", json={}, headers=headers)).status_code == 403
        own = {"origin": f"http://127.0.0.1:{found.port}", "sec-fetch-site": "same-origin"}
        assert (await found.http.post("/generate", json={}, headers=own)).status_code == 200
        (seen,) = [seen for each in found.replicas for seen in each.seen]
        assert "origin" not in seen[1] and "sec-fetch-site" not in seen[1]

    tell(story)


def test_what_does_not_go_through_a_router_is_refused_by_name() -> None:
    async def story(found: Routed) -> None:
        reply = await found.http.post("/slow_down", content=b"x" * 100_000)
        assert reply.status_code == 501 and "send it to each replica" in reply.json()["message"]
        assert (await found.http.post("/headrace/save_model")).status_code == 501
        for method, path, allowed in (("GET", "/generate", "POST, PUT"), ("POST", "/v1/models/x", "GET, HEAD")):
            reply = await found.http.request(method, path)
            assert (reply.status_code, reply.headers["allow"]) == (405, allowed)
        assert (await found.http.get("/nowhere")).status_code == 404
        assert not any(each.seen for each in found.replicas)

    tell(story)


def test_bounds_on_what_clients_send() -> None:
    async def story(found: Routed) -> None:
        async def status(*pieces: bytes) -> bytes:
            return (await raw_exchange(found.port, *pieces)).split(b" ")[1]

        post = b"POST /generate HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        assert await status(post + b"content-length: 2\r\n\r\n", b"{}") == b"200"
        assert (
            await status(post + b"transfer-encoding: chunked\r\n\r\n1\r\n", b"{\r\n1\r\n}\r", b"\n0\r\n\r\n") == b"200"
        )
        assert await status(b"GET /health HTTP/1.0\r\n\r\n") == b"200"
        assert await status(post + b"content-length: 2000\r\n\r\n") == b"413"
        chunked = post + b"transfer-encoding: chunked\r\n\r\n"
        assert await status(chunked + b"1\r\n", b"{\r\n1\r\n}\r", b"\n0\r\n\r\n") == b"200"
        assert await status(b"GET /health HTTP/1.0\r\n\r\n") == b"200"
        assert await status(post + b"content-length: 2000\r\n\r\n") == b"413"
        assert await status(chunked + b"7d0\r\n") == b"413"
        assert await status(post + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n") == b"400"
        assert await status(b"GET / HTTP/1.1\r\nx: " + b"y" * 70_000) == b"431"
        assert await status(b"\x16\x03\x01\r\n\r\n") == b"400"
        assert await status(post + b"content-length: 2\r\n\r\n{") == b"408"
        expecting = await raw_exchange(found.port, post + b"expect: 100-continue\r\ncontent-length: 2\r\n\r\n", b"{}")
        assert expecting.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")
        two = post.replace(b"connection: close\r\n", b"") + b"content-length: 2\r\n\r\n{}"
        assert (await raw_exchange(found.port, two + post + b"content-length: 2\r\n\r\n{}")).count(b"HTTP/1.1 200") == 2
        streamed = b'{"stream": true, "num_events": 1}'
        old = b"POST /generate HTTP/1.0\r\ncontent-length: %d\r\n\r\n" % len(streamed) + streamed
        assert (await raw_exchange(found.port, old)).endswith(b'"number": 0}\n\ndata: [DONE]\n\n')

    tell(story, max_body_bytes=1024, body_timeout=0.5)


def test_a_router_that_stops_lets_requests_end_and_refuses_others() -> None:
    async def run() -> None:
        replica = await FakeReplica().start()
        router = ReplicaRouter([replica.url], RouterOptions())
        listener = listen("127.0.0.1", 0)
        await router.start(listener)
        found = Routed(router, [replica], listener.getsockname()[1])
        await found.until_healthy(1)
        asking = asyncio.ensure_future(found.generate(rid="last", delay=0.5))
        await found.until(lambda: bool(replica.seen))
        stopping = asyncio.ensure_future(router.stop(30.0))
        await asyncio.sleep(0.05)
        assert (await found.generate()).json()["err_type"] == "ShutdownError"
        assert (await found.http.get("/ready")).status_code == 503
        assert (await asking).json()["text"] == "last"
        await stopping
        with pytest.raises(httpx.ConnectError):
            await found.http.get("/health")
        await found.http.aclose()
        await replica.die()
        await asyncio.sleep(0)

    asyncio.run(run())


def test_a_large_answer_and_a_large_body_pass() -> None:
    async def story(found: Routed) -> None:
        reply = await found.generate(rid="x" * (8 << 20))
        assert len(reply.json()["text"]) == 8 << 20

    tell(story)


def test_every_answer_is_a_line_of_the_access_log_and_a_refusal_says_why(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "headrace")

    async def story(found: Routed) -> None:
        key = {"authorization": "Bearer front"}
        assert (await found.http.post("/generate?token=hidden", json={"rid": "a"}, headers=key)).status_code == 200
        assert (await found.http.post("/generate", json={"do": "refuse"}, headers=key)).status_code == 400
        assert (await found.http.post("/generate", json={})).status_code == 401
        assert (await found.http.get("/nowhere%0Aelse", headers=key)).status_code == 404
        streamed = {"stream": True, "num_events": 2}
        assert (await found.http.post("/generate", json=streamed, headers=key)).status_code == 200
        await raw_exchange(found.port, b"\x16\x03\x01\r\n\r\n")

    tell(story, 1, access_log=True, api_key="front")
    lines = [each.getMessage() for each in caplog.records if each.name == "headrace.server.access_log"]
    done, refused, stranger, lost, stream, nonsense = lines  # and none of what the router asks its replicas
    assert " POST /generate 200, " in done and done.startswith("127.0.0.1:") and "hidden" not in done
    assert " POST /generate 400, " in refused and " POST /generate 401, " in stranger and "key" in stranger
    assert " GET /nowhere%0Aelse 404, " in lost and " ms: " in lost
    assert " POST /generate 200, " in stream and " 0 bytes" not in stream
    assert " - - 400, " in nonsense and "no request line" in nonsense


def test_the_metrics_of_a_replica_are_had_from_the_router_with_its_key() -> None:
    async def story(found: Routed) -> None:
        found.replicas[1].answers["/metrics"] = 200, {"metrics": 1}
        key = {"authorization": "Bearer front"}
        assert (await found.http.get("/workers/replica-1/metrics")).status_code == 401
        reply = await found.http.get("/workers/replica-1/metrics", headers=key)
        assert reply.json() == {"metrics": 1} and reply.headers["content-type"].startswith("text/plain")
        (seen,) = [each for each in found.replicas[1].seen if each[0] == "GET /metrics"]
        assert seen[1]["authorization"] == "Bearer back"
        assert (await found.http.get("/workers/replica-7/metrics", headers=key)).status_code == 404
        assert (await found.http.post("/workers/replica-1/metrics", headers=key)).status_code == 405
        await found.replicas[1].die()
        gone = await found.http.get("/workers/replica-1/metrics", headers=key)
        assert (gone.status_code, gone.json()["err_type"]) == (503, "UnreachableError")

    tell(story, api_key="front", replica_api_key="back")
