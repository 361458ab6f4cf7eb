"""A generation whose replica dies goes on at another one, and its client sees one answer."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import operator
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from headrace.cluster.options import RouterOptions
from headrace.cluster.resumption import resumption_of
from headrace.cluster.router import ReplicaRouter
from headrace.server.listening import listen
from tests.cluster.builders import Routed
from tests.cluster.replica import FakeReplica
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


@pytest.mark.parametrize(
    "asked",
    [
        {"input_ids": [PROMPT, PROMPT]},
        {"input_ids": None, "text": "abc"},
        {"sampling_params": {"max_new_tokens": 5, "n": 2}},
        {"sampling_params": [{"max_new_tokens": 5}]},
        {"sampling_params": {"max_new_tokens": "many"}},
        {"num_output_ids_in_prompt": [1]},
        {"stream": "yes"},
        {"stream": False},
    ],
)
def test_what_is_not_one_sample_of_one_prompt_of_ids_is_not_touched(asked: dict[str, Any]) -> None:
    assert resumption_of("/generate", msgspec.json.encode({**ASKED, "stream": True, **asked}), "streams") is None
    assert resumption_of("/v1/completions", msgspec.json.encode({**ASKED, "stream": True}), "streams") is None
    assert resumption_of("/generate", b"{", "all") is None
    assert resumption_of("/generate", msgspec.json.encode({**ASKED, "stream": True}), "streams") is not None


def test_events_that_come_together_are_told_apart() -> None:
    """Of a cumulative stream the last one repeats those before it."""

    def event(ids: list[int]) -> bytes:
        meta = {"id": "r", "seed": 7, "completion_tokens": len(ids), "finish_reason": None, "prompt_tokens": 3}
        return b"data: " + msgspec.json.encode({"output_ids": ids, "meta_info": meta}) + b"\n\n"

    for is_incremental, part in ((False, event([5]) + event([5, 6])), (True, event([5]) + event([6]))):
        asked = {**ASKED, "stream": True, "incremental_streaming_output": is_incremental}
        resumption = resumption_of("/generate", msgspec.json.encode(asked), "streams")
        assert resumption is not None and resumption.take(part) == part
        body = msgspec.json.decode(resumption.next_body() or b"")
        assert body["input_ids"] == [*PROMPT, 5, 6] and body["num_output_ids_in_prompt"] == 2


class ScriptedReplica(FakeReplica):
    """Streams these bytes, each piece by itself, and breaks off behind the last unless it `ends`."""

    def __init__(self, *pieces: bytes, ends: bool = True) -> None:
        super().__init__()
        self.pieces = pieces
        self.ends = ends

    async def _answer(self, writer: asyncio.StreamWriter, target: str, body: bytes) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for piece in self.pieces:
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            await writer.drain()
            await asyncio.sleep(0.01)
        if self.ends:
            writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
            await writer.drain()
        return self.ends


def event(ids: list[int], num: int, **more: Any) -> bytes:
    """One of what is new, of a sample that has `num` tokens by now."""
    meta = {"id": "r", "seed": 7, "completion_tokens": num, "finish_reason": None, "prompt_tokens": 3, **more}
    return b"data: " + msgspec.json.encode({"output_ids": ids, "meta_info": meta}) + b"\n\n"


ERROR = {"message": "logits", "code": 500, "retryable": False, "err_type": "NonFiniteError"}
TOLD = b"data: " + msgspec.json.encode({"error": ERROR}) + b"\n\n"
END = {"finish_reason": {"type": "stop"}}


async def answered(replicas: list[FakeReplica], *, is_stream: bool) -> Any:
    async with over([await each.start() for each in replicas], resume="all", wait_timeout=1) as found:
        asked = {**ASKED, "stream": is_stream, "incremental_streaming_output": True}
        return await found.generate(**asked)


@pytest.mark.parametrize("before", [(), (event([5], 1),)], ids=["at once", "behind a token"])
def test_a_stream_that_ends_with_an_error_is_no_answer(before: tuple[bytes, ...]) -> None:
    """Of whichever replica: the client is told it, and gets nothing for the whole."""

    async def story() -> None:
        reply = await answered([ScriptedReplica(*before, TOLD)], is_stream=False)
        assert (reply.status_code, reply.json()["err_type"]) == (500, "NonFiniteError")
        cut = ScriptedReplica(event([5], 1), ends=False)
        reply = await answered([cut, ScriptedReplica(*before, TOLD)], is_stream=True)
        assert events_of(reply.text)[-1]["error"] == ERROR and reply.text.endswith("data: [DONE]\n\n")

    asyncio.run(story())


NONSENSE = (
    b"data: {nonsense\n\n",
    b'data: {"meta_info":3}\n\n',
    b'data: {"meta_info":{"seed":1},"output_ids":3}\n\n',
    b'data: {"meta_info":' + b"[" * 100_000 + b"\n\n",
)


def test_what_a_replica_answers_that_cannot_be_read_is_asked_elsewhere() -> None:
    async def story(*pieces: bytes) -> None:
        good = ScriptedReplica(event([6], 1, **END))
        reply = await answered([ScriptedReplica(*pieces), good], is_stream=False)
        assert reply.json()["output_ids"] == [6]
        cut = ScriptedReplica(event([5], 1), ends=False)
        reply = await answered([cut, ScriptedReplica(*pieces), good], is_stream=True)
        ids = [each["output_ids"] for each in events_of(reply.text)]
        assert ids == ([[5], [6]] if pieces else [[5]])

    for pieces in ((), *((each,) for each in NONSENSE)):
        asyncio.run(story(*pieces))


def test_a_first_part_that_cannot_be_read_ends_with_a_retryable_error() -> None:
    async def story() -> None:
        reply = await answered([ScriptedReplica(NONSENSE[1], ends=False), ScriptedReplica()], is_stream=True)
        assert events_of(reply.text)[-1]["error"]["retryable"] is True

    asyncio.run(story())


def int32(*values: int) -> str:
    return base64.b64encode(np.array(values, "<i4").tobytes()).decode()


@pytest.mark.parametrize("is_stream", [True, False])
def test_the_tokens_that_each_one_could_have_been_are_those_of_all(is_stream: bool) -> None:
    """Base64 of int32 that follow each other, and where those of each token begin and end."""

    def kept(ids: list[int], *offsets: int) -> dict[str, str]:
        return {"top_p_token_ids": int32(*ids), "top_p_token_offsets": int32(*offsets)}

    async def story() -> None:
        cut = ScriptedReplica(event([5], 1, **kept([5, 8], 0, 2)), event([6], 2, **kept([6], 0, 1)), ends=False)
        rest = ScriptedReplica(event([7], 1, **kept([1, 7, 9], 0, 3)), event([], 1, **kept([], 0), **END))
        reply = await answered([cut, rest], is_stream=is_stream)
        if not is_stream:
            whole, meta = kept([5, 8, 6, 1, 7, 9], 0, 2, 3, 6), reply.json()["meta_info"]
            assert {name: meta[name] for name in whole} == whole
            return
        told = [each["meta_info"] for each in events_of(reply.text)]
        assert [each["top_p_token_ids"] for each in told] == [int32(5, 8), int32(6), int32(1, 7, 9), ""]
        assert [each["top_p_token_offsets"] for each in told] == [int32(0, 2), int32(0, 1), int32(0, 3), int32(0)]

    asyncio.run(story())


def test_events_may_be_cut_anywhere() -> None:
    """A token that came in two pieces is no token that is lost."""

    async def story(num: int) -> None:
        told = event([5], 1) + event([6], 2)
        pieces = [told[at : at + num] for at in range(0, len(told), num)]
        good = ScriptedReplica(event([8], 1, **END))
        reply = await answered([ScriptedReplica(*pieces, b"data: {", ends=False), good], is_stream=True)
        assert [each["output_ids"] for each in events_of(reply.text)] == [[5], [6], [8]]
        assert events_of(reply.text)[-1]["meta_info"]["completion_tokens"] == 3

    for num in (40, 150):
        asyncio.run(story(num))


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_pieces_of_an_event_are_joined_once_at_its_end(size: int) -> None:
    """A large one, with the experts of its tokens, comes in very many."""
    told = event([5], 1) + event([6], 2, **END) + b"data: [DONE]\n\nxy"
    found = resumption_of("/generate", msgspec.json.encode({**ASKED, "stream": True}), "streams")
    assert found is not None
    pieces = [told[at : at + size] for at in range(0, len(told), size)]
    passed = []
    for number, piece in enumerate(pieces, 1):
        part = found.take(piece)
        assert part is not None
        passed.append(part)
        waiting = found._rest[1:]  # behind what was cut off with the event before: as they came
        assert all(map(operator.is_, waiting, pieces[number - len(waiting) : number]))
        assert sum(map(len, found._rest)) == sum(map(len, pieces[:number])) - sum(map(len, passed))
    assert b"".join(passed) == told[:-2] and found.rest() == b"xy" and found.is_finished


@pytest.mark.parametrize("is_stream", [True, False])
def test_ranges_of_tokens_name_the_weights_of_all(is_stream: bool) -> None:
    async def story(last: str) -> list[Any]:
        first = ScriptedReplica(event([4, 5], 2, version_spans=[["a", 2]], version_epochs=[1]), ends=False)
        ranges = [{"version": "a", "start": 0, "end": 1}, {"version": last, "start": 1, "end": 3}]
        spans = {"version_spans": [["a", 1], [last, 2]], "version_epochs": [1, 2]}
        second = ScriptedReplica(event([6, 7, 8], 3, **spans, **END, weight_versions=ranges))
        reply = await answered([first, second], is_stream=is_stream)
        meta = (events_of(reply.text)[-1] if is_stream else reply.json())["meta_info"]
        return [(each["version"], each["start"], each["end"]) for each in meta["weight_versions"]]

    assert asyncio.run(story("b")) == [("a", 0, 3), ("b", 3, 5)]
