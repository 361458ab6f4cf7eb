"""Calls that a router has carried, so that they go on elsewhere when this replica dies (`types/carried.py`). Owns how
an answer becomes parts, and what of a call was made before.

Every face asks its request for a `Carriage`; that of a call which nobody carries does nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.engine import GenerateItem, Stream
from headrace.engine.continuing import FIELD, checked, joined
from headrace.engine.stream import StreamGroup
from headrace.ipc.codec import DECODE_ERRORS
from headrace.server.errors import body_of, respond
from headrace.text import run_sized
from headrace.types.carried import (
    CARRIED_HEADER,
    CARRY_HEADER,
    CONTINUES_HEADER,
    STREAM,
    WHOLE,
    CarriedBefore,
    CarriedPart,
    Piece,
)
from headrace.types.errors import HeadraceError, PauseTimeoutError, RequestError, UnavailableError
from headrace.types.generation import Generation
from headrace.types.http import framed

_SCOPE_KEY = "headrace.carriage"
_CARRIES_ALL = b"all"
_NO_LENGTH = (b"content-length",)

_pack = msgspec.msgpack.Encoder().encode
_decode_before = msgspec.msgpack.Decoder(CarriedBefore).decode
_decode_piece = msgspec.msgpack.Decoder(Piece).decode


class Pieces(Protocol):
    """Where a face has the pieces of a streamed answer from."""

    async def next_pieces(self) -> list[Generation]:
        """As of `StreamGroup`."""
        ...


class Carriage:
    """Of a call that is answered to its client, and not carried."""

    num_moves = 0
    """How often the call has gone on elsewhere."""
    is_carried = False
    """What is answered is to become parts."""

    @property
    def begun_at(self) -> float:
        """When the call began, in seconds since the epoch."""
        return time.time()

    def named(self, name: str) -> str:
        """The name that the call goes by: the one that it had before, else `name`."""
        return name

    def item(self, number: int, item: GenerateItem) -> GenerateItem:
        """What to ask for as sample `number` of the call. Raises `RequestError`."""
        return item

    def reading(self, group: StreamGroup, streams: Sequence[Stream]) -> Pieces:
        """`group`, of which the face makes its events."""
        return group

    async def follow(self, group: Callable[[], StreamGroup], streams: Sequence[Stream]) -> None:
        """Wait until all samples of a whole answer are there, if what is made of them is to be told meanwhile. Raises
        the error of one."""

    def note_failure(self, error: HeadraceError) -> None:
        """The stream ends with this."""


_PLAIN = Carriage()


def carriage_of(scope: Scope) -> Carriage:
    """That of a request."""
    found: Carriage = scope.get(_SCOPE_KEY, _PLAIN)
    return found


class CarriedCall(Carriage):
    """One answer on its way to a router."""

    is_carried = True

    def __init__(self, send: Send, *, carries_all: bool, before: _Before | None) -> None:
        self._send = send
        self._carries_all = carries_all
        self._begun_at = time.time() if before is None else before.begun_at
        self._name = "" if before is None else before.name
        self._num_to_skip = 0 if before is None else before.num_told
        self.num_moves = 0 if before is None else before.num_moves
        self._samples = {} if before is None else before.samples
        self._kind = b""
        self._has_begun = False
        self._is_repeating = False
        self._is_lost = False
        self._told: list[bytes] = []
        """Of pieces that no part has told of yet: these, packed."""
        self._head = CarriedPart()
        self._numbers: dict[tuple[str, int], int] = {}

    @property
    def begun_at(self) -> float:
        """See `Carriage`."""
        return self._begun_at

    def named(self, name: str) -> str:
        """See `Carriage`."""
        self._name = self._name or name
        return self._name

    def item(self, number: int, item: GenerateItem) -> GenerateItem:
        """See `Carriage`."""
        self._kind = self._kind or (STREAM if item.stream else WHOLE if self._carries_all else b"")
        before = self._samples.get(number)
        if before is not None:
            return msgspec.structs.replace(item, request_id=before.request_id, before=before, stream=True)
        return msgspec.structs.replace(item, stream=True) if self._kind else item

    def reading(self, group: StreamGroup, streams: Sequence[Stream]) -> Pieces:
        """See `Carriage`."""
        for number, stream in enumerate(streams):
            self._numbers[stream.request.request_id, stream.item.index] = number
        return _Noted(group, self)

    async def follow(self, group: Callable[[], StreamGroup], streams: Sequence[Stream]) -> None:
        """See `Carriage`."""
        if self._kind != WHOLE:
            return
        pieces = self.reading(group(), streams)
        while await pieces.next_pieces():
            if not self._is_repeating:
                await self._send_part(b"")
        if not self._has_begun:  # all of it was there before
            await self._send_part(b"")

    def note_failure(self, error: HeadraceError) -> None:
        """See `Carriage`."""
        is_of_engine = isinstance(error, UnavailableError) and not isinstance(error, PauseTimeoutError)
        self._is_lost = self._is_lost or (is_of_engine and error.retryable)

    def note(self, pieces: list[Generation], *, are_before: bool) -> None:
        """The face gets these."""
        self._is_repeating = are_before
        if are_before:
            return
        for piece in pieces:
            if piece.error is not None:
                self.note_failure(piece.error.to_exception())
            number = self._numbers[piece.request_id, piece.index]
            self._told.append(_pack((number, msgspec.structs.astuple(piece))))

    async def flush(self) -> None:
        """Say which pieces there were though nothing was told of them, as of a tool's call that is not whole."""
        if self._told and self._has_begun and self._kind == STREAM:
            await self._send_part(b"")

    async def send(self, message: Message) -> None:
        """What the application answers, as parts where it is to be carried."""
        if message["type"] == "http.response.start":
            await self._start(message)
        elif not self._has_begun:
            await self._send(message)
        else:
            await self._send_part(message["body"], is_last=not message.get("more_body", False))

    async def _start(self, message: Message) -> None:
        if self._has_begun:  # of a whole answer, behind its pieces
            headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in message["headers"]}
            self._head = CarriedPart(status=message["status"], headers=headers)
        elif self._kind == STREAM and message["status"] == 200:
            await self._begin(message["headers"])
        else:
            await self._send(message)

    async def _begin(self, headers: Collection[tuple[bytes, bytes]]) -> None:
        self._has_begun = True
        headers = [header for header in headers if header[0] not in _NO_LENGTH]
        headers.append((CARRIED_HEADER, self._kind))
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _send_part(self, told: bytes, *, is_last: bool = False) -> None:
        if not self._has_begun:
            await self._begin(())
        head, self._head = self._head, CarriedPart()
        pieces, self._told = self._told, []
        if self._is_repeating and self._kind == STREAM:
            told = b""  # the client has it
        elif told and not pieces and self._num_to_skip:
            self._num_to_skip, told = self._num_to_skip - 1, b""
        part = msgspec.structs.replace(
            head,
            told=told,
            num_pieces=len(pieces),
            pieces=b"".join(pieces),
            is_lost=self._is_lost,
            is_last=is_last,
            begun_at=self._begun_at,
            name=self._name,
        )
        await self._send({"type": "http.response.body", "body": framed(_pack(part)), "more_body": not is_last})


