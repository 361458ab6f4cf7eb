"""HTTP/1.1 over plain sockets, so that little of what a client process measures is its own cost.

Owns the bytes of a request and of an answer. No redirects, no retries, no keys: it speaks to a server of this machine.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import Any

import msgspec

from headrace.types.errors import InternalError

_MAX_BODY_BYTES = 1 << 26
_SHOWN_BYTES = 300
TAIL_CHARACTERS = 600
"""Of what a process that failed wrote last."""


def run_client(module: str, what: msgspec.Struct) -> str:
    """The last line that `python -m headrace.bench.{module}` prints for a load, given as JSON."""
    command = [sys.executable, "-m", f"headrace.bench.{module}", msgspec.json.encode(what).decode()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise InternalError(f"the HTTP client failed: {done.stderr.strip()[-TAIL_CHARACTERS:]}")
    return done.stdout.splitlines()[-1]


async def connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port, limit=_MAX_BODY_BYTES)


def post(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body, separators=(",", ":")).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


async def flush_cache(port: int) -> None:
    """Have the server forget what it holds of prompts."""
    reader, writer = await connect(port)
    writer.write(post("/flush_cache", {}))
    await read_body(reader)
    writer.close()


async def read_body(reader: asyncio.StreamReader) -> bytes:
    """The body of the next answer, however it is sent. Raises `RuntimeError` if its status is not 200."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    body = await (_read_chunks(reader) if b"transfer-encoding: chunked" in head else _read_whole(reader, head))
    if not head.startswith(b"http/1.1 200"):
        raise RuntimeError(f"answered {head.splitlines()[0].decode()}: {body[:_SHOWN_BYTES].decode(errors='replace')}")
    return body


async def _read_whole(reader: asyncio.StreamReader, head: bytes) -> bytes:
    return await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    chunks = []
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        chunks.append((await reader.readexactly(size + 2))[:-2])
    await reader.readexactly(2)
    return b"".join(chunks)
