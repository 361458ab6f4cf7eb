"""Weights through a router, over replicas that only say what became of them: who has not got an update is not asked."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest

from headrace.cluster.fence import NO_WEIGHTS, Fence
from tests.cluster.builders import Routed
from tests.cluster.replica import FakeReplica
from tests.cluster.test_router import tell

DISK, TENSOR = "/update_weights_from_disk", "/update_weights_from_tensor"
REFUSED = (400, {"message": "no such folder", "retryable": False, "err_type": "RequestError"})


def done(version: str) -> tuple[int, Any]:
    return 200, {"success": True, "message": "Weights updated.", "report": {"version": version, "epoch": 1}}


def takes(replica: FakeReplica, version: str) -> None:
    """Its next update succeeds, and is seen by who looks."""
    replica.answers[DISK], replica.weight_version = done(version), version


async def ports_asked(found: Routed) -> set[int]:
    return {(await found.generate(n=n)).json()["port"] for n in range(6)}


async def worker(found: Routed, number: int) -> dict[str, Any]:
    return (await found.http.get(f"/workers/replica-{number}")).json()  # type: ignore[no-any-return]


def seen_by(replica: FakeReplica) -> list[str]:
    return [each[0].removeprefix("POST ") for each in replica.seen if not each[0].endswith("/generate")]


def test_an_update_that_all_take_leaves_all_in_the_rotation() -> None:
    async def story(found: Routed) -> None:
        for each in found.replicas:
            takes(each, "v1")
        told = (await found.http.post(DISK, json={"model_path": "/x", "weight_version": "v1"})).json()
        assert told["success"] is True and told["report"]["version"] == "v1" and told["failed_replicas"] == []
        assert await ports_asked(found) == {each.port for each in found.replicas}
        assert found.router.replicas.fence.number == 1
        assert "headrace_router_updates_total 1.0" in (await found.http.get("/metrics")).text

    tell(story, policy="round_robin")


def test_one_that_fails_leaves_the_rotation_and_comes_back_with_the_next_update() -> None:
    async def story(found: Routed) -> None:
        first, second = found.replicas
        takes(first, "v1")
        second.answers[DISK] = REFUSED
        asking = asyncio.ensure_future(found.generate(rid="old", delay=60, n=1))
        more = asyncio.ensure_future(found.generate(rid="new", delay=0.3, n=2))
        await found.until(lambda: all(any("generate" in seen[0] for seen in each.seen) for each in found.replicas))
        told = (await found.http.post(DISK, json={"model_path": "/x"})).json()
        assert told["success"] is True and told["failed_replicas"] == ["replica-1"]
        assert [each["status"] for each in told["results"]] == [200, 400]
        assert await ports_asked(found) == {first.port}
        shown = await worker(found, 1)
        assert (shown["is_current"], shown["is_ready"], shown["is_healthy"]) == (False, False, True)
        assert "not those of the last update, 'v1'" in shown["ailment"]
        text = (await found.http.get("/metrics")).text
        assert f'replica_is_current{{replica="replica-1",url="{second.url}"}} 0.0' in text
        asking.cancel()
        assert (await more).json()["port"] == first.port  # what was asked of the second was asked elsewhere
        for each in found.replicas:
            takes(each, "v2")
        assert (await found.http.post(DISK, json={"model_path": "/y"})).json()["failed_replicas"] == []
        assert await ports_asked(found) == {first.port, second.port}

    tell(story, policy="round_robin")


def test_one_that_is_seen_with_the_current_label_comes_back() -> None:
    async def story(found: Routed) -> None:
        first, second = found.replicas
        takes(first, "v1")
        second.answers[DISK] = REFUSED
        await found.http.post(DISK, json={"model_path": "/x"})
        assert await ports_asked(found) == {first.port}
        second.weight_version = "v1"  # pushed to it directly
        await found.until(lambda: all(each.is_current for each in found.router.replicas))
        assert await ports_asked(found) == {first.port, second.port}

    tell(story, policy="round_robin")


def test_a_label_that_was_there_before_proves_nothing() -> None:
    async def story(found: Routed) -> None:
        first, second = found.replicas
        takes(first, "v0")
        second.answers[DISK] = REFUSED
        await found.http.post(DISK, json={"model_path": "/x"})
        await asyncio.sleep(1.3)  # it is looked at
        assert await ports_asked(found) == {first.port}
        takes(second, "v0")
        await found.http.post(DISK, json={"model_path": "/x"})
        assert await ports_asked(found) == {first.port, second.port}

    tell(story, policy="round_robin")


@pytest.mark.parametrize("state", ["needs_weights", "poisoned"])
def test_one_that_says_that_it_has_no_weights_is_behind(state: str) -> None:
    """Its engine died and was started again, in the same server."""

    async def story(found: Routed) -> None:
        first, second = found.replicas
        first.answers[DISK] = second.answers[DISK] = done("v1")
        told = json.dumps({"message": "not ready", "weights_state": state}).encode()
        head = b"HTTP/1.1 503 X\r\nX-Headrace-Instance: one\r\ncontent-length: %d\r\n\r\n"
        second.raw["/ready"] = head % len(told) + told
        await found.until(lambda: [each.trouble for each in found.router.replicas] == ["", "not ready"])
        assert all(each.is_current for each in found.router.replicas)  # there was no update, which it would lack
        await found.http.post(DISK, json={"model_path": "/x"})
        await found.until(lambda: [each.is_current for each in found.router.replicas] == [True, False])
        second.raw.clear()
        first.weight_version = second.weight_version = "v1"
        await found.until(lambda: all(each.is_current for each in found.router.replicas))

    tell(story)


def test_a_new_process_at_an_old_address_is_not_taken_for_the_old_one() -> None:
    async def story(found: Routed) -> None:
        first, second = found.replicas
        for each in found.replicas:
            takes(each, "v1")
        await found.http.post(DISK, json={"model_path": "/x"})
        await found.until(lambda: all(each.instance for each in found.router.replicas))
        second.instance, second.weight_version = "two", "v0"  # unseen: it answered nothing in between
        replies = [(await found.generate(n=n)).json() for n in range(6)]
        assert {reply["version"] for reply in replies} == {"v1"}
        assert {reply["port"] for reply in replies} == {first.port}
        await found.until(lambda: next(iter(found.router.replicas)).is_healthy)
        await found.until(lambda: not [*found.router.replicas][1].is_current)
        assert await ports_asked(found) == {first.port}

    tell(story, policy="round_robin")


def test_an_update_that_none_takes_changes_nothing() -> None:
    async def story(found: Routed) -> None:
        for each in found.replicas:
            each.answers[DISK] = REFUSED
        reply = await found.http.post(DISK, json={"model_path": "/x"})
        assert reply.status_code == 400 and reply.json()["err_type"] == "RequestError"
        assert await ports_asked(found) == {each.port for each in found.replicas}
        for each in found.replicas:
            await each.die()
        await found.until_healthy(0)
        assert (await found.http.post(DISK, json={"model_path": "/x"})).status_code == 503

    tell(story, policy="round_robin")


def test_one_that_is_dead_or_dies_in_it_is_behind_when_it_is_back() -> None:
    async def story(found: Routed) -> None:
        first, second, third = found.replicas
        await second.die()
        await found.until_healthy(2)
        takes(first, "v1")
        third.answers[DISK] = 0, {}
        told = (await found.http.post(DISK, json={"model_path": "/x"})).json()
        assert told["failed_replicas"] == ["replica-2"]
        again = await FakeReplica().start(second.port)
        again.instance = "two"
        await found.until(lambda: all(each.is_healthy for each in found.router.replicas))
        assert await ports_asked(found) == {first.port} and not again.seen
        late = await FakeReplica().start()
        assert (await found.http.post("/workers", json={"url": late.url})).status_code == 202
        await found.until_healthy(4)
        assert await ports_asked(found) == {first.port}
        for each in (first, third, again, late):
            takes(each, "v2")
        await found.http.post(DISK, json={"model_path": "/y"})
        assert await ports_asked(found) == {each.port for each in (first, third, again, late)}
        await again.die()
        await late.die()

    tell(story, num_replicas=3, policy="round_robin")


def test_one_that_misses_a_bucket_gets_no_more_of_that_update() -> None:
    async def story(found: Routed) -> None:
        first, second = found.replicas

        async def bucket(version: str) -> dict[str, Any]:
            body = {"serialized_named_tensors": ["AA=="], "weight_version": version}
            return (await found.http.post(TENSOR, json=body)).json()  # type: ignore[no-any-return]

        first.answers[TENSOR] = 200, {"success": True, "message": "Bucket taken."}
        second.answers[TENSOR] = REFUSED
        assert (await bucket("v1"))["failed_replicas"] == ["replica-1"]
        assert await ports_asked(found) == {first.port, second.port}  # nothing is live yet
        second.answers.clear()
        assert len((await bucket("v1"))["results"]) == 1
        first.answers[TENSOR] = done("v1")
        assert (await bucket("v1"))["report"]["version"] == "v1"
        assert await ports_asked(found) == {first.port}
        assert seen_by(second) == [TENSOR, "/abort_weight_update"]
        second.answers[TENSOR] = done("v2")
        first.answers[TENSOR] = done("v2")
        assert len((await bucket("v2"))["results"]) == 2
        assert await ports_asked(found) == {first.port, second.port}

    tell(story, policy="round_robin")


def test_one_that_does_not_commit_with_the_others_is_behind_and_drops_what_it_has() -> None:
    async def story(found: Routed) -> None:
        first, second = found.replicas
        first.answers[TENSOR] = done("v1")
        second.answers[TENSOR] = 200, {"success": True, "message": "Bucket taken."}
        await found.http.post(TENSOR, json={"serialized_named_tensors": ["AA=="]})
        assert await ports_asked(found) == {first.port}
        assert seen_by(second) == [TENSOR, "/abort_weight_update"] and seen_by(first) == [TENSOR]

    tell(story, policy="round_robin")


@pytest.mark.parametrize("path", ["/end_weight_update", "/update_weight_version"])
def test_what_ends_an_update_or_names_it_is_a_fence(path: str) -> None:
    async def story(found: Routed) -> None:
        first, second = found.replicas
        assert (await found.http.post("/begin_weight_update", json={})).json()["success"] is True
        second.answers[path] = 409, {"message": "not complete", "retryable": True}
        told = (await found.http.post(path, json={"new_version": "v5"})).json()
        assert told["failed_replicas"] == ["replica-1"]
        assert await ports_asked(found) == {first.port}
        if path == "/update_weight_version":
            second.answers.clear()
            await found.http.post(path, json={"new_version": "v6"})  # a label makes no weights current
            assert await ports_asked(found) == {first.port}

    tell(story, policy="round_robin")


@pytest.mark.parametrize("is_stream", [False, True])
def test_where_no_replica_has_current_weights_requests_are_refused_at_once(is_stream: bool) -> None:
    """No time helps, but another update does: 503, which says when to come back."""

    async def story(found: Routed) -> None:
        for each in found.replicas:
            takes(each, "v1")
        await found.http.post(DISK, json={"model_path": "/x"})
        for each in found.replicas:
            each.instance, each.weight_version = each.instance[::-1], "v0"
        await found.until(lambda: not any(each.is_current for each in found.router.replicas))
        asking = asyncio.ensure_future(found.generate(stream=is_stream))
        await asyncio.wait((asking,), timeout=60)  # it would wait for an hour
        reply = asking.result()
        assert (reply.status_code, reply.json()["err_type"]) == (503, "NeedsWeightsError")
        assert reply.json()["retryable"] is True and reply.headers["retry-after"]
        assert "push all of them again (replica-0: its weights are" in reply.json()["message"]
        for each in found.replicas:
            takes(each, "v2")
        await found.http.post(DISK, json={"model_path": "/y"})
        assert (await found.generate()).status_code == 200

    tell(story, wait_timeout=3600)


def test_a_request_that_waits_is_answered_by_the_new_weights_once_they_are_there() -> None:
    async def story(found: Routed) -> None:
        (only,) = found.replicas
        more = await FakeReplica().start()
        await found.http.post("/workers", json={"url": more.url})
        await found.until_healthy(2)
        takes(more, "v1")
        only.answers[DISK] = REFUSED
        await found.http.post(DISK, json={"model_path": "/x"})
        await more.die()
        await found.until_healthy(1)
        asking = asyncio.ensure_future(found.generate(rid="late"))
        await asyncio.sleep(0.1)
        assert not asking.done()  # the one that is left has older weights
        takes(only, "v2")
        await found.http.post(DISK, json={"model_path": "/y"})
        assert (await asking).json()["version"] == "v2"

    tell(story, num_replicas=1)


def test_labels_tell_only_where_no_weights_before_had_them() -> None:
    fence = Fence()
    assert fence.admits(NO_WEIGHTS) and fence.admits(0)
    fence.advance("a", ["default", None])
    assert fence.held_by_label("a") == 1 and fence.held_by_label("default") == NO_WEIGHTS
    assert fence.admits(1) and not fence.admits(0) and not fence.admits(NO_WEIGHTS)
    fence.advance("default", ["a"])
    assert fence.held_by_label("default") == NO_WEIGHTS
    fence.advance(None, ["default"])
    assert fence.held_by_label(None) == NO_WEIGHTS
    fence.advance("b", [])
    assert fence.held_by_label("b") == 4
    fence.advance("a", ["b"])
    assert fence.held_by_label("a") == NO_WEIGHTS


RELABEL, BEGIN = "/headrace/set_weight_version", "/headrace/begin_update"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/update_weight_version", msgspec.json.encode({"new_version": "v2"})),
        (RELABEL, msgspec.msgpack.encode({"version": "v2"})),
        (BEGIN, msgspec.msgpack.encode({"version": "v2", "manifest": (), "partial": True, "timeout": 9.0})),
    ],
    ids=["label", "label of ours", "some tensors"],
)
def test_what_builds_on_the_current_weights_is_for_nobody_where_none_has_them(path: str, body: bytes) -> None:
    """A replica with older weights does not become current by a label, or by some tensors."""

    async def story(found: Routed) -> None:
        first, second = found.replicas
        takes(first, "v1")
        second.answers[DISK] = REFUSED
        assert (await found.http.post(DISK, json={"model_path": "/x"})).json()["failed_replicas"] == ["replica-1"]
        first.health = 503
        await found.until_healthy(1)
        reply = await found.http.post(path, content=body)
        assert reply.status_code == 503 and "push all of them again" in reply.json()["message"]
        assert path not in seen_by(second)
        assert not (await worker(found, 1))["is_current"]

    tell(story, policy="round_robin", wait_timeout=0.2)


def test_some_tensors_are_for_those_with_the_current_weights() -> None:
    async def story(found: Routed) -> None:
        first, second = found.replicas
        takes(first, "v1")
        second.answers[DISK] = REFUSED
        await found.http.post(DISK, json={"model_path": "/x"})
        for is_partial in (True, False):
            ask = {"version": "v2", "manifest": (), "partial": is_partial, "timeout": 9.0}
            await found.http.post(BEGIN, content=msgspec.msgpack.encode(ask))
        assert seen_by(first).count(BEGIN) == 2 and seen_by(second).count(BEGIN) == 1

    tell(story)


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        (DISK, msgspec.json.encode({"model_path": "/x"}), done("v1")),
        (TENSOR, msgspec.json.encode({"serialized_named_tensors": []}), done("v1")),
        ("/update_weight_version", msgspec.json.encode({"new_version": "v1"}), (200, {"success": True})),
    ],
    ids=["disk", "tensor", "label"],
)
def test_an_update_whose_client_goes_away_is_carried_out_at_all(path: str, body: bytes, told: tuple[int, Any]) -> None:
    """Some may have the weights already: the others follow, or leave the rotation."""

    async def story(found: Routed) -> None:
        first, second = found.replicas
        first.answers[path] = second.answers[path] = told
        second.held[path] = asyncio.Event()
        asking = asyncio.ensure_future(found.http.post(path, content=body))
        await found.until(lambda: path in seen_by(second))
        asking.cancel()
        await asyncio.sleep(0.2)
        assert second.num_dropped == 0 and found.router.replicas.fence.number == 0
        later = asyncio.ensure_future(found.http.post(path, content=body))
        await asyncio.sleep(0.2)
        assert seen_by(first).count(path) == 1  # one after the other, or they might end in another order elsewhere
        second.held[path].set()
        assert (await later).status_code == 200
        assert found.router.replicas.fence.number == 2
        assert all(each.is_current for each in found.router.replicas)

    tell(story)


def test_an_update_of_somebody_else_is_not_dropped_by_one_that_meets_it() -> None:
    async def story(found: Routed) -> None:
        first, second = found.replicas
        first.answers[TENSOR] = 409, {"message": "busy", "retryable": True, "err_type": "UpdateConflictError"}
        second.answers[TENSOR] = 200, {"success": True, "message": "Bucket taken."}
        body = {"serialized_named_tensors": ["AA=="], "weight_version": "v1"}
        assert (await found.http.post(TENSOR, json=body)).json()["failed_replicas"] == ["replica-0"]
        assert seen_by(first) == [TENSOR]

    tell(story)
