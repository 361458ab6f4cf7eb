"""Real engines behind a router, and roads to them that break in the middle of an answer: clients of every kind get the
answer of a call that was never cut."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from headrace import AsyncClient, Engine, serve
from headrace.cluster import health
from headrace.cluster.options import RouterOptions
from headrace.cluster.router import ReplicaRouter
from headrace.server import ServerHandle
from headrace.server.listening import listen
from tests.cluster.relay import Relay
from tests.cluster.test_router import events_of
from tests.server.builders import SETTINGS, save_random_model

PROMPTS = ["Once upon", "Twice"]
NUM_TOKENS = 12
Ask = Callable[[str], Awaitable[Any]]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ServerHandle]]:
    folder: Path = save_random_model(tmp_path_factory.mktemp("model"))
    with Engine(folder, inprocess=True, numerics="invariant", **SETTINGS) as engine:
        handles = [serve(engine), serve(engine)]
        yield handles
        for each in handles:
            each.stop()


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "LOOK_SECONDS", 0.2)


@contextlib.asynccontextmanager
async def routed(servers: list[ServerHandle], **options: Any) -> AsyncIterator[tuple[str, list[Relay], ReplicaRouter]]:
    relays = [await Relay(each.port).start() for each in servers]
    settings = RouterOptions(policy="round_robin", max_attempts=6, **options)
    router = ReplicaRouter([each.url for each in relays], settings)
    listener = listen("127.0.0.1", 0)
    await router.start(listener)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", relays, router
    finally:
        await router.stop(0.0)
        for each in relays:
            await each.close()


async def until_healthy(router: ReplicaRouter) -> None:
    async with asyncio.timeout(30):
        while not all(each.is_healthy for each in router.replicas):
            await asyncio.sleep(0.01)


async def openai_completions(url: str, *, stream: bool) -> Any:
    """Text, ids, log-probabilities and end of each choice, and the usage."""
    extra = {"return_token_ids": True, "return_meta_info": True}
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        common: dict[str, Any] = {"model": "default", "prompt": PROMPTS, "n": 2, "max_tokens": NUM_TOKENS}
        common |= {"logprobs": 1, "seed": 5, "extra_body": extra}
        if not stream:
            reply = await client.completions.create(**common)
            choices = [(each.text, each.model_extra["token_ids"], each.finish_reason) for each in reply.choices]
            return (
                choices,
                reply.usage.completion_tokens,
                {len(each.logprobs.tokens) for each in reply.choices},
            )
        usage, found, names = None, dict[int, list[Any]](), set()
        events = await client.completions.create(**common, stream=True, stream_options={"include_usage": True})
        async for each in events:
            usage = each.usage or usage
            names.add((each.id, each.created))
            for choice in each.choices:
                old = found.setdefault(choice.index, ["", [], None, []])
                old[0] += choice.text
                old[1] += choice.model_extra["token_ids"]
                old[2] = choice.finish_reason or old[2]
                old[3] += choice.logprobs.tokens
        assert len(names) == 1 and usage is not None
        choices = [(text, ids, end) for _, (text, ids, end, _) in sorted(found.items())]
        return choices, usage.completion_tokens, {len(tokens) for *_, tokens in found.values()}


async def openai_chat(url: str) -> Any:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        found = dict[int, list[Any]]()
        events = await client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": "Say it."}],
            n=2,
            seed=5,
            max_completion_tokens=NUM_TOKENS,
            logprobs=True,
            stream=True,
        )
        async for each in events:
            for choice in each.choices:
                old = found.setdefault(choice.index, ["", 0, [], None])
                old[0] += choice.delta.content or ""
                old[1] += choice.delta.role is not None
                old[2] += choice.logprobs.content if choice.logprobs and choice.logprobs.content else []
                old[3] = choice.finish_reason or old[3]
        assert all((num_roles, end) == (1, "length") for _, num_roles, _, end in found.values())
        return [(found[i][0], [each.logprob for each in found[i][2]]) for i in sorted(found)]


async def our_client(url: str, *, stream: bool) -> Any:
    params = {"seed": 5, "max_new_tokens": NUM_TOKENS, "n": 2}
    async with AsyncClient(url) as client:
        if not stream:
            made = await client.generate(PROMPTS, sampling_params=params)
            return [(each.text, each.token_ids, each.logprobs, each.finish_reason) for each in made]
        found = dict[tuple[int, int], list[Any]]()
        async for piece in client.stream(PROMPTS, sampling_params=params):
            old = found.setdefault((piece.prompt_index, piece.index), ["", [], [], None])
            old[0] += piece.text
            old[1] += piece.token_ids
            old[2] += piece.logprobs
            old[3] = piece.finish_reason or old[3]
        return [tuple(found[key]) for key in sorted(found)]


async def native(url: str, *, stream: bool) -> Any:
    """Texts, so that the prompt is the replica's to encode; of top-p also which tokens each one could have been."""
    params: dict[str, Any] = {"sampling_seed": 5, "max_new_tokens": NUM_TOKENS, "n": 2, "top_p": 0.9}
    params["custom_params"] = {"return_top_p_token_ids": True}
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:
        asked = {"text": PROMPTS, "sampling_params": params, "return_logprob": True, "stream": stream}
        reply = await http.post("/generate", json=asked)
        assert reply.status_code == 200
        whole = {each["index"]: each for each in events_of(reply.text)} if stream else dict(enumerate(reply.json()))
        kept = ("output_token_logprobs", "top_p_token_ids", "top_p_token_offsets", "finish_reason", "completion_tokens")
        return [
            (each["text"], each["output_ids"], *map(each["meta_info"].get, kept)) for _, each in sorted(whole.items())
        ]


