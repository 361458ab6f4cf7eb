"""What a piece of a stream costs the front's loop: from the bytes that the core sends to the write of a connection.

    python bench/stream_pieces.py --streams 512 --tokens 9    processor time a piece of so many tokens, least and median
    valgrind --tool=callgrind --instr-atstart=no python bench/stream_pieces.py --streams 64 --rounds 6 --instructions

Server, engine and link are real; the core's messages are made here, one token a stream in each, and connections have no
socket. With `--instructions` callgrind counts the rounds alone: its "Collected", by streams and rounds, is a piece.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from headrace.bench.models import write_config
from headrace.engine import AsyncEngine
from headrace.ipc.codec import OutputCodec, pack_frame
from headrace.server import serve
from headrace.server.connections import Connection
from headrace.types.messages import Command, Deltas, Submit
from headrace.types.request import Delta, pack_ids

BODY = json.dumps(
    {
        "input_ids": [1, 2, 3],
        "sampling_params": {"max_new_tokens": 1000},
        "stream": True,
        "incremental_streaming_output": True,
    }
).encode()
REQUEST = b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY


class Sent(asyncio.Transport):
    """Takes what is written and counts it."""

    num_writes = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        Sent.num_writes += 1

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def resume_reading(self) -> None:
        pass

    def abort(self) -> None:
        pass

    close = abort


async def measure(engine: AsyncEngine, arguments: argparse.Namespace) -> list[float]:
    """Seconds of processor time of each round."""
    server = await serve(engine)
    client, embedded, num_streams = engine.runtime.client, server._server, arguments.streams
    put = client._put

    def put_others(command: Command) -> None:
        if not isinstance(command, Submit):  # the core hears of no request
            put(command)

    client._put = put_others  # type: ignore[method-assign]
    connections = []
    for _ in range(num_streams):
        connection = Connection(embedded.config, embedded.server_state, {}, embedded._parsing)
        connection.connection_made(Sent())
        connection.data_received(REQUEST)
        connections.append(connection)
    while len(client._sinks) < num_streams:
        await asyncio.sleep(0.01)
    messages = [_message(list(client._sinks)) for _ in range(arguments.tokens)]

    async def run_round() -> None:
        end = Sent.num_writes + num_streams
        for message in messages:
            client._link._protocol.data_received(message)  # type: ignore[attr-defined]
        while Sent.num_writes < end:
            await asyncio.sleep(0)

    await run_round()  # begins each answer: its head goes with its first piece
    await run_round()
    gc.collect()
    gc.freeze()
    if arguments.instructions:
        _count("on")
    times = []
    for _ in range(arguments.rounds):
        start = time.thread_time()
        await run_round()
        times.append(time.thread_time() - start)
    if arguments.instructions:
        _count("off")
    for connection in connections:
        connection.connection_lost(None)
    await server.stop(1.0)
    return times


def _message(handles: list[int]) -> bytes:
    ids, logprobs = pack_ids([1234]), b"\0\0\x80\xbf"
    deltas = tuple(Delta(handle, ids, logprobs, (("default", 1),), span_epochs=(0,)) for handle in handles)
    return pack_frame(OutputCodec().encode(Deltas(deltas)))


def _count(state: str) -> None:
    subprocess.run(["callgrind_control", "-i", state, str(os.getpid())], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1, help="of a piece (default: 1)")
    parser.add_argument("--rounds", type=int, default=40, help="pieces of each stream that are timed (default: 40)")
    parser.add_argument("--instructions", action="store_true", help="have callgrind count the rounds")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_config(Path(scratch), "tiny")
        settings: Any = {"load_format": "dummy", "max_running_requests": arguments.streams, "kv_pool_tokens": 1 << 20}
        engine = AsyncEngine(folder, executor="free", skip_tokenizer_init=True, progress=False, **settings)
        try:
            times = asyncio.run_coroutine_threadsafe(measure(engine, arguments), engine.loop).result()
        finally:
            engine.close()
    least, median = (1e6 * each / arguments.streams for each in (min(times), sorted(times)[len(times) // 2]))
    print(f"{arguments.streams} streams, {arguments.tokens} tokens a piece: least {least:.1f} us, median {median:.1f}")


if __name__ == "__main__":
    main()
