"""A generation whose replica dies goes on at another one, and its client sees one answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace.cluster import resumption
from headrace.cluster.options import RouterOptions
from headrace.cluster.resumption import Resumption
from headrace.cluster.router import ReplicaRouter
from headrace.server.listening import listen
from headrace.types.carried import CARRY_HEADER, CarriedBefore, CarriedPart, PackedGeneration, Piece
from headrace.types.http import framed
from tests.cluster.builders import Routed
from tests.cluster.replica import FakeReplica, Headers
from tests.cluster.test_router import events_of
from tests.cluster.weighted import WeightedReplica, token_at

PROMPT = [3, 1, 4]
NUM_TOKENS = 40
ASKED: dict[str, Any] = {
    "input_ids": PROMPT,
    "sampling_params": {"max_new_tokens": NUM_TOKENS, "token_seconds": 0.01},
    "return_logprob": True,
    "rid": "r",
}


@contextlib.asynccontextmanager
async def weighted(num: int = 2, **options: Any) -> AsyncIterator[Routed]:
    replicas: list[FakeReplica] = [await WeightedReplica().start() for _ in range(num)]
    for number, each in enumerate(replicas):
        each.weight_version = f"v{number}"
    async with over(replicas, **options) as found:
        yield found


@contextlib.asynccontextmanager
async def over(
    replicas: list[FakeReplica], weights_folder: Path | None = None, **options: Any
) -> AsyncIterator[Routed]:
    settings = RouterOptions(policy="round_robin", **options)
    router = ReplicaRouter([each.url for each in replicas], settings, weights_folder=weights_folder)
    listener = listen("127.0.0.1", 0)
    await router.start(listener)
    found = Routed(router, replicas, listener.getsockname()[1])
    try:
        await found.until_healthy(len(replicas))
        yield found
    finally:
        await found.http.aclose()
        await router.stop(0.0)
        for each in replicas:
            await each.die()
        await asyncio.sleep(0)


async def killed_half_way(found: Routed, num_kills: int, **asked: Any) -> Any:
    """The answer to a request whose replica dies when it has made some of it, and so does the next one."""
    asking = asyncio.ensure_future(found.generate(**{**ASKED, **asked}))
    dead: set[int] = set()
    for _ in range(num_kills):
        await found.until(lambda: any(each.num_requests for each in found.router.replicas if each.number not in dead))
        busy = next(each for each in found.router.replicas if each.num_requests and each.number not in dead)
        await asyncio.sleep(0.12)
        dead.add(busy.number)
        await found.replicas[busy.number].die()
    return await asking


def check(answer: dict[str, Any], num_replicas: int) -> None:
    """It is that of one generation, but for the weights."""
    ids, meta = answer["output_ids"], answer["meta_info"]
    assert ids == [token_at(PROMPT, meta["seed"], len(PROMPT) + i) for i in range(NUM_TOKENS)]
    assert answer["text"] == "".join(f"<{token}>" for token in ids)
    assert (meta["id"], meta["prompt_tokens"], meta["completion_tokens"]) == ("r", len(PROMPT), NUM_TOKENS)
    assert meta["finish_reason"] == {"type": "length", "length": NUM_TOKENS}
    assert [token for _, token, _ in meta["output_token_logprobs"]] == ids
    assert meta["output_token_logprobs_length"] == NUM_TOKENS
    assert [version for version, _ in meta["version_spans"]] == [f"v{number}" for number in range(num_replicas)]
    assert sum(num for _, num in meta["version_spans"]) == NUM_TOKENS
    assert len(meta["version_epochs"]) == num_replicas and meta.get("num_resumed", 0) == num_replicas - 1


@pytest.mark.parametrize("num_kills", [1, 2])
def test_a_cumulative_stream(num_kills: int) -> None:
    async def story() -> None:
        async with weighted(3) as found:
            events = events_of((await killed_half_way(found, num_kills, stream=True)).text)
            assert [each["meta_info"]["completion_tokens"] for each in events] == list(range(1, NUM_TOKENS + 1))
            assert [len(each["output_ids"]) for each in events] == list(range(1, NUM_TOKENS + 1))
            check(events[-1], num_kills + 1)
            assert f"headrace_router_resumptions_total {num_kills}.0" in (await found.http.get("/metrics")).text
            await found.until(lambda: all(each.num_requests == 0 for each in found.router.replicas))

    asyncio.run(story())


def test_a_stream_of_what_is_new() -> None:
    async def story() -> None:
        async with weighted(3) as found:
            reply = await killed_half_way(found, 2, stream=True, incremental_streaming_output=True)
            events = events_of(reply.text)
            assert [len(each["output_ids"]) for each in events] == [1] * NUM_TOKENS
            assert [each["meta_info"]["completion_tokens"] for each in events] == list(range(1, NUM_TOKENS + 1))
            ids = [each["output_ids"][0] for each in events]
            assert [each["meta_info"]["output_token_logprobs"][0][1] for each in events] == ids
            assert {each["meta_info"]["prompt_tokens"] for each in events} == {len(PROMPT)}
            seed = events[0]["meta_info"]["seed"]
            assert ids == [token_at(PROMPT, seed, len(PROMPT) + i) for i in range(NUM_TOKENS)]
            assert "".join(each["text"] for each in events) == "".join(f"<{token}>" for token in ids)

    asyncio.run(story())


def test_a_whole_answer_where_all_are_resumed() -> None:
    async def story() -> None:
        async with weighted(3, resume="all") as found:
            reply = await killed_half_way(found, 2)
            assert reply.headers["content-type"] == "application/json"
            check(reply.json(), 3)

    asyncio.run(story())


def test_an_answer_that_goes_on_from_another_one() -> None:
    async def story() -> None:
        async with weighted() as found:
            before = [token_at(PROMPT, 7, len(PROMPT) + i) for i in range(5)]
            params = {**ASKED["sampling_params"], "sampling_seed": 7, "max_new_tokens": NUM_TOKENS - 5}
            asked = {"input_ids": [*PROMPT, *before], "num_output_ids_in_prompt": 5, "sampling_params": params}
            last = events_of((await killed_half_way(found, 1, stream=True, **asked)).text)[-1]
            assert last["output_ids"] == [token_at(PROMPT, 7, len(PROMPT) + i) for i in range(5, NUM_TOKENS)]

    asyncio.run(story())


def test_off_or_out_of_replicas_it_ends_with_a_retryable_error() -> None:
    async def story(num: int, num_kills: int, **options: Any) -> None:
        async with weighted(num, **options) as found:
            *events, last = events_of((await killed_half_way(found, num_kills, stream=True)).text)
            assert last["error"]["retryable"] is True and last["error"]["err_type"] == "UnreachableError"
            made = events[-1]["output_ids"]
            seed = events[-1]["meta_info"]["seed"]
            assert made == [token_at(PROMPT, seed, len(PROMPT) + i) for i in range(len(made))]

    asyncio.run(story(2, 1, resume="off"))
    asyncio.run(story(2, 2, wait_timeout=0.5))


def test_a_body_of_any_kind_is_passed_on_as_it_came() -> None:
    """It is the replica that knows what may go on elsewhere."""
    for body in (b"{", b"", b'{"stream": "yes"}'):
        resumption = Resumption(body, "all", 1 << 20)
        assert resumption.request() == ([(CARRY_HEADER, b"all")], body)
        resumption.move()
        assert resumption.request() == ([(CARRY_HEADER, b"all")], body) and not resumption.num_moves


class ScriptedReplica(FakeReplica):
    """Streams these bytes, each piece by itself, and breaks off behind the last unless it `ends`. Carried, if it is
    asked for that and does not refuse to."""

    def __init__(self, *pieces: bytes, ends: bool = True, carries: str = "stream") -> None:
        super().__init__()
        self.pieces = pieces
        self.ends = ends
        self.carries = carries
        self.bodies: list[tuple[Headers, bytes]] = []

    async def _answer(self, writer: asyncio.StreamWriter, target: str, body: bytes, headers: Headers) -> bool:
        self.bodies.append((headers, body))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n")
        writer.write(b"X-Headrace-Carried: %b\r\n\r\n" % self.carries.encode() if self.carries else b"\r\n")
        for piece in self.pieces:
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            await writer.drain()
            await asyncio.sleep(0.01)
        if self.ends:
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        return self.ends


def part(told: bytes = b"", *tokens: int, **more: Any) -> bytes:
    """A part that tells of these tokens."""
    made: dict[str, Any] = {"logprobs": [0.0], "seed": 7}
    pieces = [PackedGeneration(request_id="r", token_ids=[each], **made) for each in tokens]
    packed = b"".join(msgspec.msgpack.encode((0, each)) for each in pieces)
    return framed(msgspec.msgpack.encode(CarriedPart(told, len(tokens), packed, begun_at=9.5, name="call", **more)))


def ids_of(packed: msgspec.Raw) -> list[int]:
    _, piece = msgspec.msgpack.decode(packed, type=Piece)
    ids: list[int] = piece.token_ids
    return ids


LAST = part(b"data: [DONE]\n\n", is_last=True)
LOST = part(b"data: sorry\n\n", is_lost=True)


async def answered(
    replicas: list[FakeReplica], max_attempts: int = 3, max_body_bytes: int = 1 << 20, **asked: Any
) -> Any:
    started = [await each.start() for each in replicas]
    settings: dict[str, Any] = {"wait_timeout": 1, "max_attempts": max_attempts, "max_body_bytes": max_body_bytes}
    async with over(started, resume="all", **settings) as found:
        return await found.generate(**{**ASKED, "stream": True, **asked})


def test_what_came_is_sent_to_the_next_one_before_the_clients_own_body() -> None:
    async def story() -> None:
        first = ScriptedReplica(part(b"a", 5) + part(b"b", 6, 7), part(b"u"), ends=False)
        second = ScriptedReplica(part(b"c", 8), ends=False)
        third = ScriptedReplica(part(b"d", 9), LAST)
        reply = await answered([first, second, third])
        assert reply.text == "abucddata: [DONE]\n\n"
        asked = [*first.bodies, *second.bodies, *third.bodies]
        own = asked[0][1]
        assert [headers["x-headrace-carry"] for headers, _ in asked] == ["all"] * 3
        assert "x-headrace-continues" not in asked[0][0]
        for (headers, body), ids, num in zip(asked[1:], ([5, 6, 7], [5, 6, 7, 8]), (1, 2), strict=True):
            size = int(headers["x-headrace-continues"])
            before = msgspec.msgpack.decode(body[:size], type=CarriedBefore)
            assert body[size:] == own and [ids_of(each)[0] for each in before.pieces] == ids
            assert (before.begun_at, before.name, before.num_moves) == (9.5, "call", num)
            assert before.num_told == (1 if num == 1 else 0)

    asyncio.run(story())


def test_an_engine_that_died_is_not_told_and_what_came_with_it_is_kept() -> None:
    async def story() -> None:
        reply = await answered([ScriptedReplica(part(b"a", 5) + LOST), ScriptedReplica(part(b"b", 6) + LAST)])
        assert reply.text == "abdata: [DONE]\n\n"

    asyncio.run(story())


NONSENSE = (b"\x03\0\0\0abc", b"\xff\xff\xff\xff", b"\x02\0\0\0\x91\x03", part(b"z")[:-1])


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_what_a_replica_answers_that_cannot_be_read_is_asked_elsewhere(nonsense: bytes) -> None:
    async def story() -> None:
        reply = await answered([ScriptedReplica(part(b"a", 5) + nonsense), ScriptedReplica(part(b"b", 6) + LAST)])
        assert reply.text == "abdata: [DONE]\n\n"

    asyncio.run(story())


def test_a_whole_answer_is_begun_anew_where_its_own_bytes_broke() -> None:
    async def story() -> None:
        head: dict[str, Any] = {"status": 201, "headers": {"content-type": "text/x", "content-length": "999"}}
        first = ScriptedReplica(part(b"", 5), part(b"he", **head), ends=False, carries="whole")
        second = ScriptedReplica(part(b"he", **head), part(b"llo", is_last=True), carries="whole")
        reply = await answered([first, second], stream=False)
        assert (reply.status_code, reply.text, reply.headers["content-type"]) == (201, "hello", "text/x")
        size = int(second.bodies[0][0]["x-headrace-continues"])
        assert msgspec.msgpack.decode(second.bodies[0][1][:size], type=CarriedBefore).num_told == 0

    asyncio.run(story())


def test_a_whole_answer_that_says_that_its_engine_died_is_asked_elsewhere() -> None:
    async def story() -> None:
        died = msgspec.json.encode({"retryable": True, "err_type": "EngineDeadError"})
        first = ScriptedReplica(part(b"", 5), part(died, status=503, is_last=True), carries="whole")
        second = ScriptedReplica(part(b"{}", status=200, is_last=True), carries="whole")
        reply = await answered([first, second], stream=False)
        assert (reply.status_code, reply.text) == (200, "{}")

    asyncio.run(story())


def test_one_that_does_not_go_on_with_it_tells_the_client_nothing() -> None:
    async def story() -> None:
        first, strange = ScriptedReplica(part(b"data: a\n\n", 5), ends=False), ScriptedReplica(b"x" * 9, carries="")
        *events, end = (await answered([first, strange], 2)).text.split("\n\n")[:-1]
        assert events[0] == "data: a" and "retryable" in events[1] and end == "data: [DONE]"

    asyncio.run(story())


@pytest.mark.parametrize("bound", ["pieces", "bytes"])
def test_of_an_endless_answer_no_more_is_kept_than_a_replica_reads(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a client has some of ends with an error then; what it has nothing of begins anew."""
    options = {"max_body_bytes": 1024} if bound == "bytes" else {}
    monkeypatch.setattr(resumption, "MAX_PIECES", 20 if bound == "pieces" else 1 << 20)

    async def story() -> None:
        many = [part(b"data: a\n\n", 5)] * 21
        reply = await answered([ScriptedReplica(*many, ends=False), ScriptedReplica(LAST)], **options)
        *_, error, end = reply.text.split("\n\n")[:-1]
        assert reply.text.startswith("data: a\n\n" * 21) and "too long" in error and end == "data: [DONE]"
        first = ScriptedReplica(*[part(b"", 5)] * 21, ends=False, carries="whole")
        second = ScriptedReplica(part(b"{}", 5, status=200, is_last=True), carries="whole")
        assert (await answered([first, second], stream=False, **options)).text == "{}"
        assert "x-headrace-continues" not in second.bodies[0][0]

    asyncio.run(story())


