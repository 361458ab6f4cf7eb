"""A client process that keeps a number of `/generate` requests in flight and counts the tokens it receives.

`python -m headrace.bench.http_client '{"port": ..., ...}'`. One connection per request in flight. Token ids in, token
ids out; every answer is parsed and its ids, log-probabilities and length are checked. Knows nothing of the engine.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from headrace.bench.http_wire import connect, post, read_body

STOP_TOKEN_ID = 0
MAX_WARM_UP_SECONDS = 1.5


class SteadyLoad(msgspec.Struct, frozen=True):
    """What to send, and for how long to count."""

    port: int
    concurrency: int
    prompt_length: int
    output_length: int
    seconds: float
    stream: bool = False


class MetaInfo(msgspec.Struct, frozen=True):
    """The part of `meta_info` that is checked."""

    completion_tokens: int
    output_token_logprobs: list[msgspec.Raw] = []


class Answer(msgspec.Struct, frozen=True):
    """The part of a `/generate` answer that is counted."""

    output_ids: list[int]
    meta_info: MetaInfo


class Counter:
    """Tokens and requests received so far."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.num_requests = 0


def output_lengths(mean: int) -> Iterator[int]:
    """Lengths around `mean`, so spread that requests which start together do not end together."""
    index = 0
    while True:
        index += 1
        yield max(1, mean // 2 + index * 7919 % mean)


def unique_prompt(number: int, length: int) -> list[int]:
    """Prompt `number`: its first two tokens are its own, so that no page of it is shared."""
    head = [1 + number % 16000, 1 + number // 16000]
    return [*head, *(1 + (number + position) % 16000 for position in range(length - 2))]


async def count(load: SteadyLoad) -> dict[str, Any]:
    """Run the load; returns what came within `load.seconds` after a warm-up."""
    counter = Counter()
    lengths = output_lengths(load.output_length)
    tasks = [asyncio.create_task(_client(load, number, lengths, counter)) for number in range(load.concurrency)]
    try:
        await _sleep(min(MAX_WARM_UP_SECONDS, load.seconds), tasks)
        start, num_tokens, num_requests = time.perf_counter(), counter.num_tokens, counter.num_requests
        await _sleep(load.seconds, tasks)
        return {
            "seconds": time.perf_counter() - start,
            "num_tokens": counter.num_tokens - num_tokens,
            "num_requests": counter.num_requests - num_requests,
        }
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _sleep(seconds: float, tasks: list[asyncio.Task[None]]) -> None:
    """Wait, but not if a client has failed: none ends by itself."""
    done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


async def _client(load: SteadyLoad, number: int, lengths: Iterator[int], counter: Counter) -> None:
    reader, writer = await connect(load.port)
    try:
        while True:
            length = next(lengths)
            writer.write(_request(load, unique_prompt(number, load.prompt_length), length))
            number += load.concurrency
            body = await read_body(reader)
            counter.num_tokens += _num_tokens(body, length, load.stream)
            counter.num_requests += 1
    finally:
        writer.close()


def _request(load: SteadyLoad, prompt: list[int], length: int) -> bytes:
    body = {
        "input_ids": prompt,
        "sampling_params": {"max_new_tokens": length, "stop_token_ids": [STOP_TOKEN_ID]},
        "return_logprob": True,
        "stream": load.stream,
        "incremental_streaming_output": True,
    }
    return post("/generate", body)


def _num_tokens(body: bytes, length: int, stream: bool) -> int:
    bodies = [line[6:] for line in body.split(b"\n\n")[:-2]] if stream else [body]  # [DONE] and the end are no events
    answers = [msgspec.json.decode(each, type=Answer) for each in bodies]
    num_ids = sum(len(answer.output_ids) for answer in answers)
    num_logprobs = sum(len(answer.meta_info.output_token_logprobs) for answer in answers)
    counts = (num_ids, num_logprobs, answers[-1].meta_info.completion_tokens)
    if set(counts) != {length}:
        raise RuntimeError(f"asked for {length} tokens, got {counts}")
    return length


if __name__ == "__main__":
    print(json.dumps(asyncio.run(count(msgspec.json.decode(sys.argv[1], type=SteadyLoad)))), flush=True)
