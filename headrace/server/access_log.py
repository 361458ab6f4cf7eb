"""One log line per answer, with the reason of a refusal. Owns its wording. It stands around the whole application, so
that it sees all that is answered, and only where it was asked for; a router's front writes its lines itself.

Neither the query nor a body is written: they may hold what is nobody's business. A refusal's own words are.
"""

from __future__ import annotations

import logging
import time

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.server.connections import CLIENT, Connection

logger = logging.getLogger(__name__)

_MAX_PATH = 200
_MAX_REASON = 500


class _Detail(msgspec.Struct, frozen=True):
    """What is read of an error body."""

    message: str = ""


class _Refusal(msgspec.Struct, frozen=True):
    error: _Detail = _Detail()


class AccessLog:
    """Writes at info when an answer has been sent, or its client has gone."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer, since = _Answer(send), time.perf_counter()
        connection: Connection = scope["state"][CLIENT]
        num_streamed = connection.num_streamed
        try:
            await self._app(scope, receive, answer.send)
        finally:
            client = scope.get("client")
            log_answer(
                f"{client[0]}:{client[1]}" if client else "-",
                scope["method"],
                scope["path"],
                answer.status,
                answer.num_bytes + connection.num_streamed - num_streamed,
                time.perf_counter() - since,
                answer.refusal,
            )


class _Answer:
    """What of an answer passes by."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0
        self.num_bytes = 0
        self.refusal = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            body: bytes = message.get("body", b"")
            self.num_bytes += len(body)
            if self.status >= 400:
                self.refusal = self.refusal or body
        await self._send(message)


def log_answer(
    client: str, method: str, path: str, status: int, num_bytes: int, seconds: float, refusal: bytes = b""
) -> None:
    """Write the line of one answer. `status` 0: there was none. `refusal`: the body of one that says why."""
    path = ascii(path[:_MAX_PATH])[1:-1]
    reason = _reason(refusal) if status >= 400 else ""
    logger.info(
        "%s %s %s %s, %d bytes in %.1f ms%s",
        *(client, method, path, status or "no answer", num_bytes, 1e3 * seconds, f": {reason}" if reason else ""),
        extra={
            "values": {
                "client": client,
                "method": method,
                "path": path,
                "status": status,
                "num_bytes": num_bytes,
                "ms": round(1e3 * seconds, 1),
                "reason": reason,
            }
        },
    )


def _reason(refusal: bytes) -> str:
    """Why it is a refusal; "" of a page that is not ours to read."""
    try:
        message = msgspec.json.decode(refusal, type=_Refusal).error.message[:_MAX_REASON]
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return ""
    return "".join(letter if letter.isprintable() else " " for letter in message)  # of one line, whatever it quotes
