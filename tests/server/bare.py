"""A server with no engine behind it, and its clients; it imports little, for scripts of tests."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time

from starlette.types import Receive, Scope, Send

from headrace.server.errors import error_body, respond
from headrace.server.limits import Limits
from headrace.server.listening import EmbeddedServer, listen

GET = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads the body where there is one; `/slow` never answers, `/long` answers much."""
    if scope["path"] == "/slow":
        while (await receive())["type"] != "http.disconnect":
            pass
        return
    while (await receive()).get("more_body"):
        pass
    await respond(error_body(200, "x" * (1 << 24) if scope["path"] == "/long" else "ok"))(scope, receive, send)


class Bare:
    """A server of `answer` in a thread of its own."""

    def __init__(self, write_timeout: float = 60.0) -> None:
        self.listener = listen("127.0.0.1", 0)
        self.port = int(self.listener.getsockname()[1])
        self.server = EmbeddedServer(Limits(answer, 1 << 20, 60.0, ["/health"]), write_timeout)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve(sockets=[self.listener])))
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)

    def connect(self, *parts: bytes) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        for part in parts:
            client.sendall(part)
        return client

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


def status(client: socket.socket) -> int:
    """Of the next answer, which is read whole; 0 when the server closed."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while data := client.recv(1 << 16):
            received += data
            head, _, body = received.partition(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0] or 0)
            if b"\r\n\r\n" in received and len(body) >= length:
                return int(head.split()[1])
    return 0
