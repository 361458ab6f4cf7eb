"""`headrace serve --dp-size 4` with real engines under OpenAI's streams, batches and the rest, while replicas are
killed at random and weights are pushed: every call is answered once, whole, and by no weights older than those that
were current when it was sent. Minutes long, so it is not collected by itself: `pytest -s tests/cluster/check_chaos.py`;
HEADRACE_CHAOS_SECONDS says how many (60)."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest

from headrace import AsyncClient, Runtime
from headrace.types.errors import HeadraceError
from tests.cluster.check_fleet import servers_of, until
from tests.cluster.test_router import events_of
from tests.server.builders import SETTINGS, save_random_model, tokenizer_of

SECONDS = float(os.environ.get("HEADRACE_CHAOS_SECONDS", "60"))
NUM_REPLICAS = 4
NUM_CLIENTS = 6
PROMPTS = ["Once upon", "Twice"]


class Told(NamedTuple):
    """What a client was told of one sample."""

    ids: list[int]
    text: str
    spans: list[Any]
    num_logprobs: int
    num_resumed: int
    has_ended: bool


class Clients:
    """Calls of every kind, each for two samples of two prompts but for chat, of which there is one prompt."""

    def __init__(self, runtime: Runtime) -> None:
        self.url, key = runtime.url, runtime.api_key or ""
        self.http = httpx.AsyncClient(
            base_url=self.url, headers={"authorization": f"Bearer {key}"}, timeout=120, trust_env=False
        )
        self.openai = openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)
        self.own = AsyncClient(self.url, key, timeout=120)
        self.kinds: dict[str, Callable[[int], Awaitable[list[Told]]]] = {
            "completions, streamed": lambda num: self.completions(num, stream=True),
            "completions, whole": lambda num: self.completions(num, stream=False),
            "chat, streamed": self.chat,
            "our client, streamed": self.stream,
            "native, streamed": lambda num: self.native(num, stream=True),
            "native, whole": lambda num: self.native(num, stream=False),
        }

    async def close(self) -> None:
        await self.http.aclose()
        await self.openai.close()
        await self.own.close()

    def terms(self, num: int) -> dict[str, Any]:
        extra = {"return_token_ids": True, "return_meta_info": True, "ignore_eos": True}
        return {"model": "default", "n": 2, "max_tokens": num, "extra_body": extra}

    async def completions(self, num: int, *, stream: bool) -> list[Told]:
        asked: dict[str, Any] = {**self.terms(num), "prompt": PROMPTS, "logprobs": 1}
        if not stream:
            reply: Any = await self.openai.completions.create(**asked)
            assert reply.usage.completion_tokens == 4 * num
            return [self.told(each, each.text, len(each.logprobs.tokens)) for each in reply.choices]
        found: dict[int, Told] = {}
        ids, usage = set[str](), None
        options: Any = {"include_usage": True}
        async for each in await self.openai.completions.create(**asked, stream=True, stream_options=options):
            ids.add(each.id)
            usage = each.usage or usage
            for choice in each.choices:
                self.add(found, choice, choice.text, len(choice.logprobs.tokens) if choice.logprobs else 0)
        assert len(ids) == 1 and usage is not None and usage.completion_tokens == 4 * num
        return list(found.values())

    async def chat(self, num: int) -> list[Told]:
        found: dict[int, Told] = {}
        num_roles = 0
        messages = [{"role": "user", "content": "Say it."}]
        asked = {**self.terms(num), "messages": messages, "logprobs": True}
        async for each in await self.openai.chat.completions.create(**asked, stream=True):
            for choice in each.choices:
                num_roles += choice.delta.role is not None
                logprobs = choice.logprobs.content if choice.logprobs and choice.logprobs.content else []
                self.add(found, choice, choice.delta.content or "", len(logprobs))
        assert num_roles == 2
        return list(found.values())

    async def stream(self, num: int) -> list[Told]:
        found: dict[Any, Told] = {}
        params = {"max_new_tokens": num, "n": 2, "ignore_eos": True}
        async for piece in self.own.stream(PROMPTS, sampling_params=params):
            key = piece.prompt_index, piece.index
            old = found.get(key, Told([], "", [], 0, 0, False))
            assert not old.has_ended
            found[key] = Told(
                old.ids + piece.token_ids,
                old.text + piece.text,
                [*old.spans, *piece.version_spans],
                old.num_logprobs + len(piece.logprobs),
                0,
                piece.finish_reason is not None,
            )
        return list(found.values())

    async def native(self, num: int, *, stream: bool) -> list[Told]:
        params = {"max_new_tokens": num, "n": 2, "ignore_eos": True}
        asked = {"text": PROMPTS, "sampling_params": params, "return_logprob": True, "stream": stream}
        reply = await self.http.post("/generate", json=asked)
        assert reply.status_code == 200, reply.text
        answers = events_of(reply.text) if stream else [{**each, "index": i} for i, each in enumerate(reply.json())]
        assert not any("error" in each for each in answers), answers[-1]
        found = {}
        for each in answers:
            meta = each["meta_info"]
            num_logprobs, has_ended = len(meta["output_token_logprobs"]), meta["finish_reason"] is not None
            values = each["output_ids"], each["text"], meta["version_spans"], num_logprobs
            found[each["index"]] = Told(*values, meta.get("num_resumed", 0), has_ended)
        return list(found.values())

    def add(self, found: dict[int, Told], choice: Any, text: str, num_logprobs: int) -> None:
        old = found.get(choice.index, Told([], "", [], 0, 0, False))
        new = self.told(choice, text, num_logprobs)
        assert not old.has_ended
        moves = max(old.num_resumed, new.num_resumed)
        counts = old.num_logprobs + new.num_logprobs, moves, new.has_ended
        found[choice.index] = Told(old.ids + new.ids, old.text + new.text, old.spans + new.spans, *counts)

    def told(self, choice: Any, text: str, num_logprobs: int) -> Told:
        extra = choice.model_extra or {}
        meta = extra.get("meta_info", {})
        moves, has_ended = meta.get("num_resumed", 0), choice.finish_reason == "length"
        return Told(extra.get("token_ids", []), text, meta.get("version_spans", []), num_logprobs, moves, has_ended)


class Story:
    def __init__(self, runtime: Runtime, clients: Clients, folders: list[Path], seed: int) -> None:
        self.runtime, self.clients, self.folders = runtime, clients, folders
        self.words = random.Random(seed)
        self.tokenizer = tokenizer_of(folders[0])
        self.ends_at = time.monotonic() + SECONDS
        self.counts: Counter[str] = Counter()
        self.fenced = 0

    @property
    def goes_on(self) -> bool:
        return time.monotonic() < self.ends_at

    async def client(self, number: int) -> None:
        words = random.Random(number)
        while self.goes_on:
            kind, num, fenced = words.choice(list(self.clients.kinds)), words.randrange(40, 200), self.fenced
            try:
                samples = await self.clients.kinds[kind](num)
            except (HeadraceError, openai.APIError, AssertionError) as error:
                self.counts["lost or wrong"] += 1
                print(f"{kind}: {type(error).__name__}: {error}", flush=True)
                continue
            self.counts[kind] += 1
            assert len(samples) == (2 if kind.startswith("chat") else 4), kind
            for each in samples:
                assert each.has_ended and len(each.ids) == each.num_logprobs == num, (kind, num, each)
                assert sum(count for _, count in each.spans) == num, (kind, each.spans)
                assert each.text == self.tokenizer.decode(each.ids, skip_special_tokens=True), (kind, each)
                versions = [int(version[1:]) for version, _ in each.spans]
                assert min(versions) >= fenced, (kind, versions, fenced)
                self.counts["samples"] += 1
                self.counts["tokens"] += num
                self.counts["samples by weights of several versions"] += len(set(versions)) > 1
            self.counts["calls resumed, of those that say it"] += any(each.num_resumed for each in samples)

    async def update(self) -> None:
        version = 0
        while self.goes_on:
            version += 1
            body = {"model_path": str(self.folders[version % 2]), "weight_version": f"v{version}", "in_flight": "keep"}
            reply = await self.clients.http.post("/update_weights_from_disk", json=body)
            if reply.status_code == 200:
                self.fenced = version
                self.counts["updates"] += 1
                self.counts["replicas that missed an update"] += len(reply.json()["failed_replicas"])
            else:
                self.counts["updates that failed"] += 1
            await asyncio.sleep(self.words.random() * 4)

    async def kill(self) -> None:
        """One whenever two are well; so one always lives."""
        while self.goes_on:
            await asyncio.sleep(1 + self.words.random() * 4)
            ready = (await self.clients.http.get("/ready")).json().get("num_ready", 0)
            servers = servers_of(self.runtime.pid)
            if ready > 1 and servers:
                os.kill(self.words.choice(list(servers.values())), signal.SIGKILL)
                self.counts["kills"] += 1


@pytest.mark.timeout(SECONDS + 240)
def test_no_call_is_lost_or_doubled_and_no_fenced_token_answers(tmp_path: Path) -> None:
    folders = [save_random_model(tmp_path / str(seed), seed) for seed in range(2)]
    settings: dict[str, Any] = {**SETTINGS, "dp_size": NUM_REPLICAS, "policy": "round_robin", "resume": "all"}
    settings |= {"max_attempts": 16, "wait_timeout": 60.0, "max_replica_restarts": 10_000, "max_running_requests": 32}
    roots = tuple(map(str, folders))
    with Runtime(folders[0], weight_roots=roots, **settings) as runtime:

        async def run() -> Story:
            clients = Clients(runtime)
            story = Story(runtime, clients, folders, 7)
            reply = await clients.http.post("/update_weight_version", json={"new_version": "v0"})
            assert reply.status_code == 200, reply.text
            await asyncio.gather(story.update(), story.kill(), *(story.client(number) for number in range(NUM_CLIENTS)))
            told = (await clients.http.get("/metrics")).text
            names = ("resumptions_total", "broken_streams_total", "retries_total")
            print(*(line for line in told.splitlines() if line.split(" ")[0].endswith(names)), sep="\n")
            await clients.close()
            return story

        until(lambda: httpx.get(f"{runtime.url}/ready").json().get("num_ready") == NUM_REPLICAS)
        story = asyncio.run(run())
        print(*(f"{count:9,} {name}" for name, count in sorted(story.counts.items())), sep="\n", flush=True)
        assert not story.counts["lost or wrong"] and story.counts["kills"] and story.counts["updates"]
