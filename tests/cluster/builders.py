"""A router over fake replicas, all on one loop and on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx

from headrace.cluster.options import RouterOptions
from headrace.cluster.router import ReplicaRouter
from headrace.server.listening import listen
from tests.cluster.replica import FakeReplica

WAIT_SECONDS = 30.0


class Routed:
    """A running router, its replicas, and a client."""

    def __init__(self, router: ReplicaRouter, replicas: list[FakeReplica], port: int) -> None:
        self.router = router
        self.replicas = replicas
        self.port = port
        self.http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)

    async def generate(self, **body: Any) -> httpx.Response:
        return await self.http.post("/generate", json=body)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something is so."""
        async with asyncio.timeout(WAIT_SECONDS):
            while not holds():
                await asyncio.sleep(0.01)

    async def until_healthy(self, num: int) -> None:
        await self.until(lambda: sum(each.is_healthy for each in self.router.replicas) == num)


@contextlib.asynccontextmanager
async def routed(num_replicas: int = 2, **options: Any) -> AsyncIterator[Routed]:
    """A router that has seen its replicas healthy."""
    replicas = [await FakeReplica().start() for _ in range(num_replicas)]
    router = ReplicaRouter([each.url for each in replicas], RouterOptions.from_dict(options))
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        await router.start(listener)
        found = Routed(router, replicas, port)
        try:
            await found.until_healthy(num_replicas)
            yield found
        finally:
            await found.http.aclose()
            await router.stop(0.0)
            for each in replicas:
                await each.die()
            await asyncio.sleep(0)


async def raw_exchange(port: int, *pieces: bytes, ends: bool = False) -> bytes:
    """What is answered until the connection ends. With `ends` nothing more is said to come behind the pieces."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for piece in pieces:
        writer.write(piece)
        await asyncio.sleep(0.01)
    if ends:
        writer.write_eof()
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            return await reader.read()
    finally:
        writer.close()
