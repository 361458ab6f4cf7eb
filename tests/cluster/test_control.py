"""Calls that go to all replicas, and the list of replicas."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.cluster.builders import Routed
from tests.cluster.replica import FakeReplica
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
        assert [each.seen[0][2] for each in found.replicas] == [b'{"mode":"keep"}'] * 2
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
        async def slow(writer: asyncio.StreamWriter, target: str, body: bytes) -> bool:
            await asyncio.sleep(3600)
            return False

        for each in found.replicas:
            each._answer = slow  # type: ignore[method-assign]
        with pytest.raises(httpx.ReadTimeout):
            await found.http.post("/pause", timeout=0.3)
        await found.until(lambda: all(each.num_dropped == 1 for each in found.replicas))

    tell(story)


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
