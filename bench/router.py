"""What a router costs: time added to a request, requests per second, and tokens per second that stream through it.

    python bench/router.py --rounds 100 --out router.json

Three processes: an upstream that answers with bytes it has ready, `headrace router` in front of it, and this client.
`direct_us` and `routed_us` are medians of one request after the other, in blocks of 100 that take turns; of each the
least of all rounds, since others use the machine too, and `added_us` is their difference. `per_core` is work per second
of the router's own CPU time, which holds whatever else the machine does; `per_second` is by the clock. A streamed token
is an event of its own, as `/generate` sends it; its stream is carried, as a replica's is (`headrace.types.carried`), so
that it could go on elsewhere.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from headrace.bench.http_wire import connect, post, read_body
from headrace.types.carried import CARRIED_HEADER, CARRY_HEADER, STREAM, CarriedPart, PackedGeneration
from headrace.types.http import framed

PROMPT_TOKENS = 512
OUTPUT_TOKENS = 256
CONCURRENCY = 32
NUM_PROMPTS = 64
_EVENT = b'data: {"text":" word","output_ids":[1234],"meta_info":{"id":"0123456789abcdef","completion_tokens":12}}\n\n'
_PIECE = PackedGeneration(
    request_id="0123456789abcdef", token_ids=[1234], logprobs=[-0.5], version_spans=[("7", 1)], version_epochs=[7]
)
_PARTS = [
    framed(msgspec.msgpack.encode(CarriedPart(_EVENT, 1, msgspec.msgpack.encode((0, _PIECE)), is_last=is_last)))
    for is_last in (False, True)
]
_WHOLE = json.dumps({"text": "x", "output_ids": list(range(OUTPUT_TOKENS)), "meta_info": {"id": "0123456789abcdef"}})


class Upstream(asyncio.Protocol):
    """Answers without looking at more than a request's length, and whether it wants a stream."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self._buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            at = head.find(b"content-length:")
            size = end + 4 + (int(head[at + 15 :].split(b"\r\n")[0]) if at >= 0 else 0)
            if len(self._buffer) < size:
                return
            is_stream = b'"stream":true' in self._buffer[end:size]
            self._buffer = self._buffer[size:]
            if is_stream:
                asyncio.get_running_loop().create_task(self._stream(is_carried=CARRY_HEADER in head))
            else:
                length = b"content-length: %d\r\n\r\n" % len(_WHOLE)
                self._transport.write(b"HTTP/1.1 200 OK\r\n" + length + _WHOLE.encode())

    async def _stream(self, *, is_carried: bool) -> None:
        carried = b"%b: %b\r\n" % (CARRIED_HEADER, STREAM) if is_carried else b""
        self._transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n" + carried + b"\r\n"
        )
        for number in range(OUTPUT_TOKENS):
            data = _PARTS[number == OUTPUT_TOKENS - 1] if is_carried else _EVENT
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))
            await asyncio.sleep(0)  # the other streams have their turn
        self._transport.write(b"0\r\n\r\n")


async def serve_upstream() -> None:
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", 0)
    print(f"url=http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


def start(*words: str) -> tuple[subprocess.Popen[str], str]:
    """A process and the URL that it prints first."""
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "url=http" in line:
            return process, line.partition("url=")[2].split()[0]
    raise SystemExit(f"{' '.join(words)} ended")


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def request(number: int, stream: bool) -> bytes:
    prompt = [number % NUM_PROMPTS, *range(PROMPT_TOKENS - 1)]
    return post("/generate", {"input_ids": prompt, "sampling_params": {"max_new_tokens": 256}, "stream": stream})


async def median_us(port: int, num_requests: int) -> float:
    """Median of requests one after the other."""
    reader, writer = await connect(port)
    times = []
    for number in range(num_requests):
        began = time.perf_counter()
        writer.write(request(number, stream=False))
        await read_body(reader)
        times.append(time.perf_counter() - began)
    writer.close()
    return statistics.median(times) * 1e6


async def throughput(port: int, pid: int, num_each: int, stream: bool) -> dict[str, float]:
    """Requests and tokens per second of many clients at once, by the clock and by the router's CPU."""

    async def client(first: int) -> None:
        reader, writer = await connect(port)
        for number in range(num_each):
            writer.write(request(first + number, stream))
            body = await read_body(reader)
            assert body.count(b"data: ") == OUTPUT_TOKENS if stream else len(body) == len(_WHOLE)
        writer.close()

    began, cpu = time.perf_counter(), cpu_seconds(pid)
    await asyncio.gather(*(client(first) for first in range(CONCURRENCY)))
    seconds, cpu, num = time.perf_counter() - began, cpu_seconds(pid) - cpu, CONCURRENCY * num_each
    return {
        "requests_per_second": num / seconds,
        "requests_per_core": num / cpu,
        "tokens_per_second": num * OUTPUT_TOKENS / seconds,
        "tokens_per_core": num * OUTPUT_TOKENS / cpu,
    }


async def measure(rounds: int, upstream: int, router: int, pid: int) -> dict[str, Any]:
    pairs = [(await median_us(upstream, 100), await median_us(router, 100)) for _ in range(rounds)]
    direct, routed = min(direct for direct, _ in pairs), min(routed for _, routed in pairs)
    latency = {"direct_us": direct, "routed_us": routed, "added_us": routed - direct}
    whole = await throughput(router, pid, 200, stream=False)
    return {"latency": latency, "whole": whole, "streamed": await throughput(router, pid, 30, stream=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--policy", default="cache_aware")
    parser.add_argument("--upstream", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", help="file for the figures, as JSON")
    arguments = parser.parse_args()
    if arguments.upstream:
        asyncio.run(serve_upstream())
        return
    upstream, upstream_url = start(__file__, "--upstream")
    router, router_url = start("-m", "headrace", "router", upstream_url, "--port", "0", "--policy", arguments.policy)
    try:
        time.sleep(1.5)  # the replica has been seen
        ports = [int(url.rpartition(":")[2]) for url in (upstream_url, router_url)]
        figures = asyncio.run(measure(arguments.rounds, *ports, router.pid))
    finally:
        for process in (router, upstream):
            process.kill()
            process.communicate()
    print(json.dumps(figures, indent=2))
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
