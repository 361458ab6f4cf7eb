"""A server that stands for `headrace serve` behind a router: real sockets, no engine. `python -m tests.cluster.replica
PORT` is one as a process.

POST /generate answers with what it was sent; `{"stream": true}` sends `num_events` events. Its fields, or a request's
`do`, say how it fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import sys
from typing import Any

from tests.cluster.stopped_server import stop_accepting

EVENT_SECONDS = 0.002
Headers = dict[str, str]


class FakeReplica:
    """One server on the running loop. Its fields may be changed while it runs."""

    def __init__(self) -> None:
        self.health = 200
        self.ready = 200
        self.weight_version = "v0"
        self.answer: tuple[int, Any] | None = None
        """What every POST but `/generate` is answered; None: with its own path."""
        self.answers: dict[str, tuple[int, Any]] = {}
        """As `answer`, of single paths; status 0: nothing, and the connection breaks."""
        self.raw: dict[str, bytes] = {}
        """What is sent for a target, whatever it is; then the connection is kept."""
        self.held: dict[str, asyncio.Event] = {}
        """Targets that are answered once the event is set."""
        self.instance = secrets.token_hex(8)
        self.delay = 0.0
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        """(method and target, headers, body) of what came, health aside."""
        self.num_dropped = 0
        """Clients that went away before their answer."""
        self._kept: list[asyncio.StreamWriter] = []
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self, port: int = 0) -> FakeReplica:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port, limit=1 << 26)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def die(self) -> None:
        """As a process that is killed."""
        self._abort_all()
        await stop_accepting(self._server)
        self._abort_all()
        await asyncio.sleep(0)

    def _abort_all(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while await self._serve_one(reader, writer):
                pass
        self._writers.discard(writer)
        writer.transport.abort()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        method, target, _ = first.split(" ")
        if target in self.raw:
            writer.write(self.raw[target])
            await writer.drain()
            return True
        if target in ("/health", "/ready"):
            status = self.health if target == "/health" else self.ready
            if status == 0:
                await asyncio.sleep(3600)
            told = {"weight_version": self.weight_version} if status == 200 else {"message": "paused"}
            await self._reply(writer, status, told)
            return True
        self.seen.append((f"{method} {target}", headers, body))
        answering = asyncio.ensure_future(self._answer(writer, target, body, headers))
        watching = asyncio.ensure_future(reader.read(1))  # nothing comes before the answer has gone
        done, _ = await asyncio.wait((answering, watching), return_when=asyncio.FIRST_COMPLETED)
        if answering not in done:
            self.num_dropped += 1
            answering.cancel()
            return False
        watching.cancel()
        await asyncio.wait((watching,))
        return answering.result()

    async def _answer(self, writer: asyncio.StreamWriter, target: str, body: bytes, headers: Headers) -> bool:
        if target.partition("?")[0] != "/generate":
            if target in self.held:
                await self.held[target].wait()
            status, told = self.answers.get(target) or self.answer or (200, {"path": target})
            if status == 0:
                return False
            await self._reply(writer, status, told)
            return True
        asked = json.loads(body)
        await asyncio.sleep(asked.get("delay", self.delay))
        if asked.get("do") == "refuse":
            await self._reply(writer, 400, {"message": "no", "retryable": False})
        elif asked.get("do") == "shut":
            told = {"message": "bye", "retryable": True, "err_type": "ShutdownError"}
            await self._reply(writer, 503, told)
        elif asked.get("stream"):
            return await self._stream(writer, asked)
        else:
            told = {"text": asked.get("rid"), "port": self.port, "version": self.weight_version}
            if asked.get("do") in ("die", "half") and asked["at"] == self.port:
                if asked["do"] == "half":
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{")
                    await writer.drain()
                    await asyncio.sleep(EVENT_SECONDS)
                writer.transport.abort()
                return False
            await self._reply(writer, 200, told)
        self._kept.append(writer)
        return True

    def drop_idle(self) -> None:
        """Close the connections on which answers have gone."""
        while self._kept:
            self._kept.pop().transport.abort()

    async def _stream(self, writer: asyncio.StreamWriter, asked: dict[str, Any]) -> bool:
        media_type = asked.get("media_type", "text/event-stream")
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-type: {media_type}\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        for number in range(asked.get("num_events", 5)):
            if number == asked.get("break_at"):
                writer.write(b"ff\r\ndata: half of an event")
                await writer.drain()
                await asyncio.sleep(EVENT_SECONDS)
                writer.transport.abort()
                return False
            data = f"data: {json.dumps({'rid': asked.get('rid'), 'number': number})}\n\n".encode()
            writer.write(b"%x\r\n%b\r\n" % (len(data), data))
            await writer.drain()
            await asyncio.sleep(asked.get("event_seconds", EVENT_SECONDS))
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        await writer.drain()
        return True

    async def _reply(self, writer: asyncio.StreamWriter, status: int, told: Any) -> None:
        data = json.dumps(told).encode() if isinstance(told, dict) else told.encode()
        own = b"X-Own: yes\r\nX-Headrace-Instance: %b" % self.instance.encode()
        writer.write(b"HTTP/1.1 %d X\r\n%b\r\ncontent-length: %d\r\n\r\n" % (status, own, len(data)) + data)
        await writer.drain()


async def serve_for_ever(port: int) -> None:
    replica = await FakeReplica().start(port)
    print(replica.port, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve_for_ever(int(sys.argv[1])))
