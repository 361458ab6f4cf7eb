"""A call that goes on at another replica when its own dies: what has come of it, and what the next one is asked. Knows
neither a dialect nor a connection: both replicas do, and say it in parts (`types/carried.py`).

What came is kept as it came, packed, and read by the next replica only.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import msgspec

from headrace.cluster.http_parts import MAX_CHUNK_BYTES, Head, Headers
from headrace.ipc.codec import DECODE_ERRORS
from headrace.types.carried import (
    CARRIED_HEADER,
    CARRY_HEADER,
    CONTINUES_HEADER,
    MAX_PIECES,
    WHOLE,
    CarriedBefore,
    CarriedPart,
)
from headrace.types.http import LENGTH_BYTES

ResumeMode = Literal["off", "streams", "all"]
RESUME_MODES: tuple[str, ...] = get_args(ResumeMode)
MAX_PART_BYTES = MAX_CHUNK_BYTES

_FRAME_BYTES = 64
"""Of a `CarriedBefore`, beside its pieces and its name."""

_decode = msgspec.msgpack.Decoder(CarriedPart).decode
_NO_PART = CarriedPart()
_pack = msgspec.msgpack.Encoder().encode


class Taken(NamedTuple):
    """What came: what the client is to have of it, whether that was the last of it, and why nothing more is to be read
    ("": there is no reason)."""

    told: bytes
    is_last: bool
    problem: str


class Resumption:
    """One call. What is kept of it, and the client's body, have at most `max_bytes`: a replica reads no more."""

    def __init__(self, body: bytes, mode: ResumeMode, max_bytes: int) -> None:
        self.num_moves = 0
        self.is_over = False
        """More came than is kept: it can only begin anew."""
        self._max_bytes = max_bytes - len(body) - _FRAME_BYTES
        self._client_body = body
        self._mode = mode.encode()
        self._rest = bytearray()
        """The beginning of a part of which the end has not come."""
        self._num_pieces, self._pieces = 0, bytearray()
        self._num_told = 0
        self._begun_at, self._name, self._num_name_bytes = 0.0, "", 0
        self._whole: list[bytes] = []
        self._whole_head = _NO_PART

    @property
    def has_begun(self) -> bool:
        """True when some of an answer came."""
        return self._num_pieces > 0

    def request(self) -> tuple[Headers, bytes]:
        """What to ask a replica beside the client's own headers, and the body."""
        if not self._num_pieces:
            return [(CARRY_HEADER, self._mode)], self._client_body
        before = self._before()
        headers = [(CARRY_HEADER, self._mode), (CONTINUES_HEADER, b"%d" % len(before))]
        return headers, before + self._client_body

    def move(self) -> None:
        """What it was asked of last gives no more: the next one is asked."""
        self._rest.clear()
        self._whole.clear()
        if self.is_over:
            self.is_over, self._num_told, self._name, self._num_name_bytes = False, 0, "", 0
        if self.has_begun:
            self.num_moves += 1

    def take(self, data: bytes, *, is_whole: bool) -> Taken:
        """Bytes of the answer, cut anywhere."""
        buffer: bytes | bytearray = data
        if self._rest:
            self._rest += data
            buffer = self._rest
        told: list[bytes] = []
        start, num_bytes, is_last, problem = 0, len(buffer), False, ""
        while not is_last and num_bytes - start >= LENGTH_BYTES:
            begin = start + LENGTH_BYTES
            end = begin + int.from_bytes(buffer[start:begin], "little")
            if end > num_bytes:
                if end - begin > MAX_PART_BYTES:
                    problem = f"a part of its answer has over {MAX_PART_BYTES} bytes"
                break
            start = end
            try:
                part = _decode(buffer[begin:end])
            except DECODE_ERRORS as error:
                problem = f"a part of its answer cannot be read: {error}"
                break
            if part.is_lost:
                problem = "its engine died"
                break
            told.append(part.told)
            is_last = part.is_last
            self._keep(part, is_whole=is_whole)
        if buffer is data:
            self._rest += data[start:]
        else:
            del self._rest[:start]
        if is_whole:
            self._whole += told
            told = []
        return Taken(b"".join(told), is_last, problem)

    def whole(self) -> tuple[int, Headers, bytes]:
        """Status, headers and body of a whole answer of which all came."""
        head = self._whole_head
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in head.headers.items()]
        return head.status, [header for header in headers if header[0] != b"content-length"], b"".join(self._whole)

    def _keep(self, part: CarriedPart, *, is_whole: bool) -> None:
        self._begun_at = part.begun_at
        if part.name != self._name:
            self._name, self._num_name_bytes = part.name, len(part.name.encode())
        num_bytes = len(self._pieces) + len(part.pieces) + self._num_name_bytes
        if self._num_pieces + part.num_pieces > MAX_PIECES or num_bytes > self._max_bytes:
            self.is_over = True
        if self.is_over:
            self._num_pieces = 0
            self._pieces.clear()
        elif part.num_pieces:
            self._num_pieces += part.num_pieces
            self._pieces += part.pieces
            self._num_told = 0
        elif part.told and not is_whole:
            self._num_told += 1
        if part.status:
            self._whole_head = part

    def _before(self) -> bytes:
        """A `CarriedBefore`, of pieces that are packed already."""
        pieces = msgspec.Raw(b"\xdd" + self._num_pieces.to_bytes(4, "big") + self._pieces)
        return _pack(CarriedBefore(pieces, self._begun_at, self._name, self.num_moves, self._num_told))  # type: ignore[arg-type]


def is_carried(answer: Head) -> bool:
    """Whether an answer is parts."""
    return answer.header(CARRIED_HEADER) != b""


def is_whole(answer: Head) -> bool:
    """Whether an answer that is parts is for a client who waits for all of it."""
    return answer.header(CARRIED_HEADER) == WHOLE
