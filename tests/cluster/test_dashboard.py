"""What a router's page shows of its replicas, and how little it asks them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest

from headrace import AsyncClient
from headrace.cluster import lookout
from headrace.server.dashboard_state import DashboardState
from headrace.telemetry import History, HistoryPoint, SampleNote, UpdateNote
from tests.cluster.builders import WAIT_SECONDS, Routed
from tests.cluster.replica import FakeReplica
from tests.cluster.test_router import tell
from tests.server.test_dashboard import check_page

SECRET = {"authorization": "Bearer secret"}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(lookout, "LOOK_SECONDS", 0.05)
    yield


def history_of(name: str, num_running: int) -> History:
    """What an engine would have noted."""
    history = History()
    history.note_point(HistoryPoint(time=1.0, state="ready", version="v1", num_running=num_running))
    facts: dict[str, Any] = {"epoch": 1, "num_tensors": 2, "num_bytes": 8, "mode": "shadow", "road": "a folder"}
    history.note_update(UpdateNote(time=1.0, seconds=0.1, version="v1", pause_ms=0.5, **facts))
    facts = {"finish": "stop", "seconds": 0.5, "num_prompt_tokens": 3, "num_tokens": 4}
    history.note_sample(SampleNote(time=1.0, request_id=name, index=0, **facts))
    return history


def tell_history(replica: FakeReplica, history: History, since: int = 0) -> None:
    """What the replica answers from now on."""
    state = DashboardState(
        kind="server", version="1", model="m", is_ready=True, look_seconds=1.0, history=history.since(since)
    )
    replica.answer = 200, msgspec.to_builtins(state)


async def look(found: Routed, since: int = 0, **more: Any) -> DashboardState:
    reply = await found.http.get("/dashboard/state", params={"since": since}, **more)
    assert reply.status_code == 200, reply.text
    return msgspec.json.decode(reply.content, type=DashboardState)


async def look_until_seen(found: Routed, num_samples: int, **more: Any) -> DashboardState:
    async with asyncio.timeout(WAIT_SECONDS):
        while len((state := await look(found, **more)).history.samples) < num_samples:
            await asyncio.sleep(0.01)
    return state


def test_replicas_are_shown_as_one_and_each_by_itself() -> None:
    async def story(found: Routed) -> None:
        for number, each in enumerate(found.replicas):
            tell_history(each, history_of(f"of {number}", num_running=number + 1))
        await found.until(lambda: all(each.weight_version == "v0" for each in found.router.replicas))
        assert [each.seen for each in found.replicas] == [[], []], "nobody is asked before somebody looks"
        first = await look(found)
        assert first.replicas is not None and first.kind == "router" and first.is_ready
        state = await look_until_seen(found, 2)
        assert state.replicas is not None
        assert [each.id for each in state.replicas] == ["replica-0", "replica-1"]
        assert [each.now.num_running for each in state.replicas if each.now] == [1, 2]
        assert {(each.request_id, each.replica) for each in state.history.samples} == {
            ("of 0", "replica-0"),
            ("of 1", "replica-1"),
        }
        assert {each.replica for each in state.history.updates} == {"replica-0", "replica-1"}
        async with asyncio.timeout(WAIT_SECONDS):
            while 3 not in (await look(found)).history.points["num_running"]:
                await asyncio.sleep(0.01)
        assert (await look(found, state.history.last)).history.samples == []

    tell(story)


def test_a_replica_is_asked_for_what_is_new_with_the_router_s_key() -> None:
    async def story(found: Routed) -> None:
        (replica,) = found.replicas
        history = history_of("first", 1)
        tell_history(replica, history)
        assert (await found.http.get("/dashboard/state")).status_code == 401
        await look_until_seen(found, 1, headers=SECRET)
        last = history.since(0).last
        await found.until(lambda: any(target.endswith(f"since={last}") for target, _, _ in replica.seen))
        assert replica.seen[0][0] == "GET /dashboard/state?since=0"
        assert {headers["authorization"] for _, headers, _ in replica.seen} == {"Bearer of-replicas"}
        tell_history(replica, history_of("after a restart", 1))  # numbers begin anew, under another name
        state = await look_until_seen(found, 2, headers=SECRET)
        assert {each.request_id for each in state.history.samples} == {"first", "after a restart"}

    tell(story, num_replicas=1, api_key="secret", replica_api_key="of-replicas")


def test_a_key_of_one_client_shows_nothing_to_another() -> None:
    """A router without a key of its own asks without one."""

    async def story(found: Routed) -> None:
        (replica,) = found.replicas
        tell_history(replica, history_of("x", 1))
        await look(found, headers=SECRET)
        await look_until_seen(found, 1)
        assert not any("authorization" in headers for _, headers, _ in replica.seen)

    tell(story, num_replicas=1)


def test_nobody_is_asked_once_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookout, "LINGER_SECONDS", 0.2)

    async def story(found: Routed) -> None:
        for each in found.replicas:
            tell_history(each, history_of("x", 1))
        await look_until_seen(found, 2)
        await asyncio.sleep(0.6)
        num_asked = [len(each.seen) for each in found.replicas]
        await asyncio.sleep(0.4)
        assert [len(each.seen) for each in found.replicas] == num_asked
        await look(found)
        await found.until(lambda: all(len(each.seen) > num_asked[0] for each in found.replicas))

    tell(story)


def test_a_replica_that_says_nonsense_is_shown_without_figures() -> None:
    async def story(found: Routed) -> None:
        nonsense, well = found.replicas
        tell_history(well, history_of("well", 4))
        told: list[tuple[int, Any]] = [(200, "no JSON"), (200, {"history": {}}), (404, {}), (200, {"history": None})]
        for answer in told:
            nonsense.answer, num_asked = answer, len(nonsense.seen)
            await look(found)
            await found.until(lambda num=num_asked: len(nonsense.seen) > num + 1)  # type: ignore[misc]
        state = await look_until_seen(found, 1)
        assert state.replicas is not None
        assert [each.now and each.now.num_running for each in state.replicas] == [None, 4]
        await well.die()
        await found.until(lambda: not list(found.router.replicas)[1].is_healthy)
        views = (await look(found)).replicas
        assert views is not None and not views[1].is_healthy and views[1].ailment and views[1].now is not None

    tell(story)


def test_rewards_go_to_all_replicas() -> None:
    async def story(found: Routed) -> None:
        for each in found.replicas:
            each.answer = 200, {"num_known": 1}
        reply = await found.http.post("/rewards", json={"rewards": {"x": 1}})
        assert reply.status_code == 200 and reply.json()["num_known"] == 1
        assert [each.seen[0][::2] for each in found.replicas] == [("POST /rewards", b'{"rewards":{"x":1}}')] * 2
        for each in found.replicas:
            each.answer = 200, msgspec.msgpack.encode(2).decode()
        async with AsyncClient(f"http://127.0.0.1:{found.port}") as client:
            assert await client.give_rewards({"x": 1.0}) == 4

    tell(story)


def test_pages_and_the_list_of_routes_are_the_router_s_own() -> None:
    async def story(found: Routed) -> None:
        for path in ("/dashboard", "/docs"):
            check_page(await found.http.get(path))
        assert (await found.http.get("/openapi.json")).status_code == 401
        listing = (await found.http.get("/openapi.json", headers=SECRET)).json()
        assert {"/workers", "/workers/{worker_id}", "/generate", "/headrace/{method}"} <= listing["paths"].keys()
        refused = listing["paths"]["/start_profile"]["post"]
        assert "501 here" in refused["description"] and refused["security"] == [{"admin": []}]
        reply = await found.http.get("/dashboard/state", params={"since": "x"}, headers=SECRET)
        assert (reply.status_code, reply.json()["param"]) == (400, "since")

    tell(story, num_replicas=0, api_key="secret")


def test_strangers_pages_read_nothing() -> None:
    async def story(found: Routed) -> None:
        foreign: httpx.Response = await found.http.get("/dashboard/state", headers={"origin": "http://evil.example"})
        assert foreign.status_code == 403
        assert (await found.http.get("/dashboard", headers={"host": "evil.example"})).status_code == 200

    tell(story, num_replicas=0)
