"""What more replicas bring behind one router: tokens per second on workload B, and how much of its prompts is not
computed twice.

    python -m bench.replicas --measure throughput --json
    python -m bench.replicas --measure hits --json

Each replica is a process: a whole server whose executor answers `--step-ms` after it was given a step, whatever is in
it, so that its tokens per second are at most `ROWS` in that time, and `of_bound` says how near it came. `headrace
router` stands in front of them, and this process is the client, which counts what it is answered.

`throughput`: groups of workload B, output lengths divided by `--length-divisor`, are sent sample by sample, so that
`IN_FLIGHT` for each replica are always under way: what is measured is neither the start of a batch nor its longest
sample. After `--seconds` all are aborted, and the tokens of those that were cut count too. `hits`: B's 64 groups of 8,
sent at once, first as they are, then with their first half in common; all replicas together have the memory for keys
and values that one alone has. Hits are the tokens that the replicas say they had cached.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import time
from collections.abc import Iterator
from typing import Any

from bench.paced import NUM_IDS, PacedExecutor, cluster, serve_one
from headrace.bench.http_wire import connect, post, read_body
from headrace.bench.workloads import make_workload

ROWS = 32
IN_FLIGHT = 48
POOL_TOKENS = 64 << 10
"""Of all replicas together, for `hits`; of each for `throughput`."""
HIT_LENGTH_DIVISOR = 64
_STEP_MS = {"throughput": 200.0, "hits": 20.0}
"""Long enough that the machine's own cores are not what bounds eight replicas; hits do not depend on it."""
_SECONDS_TO_SETTLE = 1.0

Sample = tuple[list[int], int]
"""A prompt, and how many tokens to generate."""
Request = tuple[bytes, int]
"""As it is sent, and how many tokens its prompt has."""


def samples_of_b(length_divisor: int) -> Iterator[Sample]:
    """Samples of B without an end: after the 64 groups come 64 of other prompts."""
    workload = make_workload("B", vocab_size=NUM_IDS)
    for turn in itertools.count():
        for prompt, length in zip(workload.prompts, workload.output_lengths, strict=True):
            yield [(token + turn) % NUM_IDS for token in prompt], max(1, length // length_divisor)


def with_common_half(samples: list[Sample]) -> list[Sample]:
    """The same groups under a beginning that all have: other ids than theirs were, so that nothing of it is held."""
    half = len(samples[0][0]) // 2
    common = [(token + NUM_IDS // 2) % NUM_IDS for token in samples[0][0][:half]]
    return [(common + prompt[half:], length) for prompt, length in samples]


def request_of(sample: Sample) -> Request:
    prompt, length = sample
    params = {"max_new_tokens": length, "ignore_eos": True}
    return post("/generate", {"input_ids": prompt, "sampling_params": params}), len(prompt)


class Client:
    """Counts the tokens that it is answered."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connections: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.num_tokens = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0

    async def connect(self, num_at_once: int) -> None:
        """Be ready to send so many at once."""
        self._connections = [await connect(self._port) for _ in range(num_at_once)]

    async def ask_all(self, requests: Iterator[Request]) -> None:
        """Send them in order, one after the other on each connection."""
        await asyncio.gather(*(self._ask_some(requests, *each) for each in self._connections))

    async def _ask_some(
        self, requests: Iterator[Request], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        for request, num_prompt_tokens in requests:
            writer.write(request)
            answer = json.loads(await read_body(reader))
            self.num_tokens += len(answer["output_ids"])
            self.num_prompt_tokens += num_prompt_tokens
            self.num_cached_tokens += answer["meta_info"]["cached_tokens"]
        writer.close()

    async def abort_all(self) -> None:
        """Have all that is under way answered with what there is of it."""
        reader, writer = await connect(self._port)
        writer.write(post("/abort_request", {"abort_all": True}))
        await read_body(reader)
        writer.close()


async def measure_throughput(port: int, num_replicas: int, seconds: float, length_divisor: int) -> float:
    """Tokens per second."""
    client, num_at_once = Client(port), IN_FLIGHT * num_replicas
    await client.connect(num_at_once)
    later = map(request_of, samples_of_b(length_divisor))
    first = list(itertools.islice(later, num_at_once))  # the first ones come at once, and are ready before
    began = time.monotonic()
    end = began + seconds
    requests = itertools.takewhile(lambda _: time.monotonic() < end, itertools.chain(first, later))
    asking = asyncio.create_task(client.ask_all(requests))
    await asyncio.sleep(seconds)
    taken = time.monotonic() - began
    await client.abort_all()
    await asyncio.wait_for(asking, 60)
    return client.num_tokens / taken


async def measure_hits(port: int) -> dict[str, int]:
    """Tokens of prompts that were cached."""
    found = {}
    plain = list(itertools.islice(samples_of_b(HIT_LENGTH_DIVISOR), 512))
    for name, samples in (("plain", plain), ("common_half", with_common_half(plain))):
        client = Client(port)
        await client.connect(len(samples))
        await client.ask_all(map(request_of, samples))
        found[name] = client.num_cached_tokens
        found[f"{name}_prompt_tokens"] = client.num_prompt_tokens
        await asyncio.sleep(_SECONDS_TO_SETTLE)
    return found


def measure(number: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of so many replicas."""
    is_hits = arguments.measure == "hits"
    pool = POOL_TOKENS // number if is_hits else POOL_TOKENS
    replica = ["-m", "bench.replicas", "--serve", "--step-ms", str(arguments.step_ms), "--pool-tokens", str(pool)]
    with cluster(replica, number, "--policy", arguments.policy) as port:
        if is_hits:
            return {"replicas": number, **asyncio.run(measure_hits(port))}
        rate = asyncio.run(measure_throughput(port, number, arguments.seconds, arguments.length_divisor))
    bound = number * ROWS * 1000 / arguments.step_ms
    return {"replicas": number, "tokens_per_second": round(rate, 1), "of_bound": round(rate / bound, 4)}


def compare(rows: list[dict[str, Any]]) -> None:
    """Set each beside the first."""
    for row in rows:
        if "tokens_per_second" in row:
            row["times_the_first"] = round(row["tokens_per_second"] / rows[0]["tokens_per_second"], 3)
        else:
            row |= {f"{name}_ratio": round(row[name] / rows[0][name], 4) for name in ("plain", "common_half")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=("throughput", "hits"), default="throughput")
    parser.add_argument("--replicas", default="1,2,8")
    parser.add_argument("--policy", default="cache_aware")
    parser.add_argument("--step-ms", type=float, help="(default: 200 for throughput, 20 for hits)")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--length-divisor", type=int, default=16)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--pool-tokens", type=int, default=POOL_TOKENS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.step_ms = arguments.step_ms or _STEP_MS[arguments.measure]
    if arguments.serve:
        seconds = arguments.step_ms / 1000
        serve_one(
            lambda vocab_size, **given: PacedExecutor(lambda _: seconds, vocab_size, **given),
            max_running_requests=ROWS,
            max_num_batched_tokens=2048,
            kv_pool_tokens=arguments.pool_tokens,
        )
        return
    rows: list[dict[str, Any]] = []
    for number in map(int, arguments.replicas.split(",")):
        rows.append(measure(number, arguments))
        compare(rows)
        print(f"{rows[-1]}, load {os.getloadavg()[0]:.1f}", flush=True)
    if arguments.json:
        told = {name: getattr(arguments, name) for name in ("measure", "policy", "step_ms", "length_divisor")}
        print(json.dumps({**told, "rows": rows}))


if __name__ == "__main__":
    main()
