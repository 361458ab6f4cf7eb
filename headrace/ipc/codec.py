"""Messages as bytes: msgpack of the closed unions in `types.messages`, in length-prefixed frames.

Owns the frame layout (a little-endian uint32 length, then that many bytes) and what a frame that does not decode is
answered with. Knows no sockets.
"""

from __future__ import annotations

import struct
from typing import Any, get_args

import msgspec

from headrace.types.errors import ErrorInfo, InternalError
from headrace.types.messages import Command, Deltas, Output, Reply
from headrace.types.request import Delta

MAX_FRAME_BYTES = 1 << 30
DECODE_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError)
"""All that decoding foreign bytes may raise."""

_HEADER = struct.Struct("<I")
_UNREPLIED_TAGS = frozenset({"submit", "abort", "finished"})


class FrameError(Exception):
    """The byte stream is not frames of this protocol; it cannot be read any further."""


def pack_frame(payload: bytes) -> bytes:
    """`payload` as one frame. Raises `FrameError` if it is over MAX_FRAME_BYTES."""
    if len(payload) > MAX_FRAME_BYTES:
        raise FrameError(f"a message of {len(payload)} bytes is over the bound of {MAX_FRAME_BYTES}")
    return _HEADER.pack(len(payload)) + payload


class FrameReader:
    """Cuts a byte stream into frame payloads. Holds at most one incomplete frame."""

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._pending = bytearray()

    def feed(self, chunk: bytes | memoryview) -> list[bytes]:
        """The payloads that `chunk` completes. Raises `FrameError` on a length over the bound."""
        if self._pending:
            self._pending += chunk
            with memoryview(self._pending) as data:
                frames, used = self._cut(data)
            del self._pending[:used]
            return frames
        with memoryview(chunk) as data:
            frames, used = self._cut(data)
            self._pending += data[used:]
        return frames

    def _cut(self, data: memoryview) -> tuple[list[bytes], int]:
        frames: list[bytes] = []
        start = 0
        while len(data) - start >= _HEADER.size:
            (length,) = _HEADER.unpack_from(data, start)
            if length > self._max_frame_bytes:
                raise FrameError(f"a frame claims {length} bytes, over the bound of {self._max_frame_bytes}")
            end = start + _HEADER.size + length
            if end > len(data):
                break
            frames.append(bytes(data[start + _HEADER.size : end]))
            start = end
        return frames, start


class CommandCodec:
    """Commands to bytes and back. Decoding yields a `Command` or raises one of DECODE_ERRORS."""

    def __init__(self) -> None:
        self.encode = msgspec.msgpack.Encoder().encode
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Command)

    def decode(self, payload: bytes) -> Command:
        """Raises one of DECODE_ERRORS when `payload` is not exactly one command."""
        command: Command = self._decoder.decode(payload)
        return command


class OutputCodec:
    """Outputs to bytes and back. Decoding yields an `Output` or raises one of DECODE_ERRORS."""

    def __init__(self) -> None:
        self.encode = msgspec.msgpack.Encoder().encode
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Output)

    def decode(self, payload: bytes) -> Output:
        """Raises one of DECODE_ERRORS when `payload` is not exactly one output."""
        output: Output = self._decoder.decode(payload)
        return output


def refuse_command(payload: bytes, problem: Exception) -> list[Output]:
    """What the sender of an undecodable command is told, as far as the frame still says who waits for an answer.

    A submission's requests each get a terminal error delta, a call gets its one reply. Nothing can be answered when
    not even the tag and the id can be read: then the list is empty.
    """
    error = InternalError(f"a command could not be decoded: {problem}").info()
    try:
        loose = msgspec.msgpack.decode(payload)
    except DECODE_ERRORS:
        return []
    if not (isinstance(loose, list) and len(loose) >= 2 and isinstance(loose[0], str)):
        return []
    tag, first = loose[0], loose[1]
    if tag == "submit":
        return _refuse_requests(first, error)
    if tag in _CALL_TAGS and _is_id(first):
        return [Reply(first, error=error)]
    return []


def _refuse_requests(requests: Any, error: ErrorInfo) -> list[Output]:
    if not isinstance(requests, list):
        return []
    handles = [request[0] for request in requests if isinstance(request, list) and request and _is_id(request[0])]
    deltas = tuple(Delta.failed(handle, error) for handle in handles)
    return [Deltas(deltas)] if deltas else []


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _call_tags() -> frozenset[str]:
    tags = {kind.__struct_config__.tag for kind in get_args(Command)}
    return frozenset(str(tag) for tag in tags) - _UNREPLIED_TAGS


_CALL_TAGS = _call_tags()
