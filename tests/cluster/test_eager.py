"""Calls that go on in the callback that has what they wait for: their order, what they may wait for, and their end."""

from __future__ import annotations

import asyncio
import contextvars
import re
from collections.abc import Coroutine
from typing import Any

import pytest

from headrace.cluster.eager import EagerCall, News
from tests.cluster.builders import Routed, raw_exchange
from tests.cluster.test_router import tell

name = contextvars.ContextVar("name", default="nobody's")


def begin(coroutine: Coroutine[Any, Any, None]) -> EagerCall:
    call = EagerCall(coroutine, asyncio.get_running_loop())
    call.go_on()
    return call


async def turns() -> None:
    """Let the loop do what is due, and what follows from that."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_it_runs_at_once_and_goes_on_inside_of_the_news() -> None:
    async def story() -> None:
        news, seen = News(asyncio.get_running_loop()), list[str]()

        async def wait() -> None:
            for word in ("first", "second"):
                seen.append(f"waits for the {word}")
                await news
            seen.append("ended")

        begin(wait())
        assert seen == ["waits for the first"]
        news.come()
        assert seen[1:] == ["waits for the second"]
        news.come_soon()
        assert len(seen) == 2
        await turns()
        assert seen[2:] == ["ended"]
        news.come()  # to nobody

    asyncio.run(story())


def test_futures_tasks_and_turns_are_waited_for_too() -> None:
    async def story() -> None:
        loop, seen = asyncio.get_running_loop(), list[object]()
        future = loop.create_future()

        async def fail() -> None:
            async with asyncio.timeout(10):  # which needs a task
                await asyncio.sleep(0)
            raise ValueError("failed")

        async def wait() -> None:
            await asyncio.sleep(0)
            seen.append(await future)
            with pytest.raises(ValueError, match="failed"):
                await loop.create_task(fail())
            seen.append("ended")

        begin(wait())
        await turns()
        future.set_result(1)
        await turns()
        assert seen == [1, "ended"]

    asyncio.run(story())


def test_a_task_may_wait_for_news_in_its_own_context() -> None:
    async def story() -> None:
        loop = asyncio.get_running_loop()
        news = News(loop)

        async def wait() -> str:
            name.set("its own")
            await news
            return name.get()

        task = loop.create_task(wait())
        await turns()
        loop.call_soon(news.come)
        assert await asyncio.wait_for(task, 10) == "its own"
        given_up = loop.create_task(wait())
        await turns()
        given_up.cancel()
        await turns()
        assert given_up.cancelled()
        news.come()

    asyncio.run(story())


@pytest.mark.parametrize("kind", ["news", "future", "done future", "task", "turn", "itself"])
def test_a_call_that_is_cancelled_ends_where_it_waits(kind: str) -> None:
    async def story() -> None:
        loop, seen = asyncio.get_running_loop(), list[str]()
        news, future = News(loop), loop.create_future()

        async def work() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                seen.append("task")

        async def wait() -> None:
            try:
                if kind in ("news", "itself"):
                    await asyncio.sleep(0)  # `call` is there
                    if kind == "itself":
                        call.cancel()
                    await news
                elif kind == "task":
                    await loop.create_task(work())
                elif kind == "turn":
                    await asyncio.sleep(0)
                else:
                    await future
            except asyncio.CancelledError:
                seen.append("cancelled")
                raise

        call = begin(wait())
        if kind != "turn":
            await turns()
        if kind == "done future":
            future.set_result(None)
        call.cancel()
        await turns()
        assert seen == (["task", "cancelled"] if kind == "task" else ["cancelled"])
        news.come()
        call.cancel()

    asyncio.run(story())


def test_requests_that_come_at_once_are_answered_in_turn_however_many() -> None:
    """None of them has to wait for anything, so each is answered before the next one is looked at: not within it."""

    async def story(found: Routed) -> None:
        request = b"GET /liveness HTTP/1.1\r\nhost: localhost\r\n\r\n"
        body = b"POST /nowhere HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\r\n{}"
        last = request.replace(b"host:", b"connection: close\r\nhost:")
        told = await raw_exchange(found.port, request * 3000 + last)
        assert [*map(int, re.findall(rb"HTTP/1\.1 (\d+)", told))] == [200] * 3001
        assert (await raw_exchange(found.port, body + request)).startswith(b"HTTP/1.1 404")

    tell(story, num_replicas=0)