def test_an_answer_that_is_whole_but_for_its_connections_end_is_whole() -> None:
    async def story() -> None:
        reply = await answered([ScriptedReplica(part(b"a", 5), LAST, ends=False)])
        assert reply.text == "adata: [DONE]\n\n"

    asyncio.run(story())


def test_a_client_cannot_speak_as_a_router() -> None:
    async def story() -> None:
        replica = ScriptedReplica(b"told", carries="")
        async with over([await replica.start()], resume="off") as found:
            headers = {"x-headrace-carry": "all", "x-headrace-continues": "3"}
            assert (await found.http.post("/v1/completions", content=b"{}", headers=headers)).text == "told"
            assert not {"x-headrace-carry", "x-headrace-continues"} & replica.bodies[0][0].keys()

    asyncio.run(story())


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_parts_may_be_cut_anywhere(size: int) -> None:
    raw = part(b"a", 5) + part() + part(b"b", 6) + LAST
    resumption = Resumption(b"own", "streams", 1 << 20)
    taken = [resumption.take(raw[at : at + size], is_whole=False) for at in range(0, len(raw), size)]
    assert b"".join(each.told for each in taken) == b"abdata: [DONE]\n\n" and taken[-1].is_last
    assert not any(each.is_last for each in taken[:-1]) and not any(each.problem for each in taken)
    (_, (_, size_of_before)), body = resumption.request()
    before = msgspec.msgpack.decode(body[: int(size_of_before)], type=CarriedBefore)
    assert [ids_of(each) for each in before.pieces] == [[5], [6]] and body.endswith(b"own")
