"""A client process that keeps a number of streams of `/generate` open and notes when their events come.

`python -m headrace.bench.http_streams '{"port": ..., ...}'` prints one JSON object. A closed loop: each client asks
again on its connection when its stream has ended; all of them begin at once. What comes is not parsed before the stream
has ended, so that the client is not what is measured: events are counted by their ends, and the last one says how many
tokens there were.
"""

from __future__ import annotations

import asyncio
import gc
import json
import re
import sys
import time
from collections.abc import Iterator

import msgspec

from headrace.bench.http_wire import flush_cache, post
from headrace.bench.request_style import RequestStyle
from headrace.bench.workloads import WARM_TOKENS, make_closed_loop

_OK, _EVENT_END, _LAST_EVENT, _BODY_END = b"HTTP/1.1 200", b"\n\n", b"data: [DONE]\n\n", b"0\r\n\r\n"
_MAX_STATUS_LINE = 200
_TOKENS = re.compile(rb'"completion_tokens":(\d+)')


class StreamLoad(msgspec.Struct, frozen=True):
    """Workload D of so many requests over HTTP, so many of them in flight."""

    port: int
    num_requests: int
    length_divisor: int
    vocab_size: int
    style: RequestStyle
    concurrency: int


class StreamTimes(msgspec.Struct):
    """Seconds: of the whole; from each request to its first event; between the events of a stream; and of each stream
    that had several the longest time between two."""

    seconds: float = 0.0
    firsts: list[float] = []
    gaps: list[float] = []
    longest: list[float] = []
    num_later_tokens: int = 0


class StreamConnection(asyncio.Protocol):
    """One stream at a time."""

    def __init__(self) -> None:
        self._body = bytearray()
        self._num_seen = 0
        self.times: list[float] = []
        self._ended: asyncio.Future[bytes] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    async def stream(self, request: bytes) -> bytes:
        """All that is answered to a request; `times` are those at which events came."""
        self._body.clear()
        self.times, self._num_seen = [], 0
        self._ended = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self._ended

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._body += data
        num_events = self._body.count(_EVENT_END, self._num_seen)
        if num_events > self._body.count(_LAST_EVENT, self._num_seen):
            self._num_seen = self._body.rfind(_EVENT_END) + len(_EVENT_END)
            self.times.append(now)
        if self._ended is None:
            return
        if b"\r\n" in self._body[:_MAX_STATUS_LINE] and not self._body.startswith(_OK):  # has no end as a stream's
            self._ended.set_exception(RuntimeError(f"answered {self._body[:300].decode(errors='replace')}"))
            self._ended = None
        elif self._body.endswith(_BODY_END):
            self._ended.set_result(bytes(self._body))
            self._ended = None

    def connection_lost(self, error: Exception | None) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(RuntimeError(f"the server closed the connection of a stream: {error}"))


async def measure(load: StreamLoad) -> StreamTimes:
    """A short warm-up with prompts that the workload does not share, then the workload."""
    workload = make_closed_loop(load.num_requests, length_divisor=load.length_divisor, vocab_size=load.vocab_size)
    warm = [_body(load.style, prompt, WARM_TOKENS) for prompt in workload.strangers()]
    lengths = workload.output_lengths
    bodies = [_body(load.style, prompt, length) for prompt, length in zip(workload.prompts, lengths, strict=True)]
    loop, times = asyncio.get_running_loop(), StreamTimes()
    opened = [await loop.create_connection(StreamConnection, "127.0.0.1", load.port) for _ in range(load.concurrency)]
    connections = [connection for _, connection in opened]

    async def client(connection: StreamConnection, numbers: Iterator[int]) -> None:
        for number in numbers:
            asked = time.perf_counter()
            _note(times, await connection.stream(bodies[number]), connection.times, asked, lengths[number])

    try:
        await asyncio.gather(*(each.stream(body) for each, body in zip(connections, warm, strict=False)))
        await flush_cache(load.port)
        gc.collect()
        gc.freeze()
        numbers, start = iter(range(load.num_requests)), time.perf_counter()
        await asyncio.gather(*(client(connection, numbers) for connection in connections))
        times.seconds = time.perf_counter() - start
        return times
    finally:
        for connection in connections:
            connection.transport.close()


def _note(times: StreamTimes, answer: bytes, came: list[float], asked: float, length: int) -> None:
    found = _TOKENS.findall(answer)
    if not found or int(found[-1]) != length:
        raise RuntimeError(f"asked for {length} tokens, got {answer[-300:].decode(errors='replace')}")
    gaps = [after - before for before, after in zip(came, came[1:], strict=False)]
    times.firsts.append(came[0] - asked)
    times.gaps += gaps
    if gaps:
        times.longest.append(max(gaps))
    times.num_later_tokens += length - 1


def _body(style: RequestStyle, prompt: list[int], length: int) -> bytes:
    return post(
        "/generate",
        {
            "input_ids": prompt,
            "sampling_params": style.sampling(length),
            "stream": True,
            "incremental_streaming_output": True,
        },
    )


if __name__ == "__main__":
    print(json.dumps(msgspec.to_builtins(asyncio.run(measure(msgspec.json.decode(sys.argv[1], type=StreamLoad))))))
