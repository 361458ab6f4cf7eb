"""Calls that go to all replicas, and the list of replicas."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.cluster.builders import Routed
from tests.cluster.replica import FakeReplica, Headers
from tests.cluster.test_router import tell


def test_a_command_reaches_all_replicas_and_says_what_each_answered() -> None:
    async def story(found: Routed) -> None:
        for port, each in enumerate(found.replicas):
            each.answer = 200, {"status": "paused", "own": port}
        reply = await found.http.post("/pause_generation", json={"mode": "keep"})
        told = reply.json()
        assert reply.status_code == 200 and told["success"] is True and told["status"] == "paused" and "own" not in told
        assert [each["id"] for each in told["results"]] == ["replica-0", "replica-1"]
        assert [each["body"]["own"] for each in told["results"]] == [0, 1]
        assert [each.seen[-1][2] for each in found.replicas] == [b'{"mode":"keep"}'] * 2
        found.replicas[0].answer = 200, "Cache flushed."
        assert (await found.http.post("/flush_cache")).json()["results"][0]["body"] == "Cache flushed."

    tell(story)


@pytest.mark.parametrize(
    ("answer", "status", "retryable"),
    [
        ((400, {"message": "no such folder", "retryable": False, "err_type": "RequestError"}), 400, False),
        ((409, {"message": "busy", "retryable": True, "err_type": "UpdateConflictError"}), 409, True),
        ((500, "what"), 500, False),
    ],
)
def test_a_command_that_one_replica_refuses_fails(answer: tuple[int, Any], status: int, retryable: bool) -> None:
    async def story(found: Routed) -> None:
        found.replicas[1].answer = answer
        reply = await found.http.post("/pause_generation", json={})
        told = reply.json()
        assert (reply.status_code, told["retryable"], told["success"]) == (status, retryable, False)
        assert [each["status"] for each in told["results"]] == [200, status]
        assert "1 of 2 replicas failed; replica-1" in told["message"]
        if isinstance(answer[1], dict):
            assert answer[1]["message"] in told["message"] and told["err_type"] == answer[1]["err_type"]

    tell(story)


def test_a_command_fails_when_a_replica_is_dead_or_silent() -> None:
    async def story(found: Routed) -> None:
        await found.replicas[0].die()
        reply = await found.http.post("/continue_generation", json={})
        assert reply.status_code == 503 and [each["status"] for each in reply.json()["results"]] == [503, 200]
        assert [len(each.seen) for each in found.replicas] == [0, 1]  # nothing is asked for twice
        workers = (await found.http.get("/workers")).json()["workers"]
        assert (await found.http.delete(f"/workers/{workers[0]['id']}")).status_code == 202
        assert (await found.http.post("/continue_generation", json={})).status_code == 200
        await found.http.delete(f"/workers/{workers[1]['id']}")
        assert (await found.http.post("/continue_generation", json={})).status_code == 503  # nobody to ask

    tell(story)


def test_a_question_has_the_answer_that_all_give() -> None:
    async def story(found: Routed) -> None:
        for each in found.replicas:
            each.answer = 200, {"is_paused": True}
        told = (await found.http.get("/is_paused")).json()
        assert told["is_paused"] is True and len(told["results"]) == 2
        found.replicas[1].answer = 200, {"is_paused": False}
        reply = await found.http.get("/is_paused")
        assert reply.status_code == 409 and reply.json()["retryable"] is True and len(reply.json()["results"]) == 2

    tell(story)


def test_a_client_that_leaves_gives_a_command_up() -> None:
    async def story(found: Routed) -> None:
        async def slow(writer: asyncio.StreamWriter, target: str, body: bytes, headers: Headers) -> bool:
            await asyncio.sleep(3600)
            return False

        for each in found.replicas:
            each._answer = slow  # type: ignore[method-assign]
        with pytest.raises(httpx.ReadTimeout):
            await found.http.post("/pause", timeout=0.3)
        await found.until(lambda: all(each.num_dropped == 1 for each in found.replicas))

    tell(story)


def targets(replica: FakeReplica) -> list[str]:
    """What it was asked, but whether it is paused."""
    return [target for target, _, _ in replica.seen if target != "GET /is_paused"]


async def leave(found: Routed, path: str) -> None:
    """A client that asks, and goes away when one replica has answered and the other has not."""
    asking = asyncio.ensure_future(found.http.post(path, json={"mode": "keep"}))
    await found.until(lambda: all(f"POST {path}" in targets(each) for each in found.replicas))
    await asyncio.sleep(0.05)
    asking.cancel()
    async with asyncio.timeout(30):
        while "headrace_router_disconnects_total 1.0" not in (await found.http.get("/metrics")).text:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("path", ["/pause_generation", "/pause", "/headrace/pause"])
@pytest.mark.parametrize("was_paused", [False, True])
def test_a_pause_whose_client_leaves_is_undone_where_it_was_answered(path: str, was_paused: bool) -> None:
    """At the replicas that ran before: what was in force stays in force."""

    async def story(found: Routed) -> None:
        first, second = found.replicas
        for each in found.replicas:
            each.answers["/is_paused"] = 200, {"is_paused": was_paused}
        second.held[path] = asyncio.Event()
        await leave(found, path)
        await found.until(lambda: second.num_dropped == 1)
        if not was_paused:
            await found.until(lambda: "POST /continue_generation" in targets(first))
        await found.http.post("/flush_cache")  # what was to be undone is undone before
        undone = [] if was_paused else ["POST /continue_generation"]
        assert targets(first)[1:] == [*undone, "POST /flush_cache"]

    tell(story)


def test_a_pause_that_fails_at_one_replica_is_undone_at_the_others() -> None:
    async def story(found: Routed) -> None:
        first, second = found.replicas
        for each in found.replicas:
            each.answers["/is_paused"] = 200, {"is_paused": False}
        second.answers["/pause_generation"] = 504, {"message": "requests still ran", "retryable": True}
        assert (await found.http.post("/pause_generation", json={"mode": "keep"})).status_code == 504
        assert targets(first) == ["POST /pause_generation", "POST /continue_generation"]
        assert targets(second) == ["POST /pause_generation"]
        first.answers["/is_paused"] = 200, {"is_paused": True}
        assert (await found.http.post("/pause_generation", json={"mode": "keep"})).status_code == 504
        assert targets(first)[2:] == ["POST /pause_generation"]

    tell(story)


def test_a_pause_of_somebody_else_outlives_one_that_is_given_up() -> None:
    async def story(found: Routed) -> None:
        for each in found.replicas:
            each.answers["/is_paused"] = 200, {"is_paused": False}
        found.replicas[1].held["/pause"] = asyncio.Event()
        asking = asyncio.ensure_future(found.http.post("/pause"))
        await found.until(lambda: all("POST /pause" in targets(each) for each in found.replicas))
        assert (await found.http.post("/pause_generation", json={})).status_code == 200
        asking.cancel()
        await found.until(lambda: found.replicas[1].num_dropped == 1)
        await found.http.post("/flush_cache")
        assert targets(found.replicas[0]) == ["POST /pause", "POST /pause_generation", "POST /flush_cache"]

    tell(story)


@pytest.mark.parametrize("path", ["/continue_generation", "/release_memory_occupation", "/abort_request"])
def test_what_is_no_pause_reaches_all_though_its_client_leaves(path: str) -> None:
    async def story(found: Routed) -> None:
        second = found.replicas[1]
        second.held[path] = asyncio.Event()
        await leave(found, path)
        second.held[path].set()
        await asyncio.sleep(0.05)
        assert [each.num_dropped for each in found.replicas] == [0, 0]

    tell(story)


def test_a_server_under_two_names_is_one_replica() -> None:
    """Asked once, by updates and by commands; and by its other name when the first is taken away."""

    async def story(found: Routed) -> None:
        one, router = found.replicas[0], found.router.replicas
        await found.http.post("/workers", json={"url": f"http://localhost:{one.port}"})
        await found.until(lambda: [each.is_another_name for each in router] == [False, True])
        other = (await found.http.get("/workers/replica-1")).json()
        assert other["is_healthy"] is False
        assert f"is replica-0, {one.url}, under another name" in other["ailment"]
        one.answers["/update_weights_from_disk"] = 200, {"success": True, "report": {"version": "v1"}}
        body = {"model_path": "/x", "weight_version": "v1"}
        assert (await found.http.post("/update_weights_from_disk", json=body)).status_code == 200
        one.weight_version = "v1"
        told = (await found.http.post("/flush_cache")).json()
        assert len(told["results"]) == 1
        assert targets(one) == ["POST /update_weights_from_disk", "POST /flush_cache"]
        assert (await found.generate()).json()["version"] == "v1"
        await found.http.delete("/workers/replica-0")
        await found.until_healthy(1)
        assert (await found.generate()).json()["version"] == "v1"

    tell(story, num_replicas=1)


def test_workers_are_added_listed_and_removed() -> None:
    async def story(found: Routed) -> None:
        http, more = found.http, await FakeReplica().start()
        more.weight_version = "v7"
        added = await http.post("/workers", json={"url": more.url, "worker_type": "regular", "bootstrap_port": None})
        assert added.status_code == 202 and added.json()["worker_id"] == "replica-1"
        assert (await http.post("/workers", json={"url": more.url + "/"})).status_code == 409
        await found.until_healthy(2)
        listed = (await http.get("/workers")).json()
        assert listed["total"] == 2 and [each["url"] for each in listed["workers"]] == [found.replicas[0].url, more.url]
        assert [each["weight_version"] for each in listed["workers"]] == ["v0", "v7"]
        assert (await http.get("/ready")).json()["weight_version"] is None  # they differ
        assert (await http.get("/workers/replica-1")).json()["is_healthy"] is True
        ports = {(await found.generate(n=n)).json()["port"] for n in range(8)}
        assert ports == {found.replicas[0].port, more.port}
        asking = asyncio.ensure_future(found.generate(rid="slow", delay=0.3))
        await found.until(lambda: any(each.num_requests for each in found.router.replicas))
        for number in (0, 1):
            assert (await http.delete(f"/workers/replica-{number}")).status_code == 202
        assert (await asking).json()["text"] == "slow"  # what it was asked it answers
        assert (await http.delete("/workers/replica-1")).status_code == 404
        again = await http.post("/workers", json={"url": more.url})
        assert again.json()["worker_id"] == "replica-2"
        await found.until_healthy(1)
        await more.die()

    tell(story, num_replicas=1)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"url": "ftp://x"}, "url"),
        ({"url": "http://127.0.0.1:1/path"}, "url"),
        ({"url": "http://me:secret@127.0.0.1:1"}, "url"),
        ({"url": "http://127.0.0.1:99999"}, "url"),
        ({"url": "http://127.0.0.1:1", "worker_type": "prefill"}, "worker_type"),
        ({"url": "http://127.0.0.1:1", "bootstrap_port": 5}, "bootstrap_port"),
        ({"url": "http://127.0.0.1:1", "api_key": "x"}, "api_key"),
        ({}, "body"),
    ],
)
def test_a_worker_that_cannot_be_is_refused_by_field(body: dict[str, Any], field: str) -> None:
    async def story(found: Routed) -> None:
        reply = await found.http.post("/workers", json=body)
        assert reply.status_code == 400 and reply.json()["param"] == field

    tell(story, num_replicas=0)


def test_a_new_version_or_a_flush_empties_what_is_remembered_of_a_replica() -> None:
    async def story(found: Routed) -> None:
        index = found.router.replicas._policy._index  # type: ignore[attr-defined]
        for empty in ("version", "flush"):
            await found.generate(input_ids=list(range(500)))
            assert index.num_blocks > 0
            if empty == "version":
                found.replicas[0].weight_version = "v1"
            else:
                await found.http.post("/flush_cache")
            await found.until(lambda: index.num_blocks == 0)

    tell(story, num_replicas=1)
