"""Real processes, killed at random under traffic: every request is answered once, and with its own answer."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
from collections import Counter

from headrace.cluster.options import RouterOptions
from headrace.cluster.router import ReplicaRouter
from headrace.server.listening import listen
from tests.arch.source import ROOT, child_environment
from tests.cluster.builders import Routed
from tests.cluster.test_router import events_of

NUM_REPLICAS = 4
NUM_CLIENTS = 16
NUM_REQUESTS = 16
NUM_KILLS = 4


async def start_process(port: int = 0) -> tuple[asyncio.subprocess.Process, int]:
    command = [sys.executable, "-m", "tests.cluster.replica", str(port)]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, cwd=ROOT, env=child_environment()
    )
    assert process.stdout is not None
    return process, int(await process.stdout.readline())


async def client(found: Routed, number: int, words: random.Random, outcomes: Counter[str]) -> None:
    for turn in range(NUM_REQUESTS):
        rid, stream = f"{number}-{turn}", words.random() < 0.5
        asked = {"rid": rid, "stream": stream, "delay": words.random() * 0.05, "text": f"group {number % 4}" * 50}
        reply = await found.generate(**asked)
        assert reply.status_code == 200, reply.text
        if not stream:
            assert reply.json()["text"] == rid
            outcomes["whole"] += 1
            continue
        *events, last = events_of(reply.text)
        if "error" in last:
            assert last["error"]["retryable"] is True
            outcomes["broken"] += 1
        else:
            events.append(last)
            assert len(events) == 5
            outcomes["streamed"] += 1
        assert [(event["rid"], event["number"]) for event in events] == [(rid, each) for each in range(len(events))]


async def kill_at_random(
    processes: list[tuple[asyncio.subprocess.Process, int]], words: random.Random, clients: asyncio.Future[list[None]]
) -> int:
    num_kills = 0
    while num_kills < NUM_KILLS and not clients.done():
        await asyncio.sleep(0.1 + words.random() * 0.2)
        at = words.randrange(len(processes))
        process, port = processes[at]
        process.send_signal(signal.SIGKILL)
        await process.wait()
        num_kills += 1
        processes[at] = await start_process(port)
    return num_kills


def test_no_request_is_lost_or_doubled_while_replicas_are_killed() -> None:
    async def run() -> None:
        words, outcomes = random.Random(7), Counter[str]()
        processes = list(await asyncio.gather(*(start_process() for _ in range(NUM_REPLICAS))))
        router = ReplicaRouter([f"http://127.0.0.1:{port}" for _, port in processes], RouterOptions(max_attempts=6))
        listener = listen("127.0.0.1", 0)
        await router.start(listener)
        found = Routed(router, [], listener.getsockname()[1])
        await found.until_healthy(NUM_REPLICAS)
        clients = asyncio.gather(*(client(found, n, random.Random(n), outcomes) for n in range(NUM_CLIENTS)))
        num_kills = await kill_at_random(processes, words, clients)
        await clients
        assert sum(outcomes.values()) == NUM_CLIENTS * NUM_REQUESTS and num_kills > 0
        assert outcomes["whole"] and outcomes["streamed"] > outcomes["broken"]
        assert all(each.num_requests == each.num_tokens == 0 for each in router.replicas)
        await found.http.aclose()
        await router.stop(0.0)
        for process, _ in processes:
            process.kill()
            await process.wait()

    asyncio.run(run())
