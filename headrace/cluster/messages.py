"""What a router sends to a replica: the client's own request under the router's headers. Owns which headers are passed
on."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.cluster.http_parts import HOP_HEADERS, Head
from headrace.cluster.replicas import RemoteReplica
from headrace.cluster.upstream import BrokenAnswerError, Upstream
from headrace.types.carried import CARRIED_HEADER, CARRY_HEADER, CONTINUES_HEADER

_NOT_SENT_ON = HOP_HEADERS | {
    *(b"host", b"content-length", b"origin", b"sec-fetch-site", b"authorization"),
    *(CARRY_HEADER, CONTINUES_HEADER),
}
"""What a page of a browser sends is judged here: a replica knows another name, by which all pages are strangers."""
_NOT_PASSED_BACK = HOP_HEADERS | {b"content-length", b"x-headrace-instance", CARRIED_HEADER}
MAX_WHOLE_BYTES = 256 << 20
"""Of an answer that is read to its end before anything is done with it."""
REPLICA_HEADER = b"x-headrace-replica"
"""Of an answer: which replica gave it."""
INSTANCE_HEADER = b"x-headrace-instance"
"""Of a replica's answer: which process gave it."""


class RequestParts:
    """A request, to be written for whichever replica it goes to, with headers that are `added`. With `key` None the
    client's own is sent on."""

    def __init__(self, head: Head, body: bytes, key: str | None, added: Sequence[tuple[bytes, bytes]] = ()) -> None:
        self._first, lines, has_body = head.derived(_sent_on)
        self.body = body
        authorization = head.header(b"authorization") if key is None else b"Bearer " + key.encode()
        if authorization:
            lines += b"authorization: %b\r\n" % authorization
        if body or has_body:
            lines += b"content-length: %d\r\n" % len(body)
        for header in added:
            lines += b"%b: %b\r\n" % header
        self._lines = lines

    def head_for(self, replica: RemoteReplica) -> bytes:
        """The head of the request."""
        return b"%b%b\r\n%b\r\n" % (self._first, replica.host_header, self._lines)


def _sent_on(head: Head) -> tuple[bytes, bytes, bool]:
    """Of a request: how it begins, up to its host; the headers that are sent on; whether it says how long its body is
    when that is empty."""
    method = "GET" if head.method == "HEAD" else head.method  # whose answer says how long it is, and has no body
    first = b"%b %b HTTP/1.1\r\nhost: " % (method.encode(), head.target)
    return first, head.lines_without(_NOT_SENT_ON), method not in ("GET", "DELETE")


def instance_of(head: Head) -> bytes:
    """Which process gave this answer; b"" where it does not say."""
    return head.header(INSTANCE_HEADER)


def lines_back(head: Head, replica: RemoteReplica) -> bytes:
    """The headers of an answer, as the client gets them, each with the end of its line."""
    return b"%b%b: %b\r\n" % (head.derived(_passed_back), REPLICA_HEADER, replica.id.encode())


def _passed_back(head: Head) -> bytes:
    return head.lines_without(_NOT_PASSED_BACK)


async def exchange_whole(
    upstream: Upstream, head: bytes, body: bytes, max_bytes: int = MAX_WHOLE_BYTES
) -> tuple[Head, bytes]:
    """A request and its whole answer, on a connection of its own: what may have been done is never sent twice. Raises
    `BrokenAnswerError`, also for an answer of over `max_bytes`."""
    connection = await upstream.lend(fresh=True, is_data=False)
    try:
        connection.send(head, body)
        answer = await connection.read_head()
        parts, num_bytes, announced = [], 0, answer.body_size or 0
        while max(num_bytes, announced) <= max_bytes and (part := await connection.read_part()):
            parts.append(part)
            num_bytes += len(part)
        if max(num_bytes, announced) > max_bytes:
            raise BrokenAnswerError(f"its answer has over {max_bytes} bytes", had_begun=True)
        return answer, b"".join(parts)
    finally:
        upstream.give_back(connection)
