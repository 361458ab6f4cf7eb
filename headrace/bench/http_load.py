"""A client process that sends a whole workload at once as `/generate` requests, some times over.

`python -m headrace.bench.http_load '{"port": ..., ...}'` prints one JSON object. One connection per request, opened
before the clock starts; the clock runs from the first byte sent until the last answer is parsed and checked. Token ids
in, token ids and log-probabilities out.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import msgspec

from headrace.bench.http_wire import connect, flush_cache, post, read_body
from headrace.bench.request_style import RequestStyle
from headrace.bench.workloads import WARM_TOKENS, Scale, WorkloadName, make_workload
from headrace.types.sampling_params import LogprobMode


class Load(msgspec.Struct, frozen=True):
    """What to send. `kept` are the requests whose answers of the last run are returned."""

    port: int
    workload: WorkloadName
    scale: Scale
    vocab_size: int
    style: RequestStyle
    runs: int
    kept: list[int]


class Kept(msgspec.Struct, frozen=True):
    """One answer: the request's index, its ids and their log-probabilities."""

    index: int
    token_ids: list[int]
    logprobs: list[float]
    mode: LogprobMode


class Loaded(msgspec.Struct, frozen=True):
    """Seconds of each run, and the kept answers of the last."""

    seconds: list[float]
    kept: list[Kept]


class _MetaInfo(msgspec.Struct, frozen=True):
    completion_tokens: int
    output_token_logprobs: list[tuple[float, int, str | None]]
    logprob_mode: LogprobMode


class _Answer(msgspec.Struct, frozen=True):
    output_ids: list[int]
    meta_info: _MetaInfo


async def load(what: Load) -> Loaded:
    """Warm up with prompts that the workload does not share, then run it `runs` times with an empty prefix cache."""
    workload = make_workload(what.workload, scale=what.scale, vocab_size=what.vocab_size)
    strangers = workload.strangers()
    await _send_all(what, [(prompt, WARM_TOKENS) for prompt in strangers])
    requests = list(zip(workload.prompts, workload.output_lengths, strict=True))
    seconds: list[float] = []
    answers: list[_Answer] = []
    for _ in range(what.runs):
        await flush_cache(what.port)
        took, answers = await _send_all(what, requests)
        seconds.append(took)
    return Loaded(seconds, [_kept(index, answers[index]) for index in what.kept])


async def _send_all(what: Load, requests: list[tuple[list[int], int]]) -> tuple[float, list[_Answer]]:
    bodies = [_body(what.style, prompt, length) for prompt, length in requests]
    connections = await asyncio.gather(*(connect(what.port) for _ in requests))

    async def exchange(number: int) -> _Answer:
        reader, writer = connections[number]
        writer.write(bodies[number])
        answer = msgspec.json.decode(await read_body(reader), type=_Answer)
        _check(answer, requests[number][1])
        return answer

    try:
        start = time.perf_counter()
        answers = await asyncio.gather(*(exchange(number) for number in range(len(requests))))
        return time.perf_counter() - start, answers
    finally:
        for _, writer in connections:
            writer.close()


def _body(style: RequestStyle, prompt: list[int], length: int) -> bytes:
    return post(
        "/generate",
        {
            "input_ids": prompt,
            "sampling_params": style.sampling(length),
            "return_logprob": True,
            "top_logprobs_num": style.top_logprobs,
        },
    )


def _check(answer: _Answer, length: int) -> None:
    meta = answer.meta_info
    counts = (len(answer.output_ids), len(meta.output_token_logprobs), meta.completion_tokens)
    if set(counts) != {length}:
        raise RuntimeError(f"asked for {length} tokens, got {counts}")


def _kept(index: int, answer: _Answer) -> Kept:
    triples = answer.meta_info.output_token_logprobs
    return Kept(index, answer.output_ids, [triple[0] for triple in triples], answer.meta_info.logprob_mode)


if __name__ == "__main__":
    found = asyncio.run(load(msgspec.json.decode(sys.argv[1], type=Load)))
    print(json.dumps(msgspec.to_builtins(found)), flush=True)
