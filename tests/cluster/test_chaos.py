"""Real processes, killed at random under traffic and updates: every request is answered once, with all of its own
tokens, and none that was sent after an update had returned has a token of older weights."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

from headrace.cluster.fleet import Fleet
from headrace.cluster.fleet_options import FleetOptions
from headrace.cluster.options import RouterOptions
from headrace.cluster.router import ReplicaRouter
from headrace.config import EngineConfig
from headrace.server.listening import listen
from tests.cluster.builders import Routed
from tests.cluster.test_router import events_of
from tests.cluster.weighted import WeightedServer, token_at

NUM_REPLICAS = 4
NUM_CLIENTS = 8
NUM_REQUESTS = 10
NUM_KILLS = 3


class Story:
    """What happens, and what has to be true of it. Weights are numbers, and rise."""

    def __init__(self, found: Routed, seed: int) -> None:
        self.found = found
        self.words = random.Random(seed)
        self.fenced = 0
        """The version of the last update that has returned."""
        self.outcomes: Counter[str] = Counter()
        self.num_kills = 0

    async def client(self, number: int) -> None:
        words = random.Random(number)
        for turn in range(NUM_REQUESTS):
            prompt, num_tokens, fenced = [number, turn, words.randrange(100)], words.randrange(1, 40), self.fenced
            is_stream = words.random() < 0.7
            asked: dict[str, Any] = {"rid": f"{number}-{turn}", "input_ids": prompt, "stream": is_stream}
            asked["incremental_streaming_output"] = words.random() < 0.5
            reply = await self.found.generate(**asked, sampling_params={"max_new_tokens": num_tokens})
            assert reply.status_code == 200, reply.text
            answers = events_of(reply.text) if is_stream else [reply.json()]
            assert "error" not in answers[-1], answers[-1]
            if is_stream and asked["incremental_streaming_output"]:
                ids = [token for each in answers for token in each["output_ids"]]
                spans = [span for each in answers for span in each["meta_info"]["version_spans"]]
            else:
                ids, spans = answers[-1]["output_ids"], answers[-1]["meta_info"]["version_spans"]
            seed = answers[-1]["meta_info"]["seed"]
            assert ids == [token_at(prompt, seed, len(prompt) + i) for i in range(num_tokens)]
            assert all(each["meta_info"]["id"] == asked["rid"] for each in answers)
            assert min(int(version[1:]) for version, _ in spans) >= fenced, (spans, fenced)
            self.outcomes["resumed" if answers[-1]["meta_info"].get("num_resumed") else "straight"] += 1

    async def update(self, fleet: Fleet) -> None:
        """Push weights again and again; some replicas refuse them."""
        version = 0
        while True:
            version += 1
            body: dict[str, Any] = {"model_path": "/x", "weight_version": f"v{version}"}
            if self.words.random() < 0.5:
                each = self.words.choice([each.url for each in self.found.router.replicas])
                body["fails_at"] = int(each.rpartition(":")[2])
            reply = await self.found.http.post("/update_weights_from_disk", json=body)
            if reply.status_code == 200:
                self.fenced = version
            await asyncio.sleep(self.words.random() * 0.3)

    async def kill(self, fleet: Fleet) -> None:
        """End a process, whenever all have been well; one at least always lives."""
        while self.num_kills < NUM_KILLS:
            await self.found.until(lambda: sum(each.is_ready for each in self.found.router.replicas) > 1)
            await asyncio.sleep(self.words.random() * 0.2)
            member = self.words.choice([each for each in fleet._members if each.replica and each.replica.is_ready])
            if member.process is not None and member.process.exit_code is None:
                os.kill(member.process.pid, signal.SIGKILL)
                self.num_kills += 1


def test_no_request_is_lost_or_doubled_and_no_fenced_token_answers(tmp_path: Path) -> None:
    async def run() -> None:
        options = RouterOptions(max_attempts=8, resume="all")
        fleet_options = FleetOptions(dp_size=NUM_REPLICAS, max_replica_restarts=100)
        fleet = Fleet(EngineConfig(model="x"), {}, fleet_options, WeightedServer)
        router = ReplicaRouter([], options, weights_folder=tmp_path)
        listener = listen("127.0.0.1", 0)
        await router.start(listener)
        try:
            await router.start_fleet(fleet)
            found = Routed(router, [], listener.getsockname()[1])
            await found.until_healthy(NUM_REPLICAS)
            story = Story(found, 7)
            others = [asyncio.ensure_future(each) for each in (story.update(fleet), story.kill(fleet))]
            await asyncio.gather(*(story.client(number) for number in range(NUM_CLIENTS)))
            for each in others:
                each.cancel()
            ended = await asyncio.gather(*others, return_exceptions=True)
            assert not [each for each in ended if isinstance(each, AssertionError)], ended
            assert story.outcomes.total() == NUM_CLIENTS * NUM_REQUESTS and story.num_kills and story.fenced
            assert all(each.num_requests == each.num_tokens == 0 for each in router.replicas)
            await found.http.aclose()
        finally:
            await router.stop(0.0)
            await fleet.close()

    asyncio.run(run())
