"""What a weight transaction asks of memory, as protocols: buffers to stage from, copies in slices, tickets. No tensors.

`headrace.weights.store` is the memory of one device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import msgspec

from headrace.types.weights import BufferEntry, BufferRef, DeviceRef, TensorInfo, UpdateMode

ResolvedMode = Literal["shadow", "inplace"]


class Ticket(Protocol):
    """Work of the memory that was asked for and may go on; see `headrace.weights.staging.Enqueued`."""

    def is_done(self) -> bool: ...


class StageCopy(Protocol):
    """The copy of one tensor, or a piece of it, into place, in slices; see `headrace.weights.staging.StageWork`."""

    has_written: bool

    def advance(self, budget_s: float) -> bool: ...


class StageBuffer(Protocol):
    """What tensors are staged from; see `headrace.weights.stage_buffers`. `close` when nothing reads it any more."""

    def part(self, offset: int, size: int) -> Any: ...

    def close(self) -> None: ...


class SharedTensors(Protocol):
    """Tensors in memory of somebody else, by name, until it is closed; see `headrace.weights.foreign_memory`."""

    tensors: list[tuple[str, Any]]

    def close(self) -> None: ...


class StagePiece(msgspec.Struct, frozen=True):
    """A tensor, or what of it begins at byte `start`, in a buffer. `is_last`: the tensor is whole with it."""

    index: int
    data: Any
    start: int | None
    is_last: bool
    replaces: bool


Copies = Iterator[tuple[Sequence[int], StageCopy] | None]
"""Copies to be done one after the other, each with the tensors that are whole then; None: the next has not come."""


class WeightMemory(Protocol):
    """The memory of an update; see `headrace.weights.store.WeightStore`. Tensors are opaque here.

    `device_ids` are the UUIDs of the devices whose memory it is copied from where that lies, its own first; none where
    it is a CPU's.
    """

    @property
    def device_ids(self) -> tuple[str, ...]: ...

    def open_buffer(self, ref: BufferRef | DeviceRef) -> StageBuffer: ...

    def begin(self, manifest: Sequence[TensorInfo], mode: UpdateMode, partial: bool) -> ResolvedMode: ...

    def begin_open(self, mode: UpdateMode, partial: bool) -> ResolvedMode: ...

    def extend(self, manifest: Sequence[TensorInfo]) -> int: ...

    def missing(self) -> list[str]: ...

    def stage(self, index: int, data: Any, start: int | None = None) -> StageCopy: ...

    def stage_pieces(self, pieces: Iterator[StagePiece]) -> Copies: ...

    def stage_arrived(self, tensors: Sequence[StagePiece]) -> Copies: ...

    def moves(
        self, entries: Sequence[BufferEntry], ref: BufferRef | DeviceRef, *, are_right: bool
    ) -> Callable[[StageBuffer], Copies] | None: ...

    def forget(self, index: int) -> list[int]: ...

    def commit(self) -> Ticket: ...

    def abort(self) -> None: ...


def one_by_one(stage: Callable[[int, Any, int | None], StageCopy], pieces: Iterator[StagePiece]) -> Copies:
    """`WeightMemory.stage_pieces` of a memory that takes a piece at a time."""
    for piece in pieces:
        yield (piece.index,) if piece.is_last else (), stage(piece.index, piece.data, piece.start)