class _Noted:
    """A group of which the carriage sees what the face gets."""

    def __init__(self, group: StreamGroup, call: CarriedCall) -> None:
        self._group = group
        self._call = call

    async def next_pieces(self) -> list[Generation]:
        """As of `StreamGroup`."""
        await self._call.flush()
        are_before = self._group.has_before
        pieces = await self._group.next_pieces()
        self._call.note(pieces, are_before=are_before)
        return pieces


class Carrier:
    """ASGI middleware: answers of `paths` as parts, to a router that wants them."""

    def __init__(self, app: ASGIApp, paths: Collection[str]) -> None:
        self._app = app
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in self._paths:
            await self._app(scope, receive, send)
            return
        asked = {name: value for name, value in scope["headers"] if name in (CARRY_HEADER, CONTINUES_HEADER)}
        if CARRY_HEADER not in asked:
            await self._app(scope, receive, send)
            return
        before = None
        try:
            if CONTINUES_HEADER in asked:
                before, receive = await _split(scope, receive, asked[CONTINUES_HEADER])
            call = CarriedCall(send, carries_all=asked[CARRY_HEADER] == _CARRIES_ALL, before=before)
        except HeadraceError as error:
            await respond(body_of(error))(scope, receive, send)
            return
        await self._app({**scope, _SCOPE_KEY: call}, receive, call.send)


class _Before(NamedTuple):
    """As in `CarriedBefore`, with what there is of each sample, by its number."""

    begun_at: float
    name: str
    num_moves: int
    num_told: int
    samples: dict[int, Generation]


async def _split(scope: Scope, receive: Receive, size: bytes) -> tuple[_Before, Receive]:
    """What a body begins with, and the body behind it. Raises `RequestError`. Read as `read_body` reads huge ones: all
    other streams go on."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        body += message.get("body", b"")
        more = message.get("more_body", False)
    num_bytes = int(size) if size.isdigit() and len(size) < 12 else len(body) + 1
    async with scope["app"].state.server.huge_bodies:
        before = await run_sized(len(body), lambda: _read(memoryview(body)[:num_bytes]))
    rest = [{"type": "http.request", "body": bytes(body[num_bytes:]), "more_body": False}]

    async def receive_rest() -> Message:
        return rest.pop() if rest else await receive()

    return before, receive_rest


def _read(raw: memoryview) -> _Before:
    try:
        before = _decode_before(raw)
        found: dict[int, list[Generation]] = {}
        for each in before.pieces:  # one by one: a call of the decoder keeps the interpreter
            number, piece = _decode_piece(each)
            found.setdefault(number, []).append(checked(piece))
    except DECODE_ERRORS as error:
        raise RequestError(f"{FIELD}: the call cannot go on from this: {error}", field=FIELD) from None
    samples = {number: Generation(**msgspec.structs.asdict(joined(pieces))) for number, pieces in found.items()}
    return _Before(before.begun_at, before.name, before.num_moves, before.num_told, samples)
