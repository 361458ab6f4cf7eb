"""A generation whose replica dies goes on at another one, and its client sees one answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from headrace.cluster.options import RouterOptions
from headrace.cluster.resumption import resumption_of
from headrace.cluster.router import ReplicaRouter
from headrace.server.listening import listen
from tests.cluster.builders import Routed
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
    replicas = [await WeightedReplica().start() for _ in range(num)]
    for number, each in enumerate(replicas):
        each.weight_version = f"v{number}"
    router = ReplicaRouter([each.url for each in replicas], RouterOptions(policy="round_robin", **options))
    listener = listen("127.0.0.1", 0)
    await router.start(listener)
    found = Routed(router, replicas, listener.getsockname()[1])
    try:
        await found.until_healthy(num)
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
