"""One end of the channel between rank 0 and another rank: frames over a socketpair, in order. Owns how long a send may
wait, and the discovery that the other end is gone. Must not know what the frames say.

A frame's first word is its kind. Nothing is sent for one step but its plan, in one call.
"""

from __future__ import annotations

import select
import socket
import struct
import time

from headrace.ipc.codec import FrameError, FrameReader
from headrace.ipc.links import PeerClosed

READ_BYTES = 1 << 18
SEND_SECONDS = 10.0
_HEADER = struct.Struct("<II")  # as `pack_frame`, and the kind
_KIND = struct.Struct("<I")


class RankChannel:
    """Either end. Used by one thread."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._reader = FrameReader()
        self._buffer = bytearray(READ_BYTES)
        self._incoming = select.poll()
        self._incoming.register(connection, select.POLLIN)
        self._closed_reason = ""

    def send(self, kind: int, payload: bytes) -> None:
        """Send a frame. Raises `PeerClosed` where the other end is gone, or has not read for SEND_SECONDS."""
        left = memoryview(b"".join((_HEADER.pack(_KIND.size + len(payload), kind), payload)))
        until = 0.0
        while left:
            try:
                left = left[self._socket.send(left) :]
            except BlockingIOError:
                until = until or time.monotonic() + SEND_SECONDS
                self._await_room(until)
            except OSError as error:
                raise PeerClosed(f"its channel broke: {error}") from None

    def receive(self, timeout: float) -> list[tuple[int, memoryview]]:
        """Every frame that has come as (kind, payload), waiting up to `timeout` seconds for the first bytes.

        Raises `PeerClosed` once the other end is gone and all it sent has been returned.
        """
        if timeout > 0:
            self._incoming.poll(timeout * 1000.0)
        frames: list[bytes] = []
        while not self._closed_reason:
            try:
                num_bytes = self._socket.recv_into(self._buffer)
                frames += self._reader.feed(memoryview(self._buffer)[:num_bytes])
            except BlockingIOError:
                break
            except (OSError, FrameError) as error:
                self._closed_reason = f"its channel broke: {error}"
                break
            if not num_bytes:
                self._closed_reason = "its channel was closed"
            elif num_bytes < READ_BYTES:
                break
        if self._closed_reason and not frames:
            raise PeerClosed(self._closed_reason)
        return [(_KIND.unpack_from(frame)[0], memoryview(frame)[_KIND.size :]) for frame in frames]

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()
        self._closed_reason = self._closed_reason or "its channel is closed"

    def _await_room(self, until: float) -> None:
        poller = select.poll()
        poller.register(self._socket, select.POLLOUT)
        if not poller.poll(max(0.0, until - time.monotonic()) * 1000.0):
            raise PeerClosed(f"it has read nothing for {SEND_SECONDS:g} s")
