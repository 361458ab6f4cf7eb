"""What a router and a replica tell each other of a call that is to go on elsewhere when the replica dies.

The router asks for it (`CARRY_HEADER`). The answer is then parts, each behind its length (`types.http.framed`): the
bytes that the client is to have, and the pieces of samples of which they tell. The router keeps the pieces, and has
another replica go on from them by the client's own request behind a `CarriedBefore` (`CONTINUES_HEADER`). Neither reads
what the client's dialect makes of them. No I/O.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from headrace.types.generation import Generation

CARRY_HEADER = b"x-headrace-carry"
"""Of a request: "streams" has those carried, "all" whole answers too."""
CONTINUES_HEADER = b"x-headrace-continues"
"""Of a request: so many bytes of its body are a `CarriedBefore`; the client's body follows them."""
MAX_PIECES = 1 << 18
"""Of one call: each is a token's, and costs whoever reads them a kilobyte meanwhile."""
CARRIED_HEADER = b"x-headrace-carried"
"""Of an answer that is parts: "stream" or "whole"."""
STREAM, WHOLE = b"stream", b"whole"


_LATEST = 1e11  # seconds since the epoch
_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 32)]


class PackedGeneration(Generation, frozen=True, kw_only=True, array_like=True):
    """The same as an array: a sixth of the bytes."""


Piece = tuple[int, PackedGeneration]
"""The number of a sample among those of its call, and what is new about it."""


class CarriedPart(msgspec.Struct, frozen=True, array_like=True):
    """A part of the answer.

    told        what the client gets
    num_pieces  of how many pieces that tells
    pieces      these, packed one behind the other
    status      of a whole answer: its own, with its first bytes
    headers     of a whole answer, with its status
    is_lost     the engine cannot go on, and another might: what is told is for a client that is left alone with it
    is_last     nothing follows
    begun_at    when the call began, in seconds since the epoch
    name        what the call is named, where its dialect names calls
    """

    told: bytes = b""
    num_pieces: int = 0
    pieces: bytes = b""
    status: int = 0
    headers: dict[str, str] = {}
    is_lost: bool = False
    is_last: bool = False
    begun_at: float = 0.0
    name: str = ""


class CarriedBefore(msgspec.Struct, frozen=True, array_like=True):
    """What the replicas before have made of a call.

    pieces      in the order in which they came, each a `Piece`, packed; at most `MAX_PIECES`
    begun_at, name   as in `CarriedPart`, of the first one
    num_moves   how often it has gone on elsewhere, this time included
    num_told    how many parts without pieces were told behind the last piece
    """

    pieces: Annotated[list[msgspec.Raw], msgspec.Meta(max_length=MAX_PIECES)]
    begun_at: Annotated[float, msgspec.Meta(ge=0.0, le=_LATEST)]
    name: str
    num_moves: _Count
    num_told: _Count
