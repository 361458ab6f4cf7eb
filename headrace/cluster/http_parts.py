"""HTTP/1.1 as bytes: the heads of requests and answers, and bodies in chunks. Read strictly, within bounds.

What two readers could understand differently is refused, since whoever stands behind a router must see the same
requests as the router. Owns no connection.
"""

from __future__ import annotations

import http
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import msgspec

MAX_HEAD_BYTES = 64 << 10
MAX_HEADERS = 256
MAX_CHUNK_BYTES = 512 << 20
"""A chunk of a replica's answer is passed on whole, and held until then: an event of `/generate` with all experts and
log-probabilities that may be asked for of a sample."""
_MAX_SIZE_LINE = 256
_MAX_KNOWN_SIZES = 64
_FREE_CHUNKS = 1024
_BYTES_PER_CHUNK = 16
"""A body of smaller chunks, beyond the first thousand, costs more to read than it is worth."""

Headers = list[tuple[bytes, bytes]]
"""Names in lower case, and values without spaces around them."""

HOP_HEADERS = frozenset(
    (
        *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te"),
        *(b"trailer", b"transfer-encoding", b"upgrade", b"expect"),
    )
)
"""Of one connection: not passed on."""

BODILESS = frozenset((204, 304))
"""Statuses of answers without a body, whose length is not told either."""

_TOKEN_BYTES = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_REQUEST_LINE = re.compile(rb"([A-Z]{1,20}) (/[!-~]*) HTTP/1\.([01])")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: [^\r\n]*)?")
_LENGTH_LINE = re.compile(rb"\r\ncontent-length: ?([0-9]{1,15})(?=\r\n|\Z)", re.IGNORECASE)
_SIZE = re.compile(rb"([0-9a-fA-F]{1,12})[ \t]*(?:;[^\r\n]*)?")
_STATUS_LINES = {each.value: f"HTTP/1.1 {each.value} {each.phrase}".encode() for each in http.HTTPStatus}
_Derived = TypeVar("_Derived")


