"""What ranks of a trainer tell each other around an engine, as values, and the wire that carries it. Owns the frames
and one connection; knows nothing of calls, engines or tensors.

A frame is its length and MessagePack, decoded to the types of this file only.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections import deque
from typing import Literal

import msgspec

from headrace.types.errors import ErrorInfo, HeadraceError
from headrace.types.weights import BufferRef

LENGTH_BYTES = 8
MAX_HELLO_BYTES = 4096
_CHUNK_BYTES = 1 << 20


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A rank's first frame: which it is, the secret that all ranks share, and memory of its own, which ends with that
    secret."""

    rank: int
    secret: bytes
    memory: BufferRef


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The answer to it. `shares_memory`: rank 0 reads that memory itself; else its bytes are sent."""

    shares_memory: bool


class Enter(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A rank has come to its call `number`, which is `name`."""

    number: int
    name: str


class ShardPart(msgspec.Struct, frozen=True, array_like=True):
    """A tensor of an update as one rank has it, or a piece of that.

    way          "whole": every rank has all of it; "box": each has a box of it; "gathered": all ranks gather it
    start, size  the box, where this rank's counts: of equal ones that of one rank does
    offset       where its bytes, or the `num_bytes` of them that are in this piece, lie in the rank's memory
    has_more     further pieces follow
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    way: Literal["whole", "box", "gathered"]
    start: tuple[int, ...] = ()
    size: tuple[int, ...] = ()
    offset: int = 0
    num_bytes: int = 0
    has_more: bool = False


class ShardParts(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Tensors of a rank, in their order. Unless these are the last, it waits for `Proceed`.
    `data` is what the memory holds, where rank 0 does not read it itself."""

    number: int
    parts: tuple[ShardPart, ...]
    is_last: bool
    data: bytes = b""


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A rank's share of a call failed."""

    number: int
    error: ErrorInfo


class Proceed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A rank may go on with its share of a call: nobody reads its memory now."""

    number: int


class Beat(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Rank 0 is still at it."""


class Done(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The end of a call: what every rank returns or raises."""

    number: int
    error: ErrorInfo | None = None
    answer: bytes = b""


Frame = Hello | Welcome | Enter | ShardParts | Failed | Proceed | Beat | Done


class PeerGone(Exception):
    """The other end has closed the connection, or has died."""


class Wire:
    """A connection to one rank. One thread receives; any may send. Every wait has a deadline, in `time.monotonic`."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        with contextlib.suppress(OSError):  # of a kind that has no such delay
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._sending = threading.Lock()
        self._received = bytearray()
        self._waiting: deque[Frame] = deque()

    def send(self, frame: Frame, deadline: float) -> None:
        """Send a frame. Raises `PeerGone`; `TimeoutError` when the other end does not read: it is of no use then."""
        body = _ENCODER.encode(frame)
        with self._sending:
            rest = memoryview(len(body).to_bytes(LENGTH_BYTES, "little") + body)
            try:
                while rest:
                    try:
                        rest = rest[self._socket.send(rest) :]
                    except BlockingIOError:
                        self._wait(select.POLLOUT, deadline)
            except TimeoutError:
                self.close()  # half a frame is there
                raise
            except OSError as error:
                raise PeerGone from error

    def receive(self, deadline: float, max_bytes: int = 1 << 40) -> Frame:
        """The next frame. Raises `PeerGone`, and `TimeoutError` at the deadline, after which one may go on."""
        while not self._waiting:
            self._take(max_bytes)
            if self._waiting:
                break
            try:
                chunk = self._socket.recv(_CHUNK_BYTES)
            except BlockingIOError:
                self._wait(select.POLLIN, deadline)
                continue
            except OSError as error:
                raise PeerGone from error
            if not chunk:
                raise PeerGone
            self._received += chunk
        return self._waiting.popleft()

    def put_back(self, frame: Frame) -> None:
        """It is the next to be received."""
        self._waiting.appendleft(frame)

    def beat(self) -> None:
        """Send a beat, unless something is being sent or nothing can be."""
        if self._sending.acquire(blocking=False):
            self._sending.release()
            with contextlib.suppress(PeerGone, TimeoutError):
                self.send(Beat(), time.monotonic() + 0.1)

    def has_ended(self) -> bool:
        """Whether the other end is seen to be gone."""
        try:
            return not self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._socket.close()

    def _take(self, max_bytes: int) -> None:
        if len(self._received) < LENGTH_BYTES:
            return
        end = LENGTH_BYTES + int.from_bytes(self._received[:LENGTH_BYTES], "little")
        if end > max_bytes:
            raise PeerGone
        if len(self._received) >= end:
            with memoryview(self._received)[LENGTH_BYTES:end] as body:
                try:
                    self._waiting.append(_DECODER.decode(body))
                except msgspec.DecodeError as error:
                    raise PeerGone from error
            del self._received[:end]

    def _wait(self, event: int, deadline: float) -> None:
        poller = select.poll()
        try:
            poller.register(self._socket, event)
        except ValueError as error:  # closed meanwhile
            raise PeerGone from error
        left = deadline - time.monotonic()
        if left <= 0 or not poller.poll(left * 1000 + 1):
            raise TimeoutError


def info_of(error: BaseException, rank: int, call: str, failure: type[HeadraceError]) -> ErrorInfo:
    """An error as other ranks are told of it. One that is not ours is a `failure` there."""
    if isinstance(error, HeadraceError):
        return error.info()
    return ErrorInfo(failure.__name__, f"{call}: rank {rank} failed: {type(error).__name__}: {error}", "rank")


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Frame)
