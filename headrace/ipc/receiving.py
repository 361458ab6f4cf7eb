"""Reading from a socket that blocks. Owns nothing."""

from __future__ import annotations

import socket
import time

from headrace.types.http import LENGTH_BYTES

_PART_BYTES = 1 << 20


def receive_exactly(link: socket.socket, num_bytes: int, deadline: float) -> bytes:
    """The next bytes. Raises `TimeoutError` at `deadline` (of the monotonic clock), `ConnectionResetError` if the other
    end closes before."""
    found = bytearray()
    while len(found) < num_bytes:
        link.settimeout(max(deadline - time.monotonic(), 1e-3))
        part = link.recv(min(num_bytes - len(found), _PART_BYTES))
        if not part:
            raise ConnectionResetError("the other end has closed")
        found += part
    return bytes(found)


def receive_framed(link: socket.socket, deadline: float) -> bytes:
    """What the other end sent as `framed`."""
    return receive_exactly(link, int.from_bytes(receive_exactly(link, LENGTH_BYTES, deadline), "little"), deadline)