def test_streams_go_on(servers: list[ServerHandle]) -> None:
    async def story() -> None:
        asks: dict[str, tuple[Ask, tuple[int, ...]]] = {
            "completions": (lambda url: openai_completions(url, stream=True), (900, 9000)),
            "chat": (openai_chat, (6000,)),
            "client": (lambda url: our_client(url, stream=True), (6000,)),
            "native": (lambda url: native(url, stream=True), (9000,)),
        }
        async with routed(servers) as (url, relays, router):
            await check(asks, servers[0].url, url, relays, router)

    asyncio.run(story())


def test_whole_answers_go_on_where_all_are_to(servers: list[ServerHandle]) -> None:
    async def story() -> None:
        asks: dict[str, tuple[Ask, tuple[int, ...]]] = {
            "completions": (lambda url: openai_completions(url, stream=False), (1500,)),
            "client": (lambda url: our_client(url, stream=False), (1500,)),
            "native": (lambda url: native(url, stream=False), (1500,)),
        }
        async with routed(servers, resume="all") as (url, relays, router):
            await check(asks, servers[0].url, url, relays, router)

    asyncio.run(story())


async def check(
    asks: dict[str, tuple[Ask, tuple[int, ...]]], direct: str, url: str, relays: list[Relay], router: ReplicaRouter
) -> None:
    """However many bytes of the first answer came."""
    for name, (ask, cuts) in asks.items():
        expected = await ask(direct)
        for cut in cuts:
            await until_healthy(router)
            num_cuts = sum(each.num_cuts for each in relays)
            for each in relays:
                each.cut_after = cut
            assert await ask(url) == expected, (name, cut)
            assert sum(each.num_cuts for each in relays) > num_cuts, (name, cut)
            for each in relays:
                each.cut_after = None


def test_what_cannot_go_on_ends_with_one_error_of_its_dialect(servers: list[ServerHandle]) -> None:
    async def story() -> None:
        async with routed(servers[:1], wait_timeout=0.2) as (url, (relay,), router):
            await until_healthy(router)
            async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:
                relay.cut_after = 3000
                body = {"prompt": "Once", "max_tokens": NUM_TOKENS, "stream": True}
                # the only replica: it does not listen any more
                asking = asyncio.ensure_future(http.post("/v1/completions", json=body))
                async with asyncio.timeout(30):
                    while not relay.num_cuts:
                        await asyncio.sleep(0)
                await relay.close()
                *events, end = (await asking).text.split("\n\n")[:-1]
                told = [json.loads(each.removeprefix("data: ")) for each in events]
                assert end == "data: [DONE]" and told[0]["choices"][0]["index"] == 0
                errors = [each["error"] for each in told if "error" in each]
                assert len(errors) == 1 and errors[0]["retryable"] is True and "error" in told[-1]

    asyncio.run(story())
