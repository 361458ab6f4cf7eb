"""One answer of the router's to a client: what stands around it on the wire, and its line in the log. Knows no
connection but by `AnswerTaker`.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import msgspec

from headrace.cluster.http_parts import BODILESS, LAST_CHUNK, Head, Headers, in_chunk, status_line, write_head
from headrace.server.access_log import log_answer
from headrace.server.errors import RETRY_AFTER_SECONDS

_JSON = (b"content-type", b"application/json")


class AnswerTaker(Protocol):
    """Where an answer goes."""

    @property
    def is_closing(self) -> bool:
        """No further request is taken."""
        ...

    def write(self, data: bytes, /) -> None:
        """Send bytes; never waits."""
        ...

    async def drain(self) -> None:
        """Wait until the client has taken enough of what it was sent."""
        ...


class Exchange:
    """One request's answer on its way out: `reply`, or `begin`, any number of `send`, and `end`."""

    def __init__(self, client: AnswerTaker, head: Head) -> None:
        self._client = client
        self._head = head
        self._is_chunked, self._has_body = False, True
        self._ends_connection = False  # its body has no other end
        self.has_begun = False
        self.is_complete = False
        self.status = 0
        self.media_type = b""
        """Of an answer whose length is not known."""
        self._num_bytes, self._refusal = 0, b""
        self._began = time.perf_counter()

    def reply(self, status: int, headers: Headers, body: bytes, lines: bytes = b"") -> None:
        """A whole answer. `lines`: further headers, each with the end of its line."""
        self.status, self.has_begun, self.is_complete = status, True, True
        length = [(b"content-length", b"%d" % len(body))] if status not in BODILESS else []
        headers = [*headers, *length, *self._last_words()]
        if self._head.method == "HEAD":
            body = b""
        self._num_bytes, self._refusal = len(body), body if status >= 400 else b""
        self._client.write(write_head(status_line(status), headers, lines) + body)

    def error(self, body: dict[str, Any], *more: tuple[bytes, bytes]) -> None:
        """A whole answer that is an error, as a server's. `more`: further headers."""
        headers = [_JSON, *more]
        if body["retryable"]:
            headers.append((b"retry-after", b"%d" % RETRY_AFTER_SECONDS))
        self.reply(body["code"], headers, msgspec.json.encode(body))

    def begin(self, status: int, media_type: bytes, lines: bytes) -> None:
        """The head of an answer whose length is not known. `lines`: its headers, each with the end of its line."""
        self.status, self.has_begun, self.media_type = status, True, media_type
        self._has_body = self._head.method != "HEAD"
        self._is_chunked = self._has_body and not self._head.is_old
        self._ends_connection = self._has_body and self._head.is_old
        headers: Headers = [(b"transfer-encoding", b"chunked")] if self._is_chunked else []
        self._client.write(write_head(status_line(status), [*headers, *self._last_words()], lines))

    async def send(self, data: bytes) -> None:
        """A part of it; waits while the client does not take what it was sent."""
        if data and self._has_body:  # an empty chunk would be the last one
            self._num_bytes += len(data)
            self._client.write(in_chunk(data) if self._is_chunked else data)
        await self._client.drain()

    def end(self) -> None:
        """The end of it."""
        self.is_complete = True
        if self._is_chunked:
            self._client.write(LAST_CHUNK)

    def log(self, client: str, head: Head | None) -> None:
        """Write its line to the log; `head` is None of what was no request."""
        method, path = (head.method, head.path) if head is not None else ("-", "-")
        log_answer(client, method, path, self.status, self._num_bytes, self.seconds(), self._refusal)

    def seconds(self) -> float:
        """Since the whole request was there."""
        return time.perf_counter() - self._began

    @property
    def keeps_connection(self) -> bool:
        """True when the client may send its next request."""
        return self.is_complete and not self._is_last

    @property
    def _is_last(self) -> bool:
        return not self._head.keeps_alive or self._ends_connection or self._client.is_closing

    def _last_words(self) -> Headers:
        if self._is_last:
            return [(b"connection", b"close")]
        return [(b"connection", b"keep-alive")] if self._head.is_old else []
