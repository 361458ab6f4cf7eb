"""A road to a server that breaks in the middle of an answer, as if the server had died."""

from __future__ import annotations

import asyncio
import contextlib

from tests.cluster.stopped_server import stop_accepting


class Relay:
    """Listens at a port of its own, and passes on what comes. `cut_after` is how many bytes of the next answer to a
    request of generation come through; then its connection breaks, and so do those that wait, once."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.cut_after: int | None = None
        self.num_cuts = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._accepted: set[asyncio.StreamWriter] = set()

    async def start(self) -> Relay:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def close(self) -> None:
        await stop_accepting(self._server)
        while self._accepted:  # those just accepted have no writers yet
            for writer in list(self._writers):
                writer.transport.abort()
            await asyncio.sleep(0.005)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._accepted.add(writer)
        with contextlib.suppress(OSError):
            there, back = await asyncio.open_connection("127.0.0.1", self._port)
            asked = bytearray()
            tasks = [
                asyncio.ensure_future(self._pass_on(reader, back, asked)),
                asyncio.ensure_future(self._pass_back(there, writer, asked)),
            ]
            self._writers |= {writer, back}
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for each in (writer, back):
                each.transport.abort()
                self._writers.discard(each)
            await asyncio.wait(tasks)
        writer.transport.abort()
        await asyncio.sleep(0)  # sockets are closed then
        self._accepted.discard(writer)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: bytearray) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                asked[:] = data[:64] if data.startswith(b"POST") else asked
                writer.write(data)
                await writer.drain()

    async def _pass_back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: bytearray) -> None:
        num_bytes = 0
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                if self.cut_after is not None and asked:
                    num_bytes += len(data)
                    if num_bytes > self.cut_after:
                        writer.write(data[: len(data) - (num_bytes - self.cut_after)])
                        await writer.drain()
                        self.cut_after = None
                        self.num_cuts += 1
                        return
                writer.write(data)
                await writer.drain()