class FramingError(Exception):
    """What came is no HTTP/1.1 that can be believed; `status` is the answer to a client who sent it."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class Head(msgspec.Struct, frozen=True):
    """The head of a request, or of an answer (`status`). `body_size` is None for a body in chunks, or, of an answer
    that `ends_with_connection`, for one of any length; where a `HeadReader` takes it from there, `headers` has no
    content-length."""

    headers: Headers
    body_size: int | None
    keeps_alive: bool
    method: str = ""
    target: bytes = b""
    is_old: bool = False
    """HTTP/1.0, which knows no chunks."""
    status: int = 0
    ends_with_connection: bool = False
    path: str = ""
    """What the target begins with, up to a question mark."""
    expects_continue: bool = False
    _derived: dict[Callable[[Head], Any], Any] = msgspec.field(default_factory=dict)

    def of_size(self, body_size: int) -> Head:
        """The same with a body of another size."""
        return Head(
            self.headers,
            body_size,
            self.keeps_alive,
            self.method,
            self.target,
            self.is_old,
            self.status,
            self.ends_with_connection,
            self.path,
            self.expects_continue,
            self._derived,
        )

    def changed(self, **changes: Any) -> Head:
        """Another head with these fields, of which what is derived of this one does not hold."""
        return msgspec.structs.replace(self, **changes, _derived={})

    def derived(self, derive: Callable[[Head], _Derived]) -> _Derived:
        """What `derive` gives for it, once for all heads that differ in `body_size` alone, of which it must not
        depend."""
        known: dict[Callable[[Head], _Derived], _Derived] = self._derived
        if derive not in known:
            known[derive] = derive(self)
        return known[derive]

    def lines_without(self, names: frozenset[bytes]) -> bytes:
        """The headers that have none of these names as lines, each with its end."""
        return b"".join([b"%b: %b\r\n" % header for header in self.headers if header[0] not in names])

    def header(self, name: bytes) -> bytes:
        """Its value; b"" where there is none."""
        for key, value in self.headers:
            if key == name:
                return value
        return b""


def parse_request(raw: bytes) -> Head:
    """The head of a request, without the empty line at its end."""
    first, *lines = raw.split(b"\r\n")
    found = _REQUEST_LINE.fullmatch(first)
    if found is None:
        raise FramingError("this is no request line of HTTP/1.1 with a path")
    method, target, minor = found.groups()
    headers, fields = _parse_headers(raw, lines)
    size, is_old = _body_size(fields), minor == b"0"
    if is_old and size is None:
        raise FramingError("HTTP/1.0 knows no transfer-encoding")
    if b"," in fields.get(b"host", b""):
        raise FramingError("host must be one name")
    keeps_alive = _keeps_alive(fields, is_old)
    path = target.partition(b"?")[0].decode()
    expects = not is_old and fields.get(b"expect", b"").lower() == b"100-continue"
    size = 0 if size == -1 else size
    return Head(headers, size, keeps_alive, method.decode(), target, is_old, path=path, expects_continue=expects)


def own_request(method: str, path: str, *headers: tuple[bytes, bytes]) -> Head:
    """The head of a request that no client has sent."""
    return Head([*headers], 0, True, method, path.encode(), path=path)


def parse_answer(raw: bytes) -> Head:
    """The head of an answer, without the empty line at its end."""
    first, *lines = raw.split(b"\r\n")
    found = _STATUS_LINE.fullmatch(first)
    if found is None:
        raise FramingError("this is no status line of HTTP/1.1")
    status, is_old = int(found[2]), found[1] == b"0"
    headers, fields = _parse_headers(raw, lines)
    size = 0 if status < 200 or status in BODILESS else _body_size(fields)
    ends = size == -1
    keeps_alive = not ends and _keeps_alive(fields, is_old)
    return Head(headers, None if ends else size, keeps_alive, status=status, is_old=is_old, ends_with_connection=ends)


class HeadReader:
    """Parses the heads that come on one connection. One that differs from the one before in nothing but its body's
    size, as most do, is not parsed again."""

    def __init__(self, parse: Callable[[bytes], Head]) -> None:
        self._parse = parse
        self._rest = b""
        """The one before, without its content-length; b"" where there was none that may be taken."""
        self._head = Head([], 0, False)

    def read(self, raw: bytes) -> Head:
        """As the function that parses. Raises `FramingError`."""
        found = _LENGTH_LINE.search(raw)
        if found is None:
            return self._parse(raw)
        size, rest = int(found[1]), raw[: found.start()] + raw[found.end() :]
        if rest == self._rest:
            return self._head.of_size(size)
        head = self._parse(raw)
        if head.body_size == size > 0:  # some answers have none, whatever they say
            headers = [header for header in head.headers if header[0] != b"content-length"]
            self._rest, self._head = rest, head.changed(headers=headers)
            return self._head
        return head


def _parse_headers(raw: bytes, lines: list[bytes]) -> tuple[Headers, dict[bytes, bytes]]:
    """The headers, and their values by name: of one that comes several times all, with commas between them, as the
    standard reads them."""
    if len(lines) > MAX_HEADERS:
        raise FramingError("too many headers", 431)
    if len(raw.translate(None, b"\0\r\n")) != len(raw) - 2 * len(lines):  # more of these than end the lines
        raise FramingError("a header holds what no line may")
    headers, fields = [], dict[bytes, bytes]()
    for line in lines:
        name, colon, value = line.partition(b":")
        if not (name and colon):
            raise FramingError("this is no header")
        name, value = name.lower(), value.strip(b" \t")
        headers.append((name, value))
        fields[name] = fields[name] + b"," + value if name in fields else value
    if b"".join(fields).translate(None, _TOKEN_BYTES):
        raise FramingError("this is no name of a header")
    return headers, fields


def _body_size(fields: dict[bytes, bytes]) -> int | None:
    """Bytes of the body; None: it comes in chunks; -1: nothing is said."""
    size, coding = fields.get(b"content-length"), fields.get(b"transfer-encoding")
    if coding is not None:
        if size is not None or coding.lower() != b"chunked":
            raise FramingError("transfer-encoding must be chunked, without a content-length")
        return None
    if size is None:
        return -1
    if not size.isdigit() or len(size) > 15:
        raise FramingError("content-length must be one number")
    return int(size)


def _keeps_alive(fields: dict[bytes, bytes], is_old: bool) -> bool:
    said = fields.get(b"connection", b"").lower()
    return b"keep-alive" in said if is_old else b"close" not in said


class ChunkReader:
    """A body in chunks, read from the front of a buffer as it comes. Only whole chunks are given, so that what a server
    sent in one piece is passed on in one."""

    def __init__(self, max_bytes: int, max_chunk_bytes: int | None = None) -> None:
        self._max_bytes = max_bytes
        self._max_chunk_bytes = max_bytes if max_chunk_bytes is None else max_chunk_bytes
        self._size: int | None = None
        self._sizes: dict[bytes, int] = {}
        """By the lines that said them: most chunks of a stream have one of few."""
        self._in_trailer = False
        self._num_trailers = 0
        self.num_bytes = 0
        self.num_chunks = 0
        self.is_complete = False

    @property
    def is_wasteful(self) -> bool:
        """True when hardly anything but framing came."""
        return self.num_chunks > _FREE_CHUNKS + self.num_bytes // _BYTES_PER_CHUNK

    def read(self, buffer: bytearray) -> list[bytes]:
        """The chunks that are whole; they are taken out of `buffer`. Raises `FramingError`, 413 when they are too
        much."""
        chunks, num_read = self.scan(buffer)
        del buffer[:num_read]
        return chunks

    def scan(self, buffer: bytes | bytearray) -> tuple[list[bytes], int]:
        """As `read`, of a buffer that is left as it is: the bytes that were read are not to be given again."""
        chunks = []
        start, size, num_bytes = 0, self._size, len(buffer)
        while not self.is_complete:
            if size is None:
                end = buffer.find(b"\r\n", start, start + _MAX_SIZE_LINE)
                if end < 0:
                    if num_bytes - start >= _MAX_SIZE_LINE:
                        raise FramingError("a chunk's size has no end")
                    break
                size = self._begin(bytes(buffer[start:end]))
                start = end + 2
                continue
            end = start + size
            if num_bytes < end + 2:
                break
            if buffer[end : end + 2] != b"\r\n":
                raise FramingError("a chunk is longer than it says")
            chunks.append(bytes(buffer[start:end]))
            start, size = end + 2, None
        self._size = size
        return chunks, start

    def _begin(self, line: bytes) -> int | None:
        """Read the line before a chunk, whose size it gives, or one after the last of them."""
        if self._in_trailer:
            self._num_trailers += 1
            self.is_complete = not line
            if self._num_trailers > MAX_HEADERS:
                raise FramingError("too many trailers", 431)
            return None
        size = self._sizes.get(line, -1)
        if size < 0:
            size = self._read_size(line)
        self.num_chunks += 1
        self.num_bytes += size
        if self.num_bytes > self._max_bytes:
            raise FramingError(f"body has {self.num_bytes} bytes or more, over {self._max_bytes}", 413)
        if size > self._max_chunk_bytes:
            raise FramingError(f"a chunk has {size} bytes, over {self._max_chunk_bytes}", 413)
        self._in_trailer = size == 0
        return size or None

    def _read_size(self, line: bytes) -> int:
        found = _SIZE.fullmatch(line)
        if found is None:
            raise FramingError("this is no size of a chunk")
        size = int(found[1], 16)
        if len(self._sizes) < _MAX_KNOWN_SIZES:
            self._sizes[line] = size
        return size


def write_head(first: bytes, headers: Iterable[tuple[bytes, bytes]], lines: bytes = b"") -> bytes:
    """A head, with the empty line at its end. `lines`: further headers, each with the end of its line."""
    return b"\r\n".join((first, *map(b": ".join, headers), lines + b"\r\n"))


def status_line(status: int) -> bytes:
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d Status" % status


def in_chunk(data: bytes) -> bytes:
    """As one chunk of a body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"
