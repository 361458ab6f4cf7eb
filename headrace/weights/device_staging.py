"""Moving tensors of an update into place on a device, many at a time and without waiting for it.

Owns `DeviceBatch`. Must not know sessions, versions or which memory is live, as `headrace.weights.staging`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import msgspec
import torch

from headrace.weights.memory import Copies, StageCopy, StagePiece
from headrace.weights.staging import Arrival, Enqueued, SideStream

MAX_BATCH = 256
"""Pieces whose copies are enqueued at once: some milliseconds' work for the host."""

_Pairs = tuple[list[torch.Tensor], list[torch.Tensor]]


class ArrivingPiece(msgspec.Struct, frozen=True):
    """A tensor, or a piece of it: its elements, flat, on the device or in pinned memory, and where they go.

    `on_done` is called once they are there and finite, if they are `checked`: `refuse` is what else is called.
    """

    source: torch.Tensor
    arrival: Arrival
    on_done: Callable[[], None]
    refuse: Callable[[torch.dtype], None] | None = None


class DeviceBatch:
    """The copy of many pieces, enqueued at once on a stream of its own; a `StageCopy`.

    Nothing is waited for: `advance` enqueues, and later looks whether the device has done it. What the pieces are read
    from must be left alone until then, also by who gives up. `before_write` raises if the update is over.
    """

    def __init__(self, pieces: Sequence[ArrivingPiece], side: SideStream, before_write: Callable[[], None]) -> None:
        self.has_written = False
        self.is_done = False
        self._pieces = pieces
        self._side = side
        self._before_write = before_write
        self._copied: Enqueued | None = None
        self._norms: torch.Tensor | None = None

    def advance(self, budget_s: float) -> bool:
        """True once all pieces are in place. Raises as `StageWork.advance`, when the device has come to it."""
        if self.is_done or not self._side.is_ready():
            return self.is_done
        if self._copied is None:
            self._before_write()
            with self._side.enqueuing():
                self._enqueue()
                self._copied = Enqueued(self._side.device)
        if self._copied.is_done():
            self._finish()
        return self.is_done

    def _enqueue(self) -> None:
        blocks = list[torch.Tensor]()
        by_kind: dict[tuple[torch.device, torch.dtype, torch.dtype], _Pairs] = {}
        for piece in self._pieces:
            arrival = piece.arrival
            block = arrival.destination.write_view(_place(piece))
            kind = piece.source.device, piece.source.dtype, block.dtype
            into, sources = by_kind.setdefault(kind, ([], []))
            into.append(block)
            sources.append(piece.source)
            blocks.append(block)
            self.has_written |= arrival.is_live
        for into, sources in by_kind.values():
            torch._foreach_copy_(into, sources, non_blocking=True)
        if any(piece.refuse for piece in self._pieces):
            greatest = [norm.float() for norm in torch._foreach_norm(blocks, math.inf)]
            is_pinned = self._side.device.type == "cuda"
            host = torch.empty(len(blocks), dtype=torch.float32, device="cpu", pin_memory=is_pinned)
            self._norms = host.copy_(torch.stack(greatest), non_blocking=True)
        for piece, block in zip(self._pieces, blocks, strict=True):
            place = _place(piece)
            piece.arrival.destination.write_back(place, block)
            for region, total in piece.arrival.sums:
                total.add(region.read_counted(place), place.start)

    def _finish(self) -> None:
        self._before_write()
        norms = [0.0] * len(self._pieces) if self._norms is None else self._norms.tolist()
        pieces, self._pieces = self._pieces, ()
        for piece, norm in zip(pieces, norms, strict=True):
            if piece.refuse is not None and not math.isfinite(norm):
                piece.refuse(piece.arrival.destination.dtype)
            piece.arrival.num_elements += piece.source.numel()
            piece.on_done()
        self.is_done = True


def in_batches(pieces: Iterator[StagePiece], stage: Callable[[Sequence[StagePiece]], StageCopy]) -> Copies:
    """`WeightMemory.stage_pieces` of a memory that takes many at once, of different tensors: the next piece of one can
    come only when the one before is there."""
    batch: dict[int, StagePiece] = {}
    for piece in pieces:
        if len(batch) == MAX_BATCH or piece.index in batch:
            yield _whole(batch), stage(list(batch.values()))
            batch = {}
        batch[piece.index] = piece
    if batch:
        yield _whole(batch), stage(list(batch.values()))


def _whole(batch: dict[int, StagePiece]) -> list[int]:
    return [index for index, piece in batch.items() if piece.is_last]


def _place(piece: ArrivingPiece) -> slice:
    return slice(piece.arrival.num_elements, piece.arrival.num_elements + piece.source.numel())
