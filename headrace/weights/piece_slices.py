"""Slices of what arrives piece by piece on a device. Owns what one launch does with them: moving those that are only to
be moved, converting and putting the others in order, and what is reckoned of both.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from headrace.weights.device_staging import Take, read_back
from headrace.weights.memory import StagePiece
from headrace.weights.position_sum import PositionKeys, PositionSum
from headrace.weights.region import Place
from headrace.weights.staging import Arrival, Enqueued, bytes_of, row_blocks

SLICE_BYTES = 1 << 30
"""Copied by one launch: a fraction of a millisecond's work for a device, beside which a step does not wait long."""

LIVE_SLICE_BYTES = 2 << 30
"""The same where live weights are written to, and no step runs."""

MAX_SLICE_PIECES = 256


class ArrivingPiece(NamedTuple):
    """A tensor, or a piece of it: its elements, flat, on the device or in pinned memory, and where they go.

    `on_done` is called once they are there and finite, if they are to be: `refuse` is what else is called.
    """

    source: torch.Tensor
    arrival: Arrival
    on_done: Callable[[], None]
    refuse: Callable[[torch.dtype], None] | None = None

    @property
    def place(self) -> slice:
        """Which elements of its tensor they are."""
        return slice(self.arrival.num_elements, self.arrival.num_elements + self.source.numel())

    @property
    def is_read_in_part(self) -> bool:
        """It is a whole tensor where the device reads it, of which no more is read than is held here."""
        destination = self.arrival.destination
        is_whole = self.source.numel() == destination.num_elements and self.arrival.hasher is None
        return is_whole and destination.flat is None and self.source.device == destination.device


class WholeTarget(NamedTuple):
    """Where a tensor goes that comes whole, on the device and in the dtype of a parameter, and lies there in its own
    order: nothing is to be known of it but its bytes."""

    place: Place
    is_live: bool


class PieceSlices:
    """Slices of pieces that are looked at one by one. One has a `target`, if it is a whole tensor that is only to be
    moved: then it has a row of results. Else it is to `arrive`."""

    def __init__(
        self,
        pieces: Iterator[StagePiece],
        target: Callable[[StagePiece], WholeTarget | None],
        arrive: Callable[[StagePiece], ArrivingPiece],
    ) -> None:
        self._pieces = pieces
        self._next = next(pieces, None)
        self._target, self._arrive = target, arrive

    @property
    def is_empty(self) -> bool:
        """No piece is left."""
        return self._next is None

    def next(self, busy: Collection[int]) -> PieceSlice | None:
        """As many as are copied at once. The next piece of a tensor can come only when the one before is there."""
        part = PieceSlice()
        while (piece := self._next) is not None and not part.is_full:
            target = self._target(piece)
            if target is not None:
                part.add_whole(piece, target)
            elif piece.index in busy or piece.index in part.arriving:
                break
            else:
                part.add(self._arrive(piece), piece)
            self._next = next(self._pieces, None)
        return part if part.num_pieces else None


class PieceSlice:
    """Pieces of different tensors, by index, whose copies are enqueued together."""

    copied: Enqueued
    _are_digests: bool
    _results: torch.Tensor

    def __init__(self) -> None:
        self.is_live = False
        self.num_pieces, self._num_bytes = 0, 0
        self.arriving: dict[int, ArrivingPiece] = {}
        self._whole: list[int] = []
        self._moved: list[tuple[StagePiece, WholeTarget]] = []
        self._addresses: list[int] = []  # of what is moved
        self._checks: list[tuple[int, ArrivingPiece]] = []
        self._unhashed: deque[tuple[Any, torch.Tensor]] = deque()
        self._sums: list[tuple[int, PositionSum, int]] = []

    def add_whole(self, piece: StagePiece, target: WholeTarget) -> None:
        """One that is only moved: it has a row of results."""
        self._moved.append((piece, target))
        self._count(piece, is_live=target.is_live)

    def add(self, arriving: ArrivingPiece, piece: StagePiece) -> None:
        self.arriving[piece.index] = arriving
        self._count(piece, is_live=arriving.arrival.is_live)
        if piece.is_last:
            self._whole.append(piece.index)

    def _count(self, piece: StagePiece, *, is_live: bool) -> None:
        self.num_pieces += 1
        self._num_bytes += piece.data.nbytes
        self.is_live = self.is_live or is_live

    @property
    def is_full(self) -> bool:
        """What is still to come is for the next."""
        limit = LIVE_SLICE_BYTES if self.is_live else SLICE_BYTES
        return self._num_bytes >= limit or self.num_pieces >= MAX_SLICE_PIECES

    def locate(self) -> None:
        """The last first: who maps is woken for once, not for each."""
        self._addresses = [piece.data.data_ptr() for piece, _ in reversed(self._moved)][::-1]

    def enqueue(self, keys: PositionKeys, *, are_digests: bool) -> None:
        """Copy all, and reckon what is to be known of them: a row of results for each that is moved, then others."""
        from headrace.kernels.triton.weight_pieces import Row, move_rows, row_of

        moved = zip(self._addresses, self._moved, strict=True)
        rows: list[Row] = [(address, *target.place) for address, (_, target) in moved]
        pairs, blocks = list[tuple[torch.Tensor, torch.Tensor]](), list[torch.Tensor]()
        copied: list[tuple[int, ArrivingPiece, torch.Tensor]] = []
        for piece in self.arriving.values():
            source, place, destination = piece.source, piece.place, piece.arrival.destination
            if piece.is_read_in_part:
                destination.write_back(place, source)
                held = [memory.reshape(-1) for memory in destination.memories]
                self._checks += ((row, piece) for row in range(len(rows), len(rows) + len(held)))
                rows += (row_of(memory, None, 0) for memory in held)
                blocks += held  # until it is enqueued
                copied.append((-1, piece, source))
                continue
            block = destination.write_view(place)
            self._checks.append((len(rows), piece))
            copied.append((len(rows), piece, block))
            if (hasher := piece.arrival.hasher) is not None:
                self._unhashed += ((hasher, block[part]) for part in row_blocks(tuple(block.shape), block.itemsize))
            is_alike = source.dtype == block.dtype and source.device == block.device
            if is_alike and destination.flat is not None:
                rows.append(row_of(source, block, place.start))
            else:  # copied first, and only looked at then
                rows.append(row_of(block, None, place.start))
                pairs.append((block, source))
        _copy(pairs)
        for row, piece, block in copied:
            place, destination = piece.place, piece.arrival.destination
            if row >= 0:
                destination.write_back(place, block)
            for region, total in piece.arrival.sums:
                if region is destination and region.is_plain:
                    self._sums.append((row, total, 1))
                    continue
                for counted, times in region.counted(place):
                    blocks.append(counted)  # held until it is enqueued
                    self._sums.append((len(rows), total, times))
                    rows.append(row_of(counted, None, place.start))
        found = move_rows(rows, keys.words, sums=are_digests or bool(self._sums))
        self._are_digests = are_digests
        self._results = read_back(found)

    def hash(self, stop_at: float) -> bool:
        """Look at what SHA-256s are wanted of."""
        while self._unhashed:
            hasher, block = self._unhashed.popleft()
            hasher.update(bytes_of(block).data)
            if time.perf_counter() >= stop_at:
                break
        return not self._unhashed

    def finish(self, take: Take) -> list[int]:
        results = self._results.tolist()
        for (moved, _), result in zip(self._moved, results, strict=False):
            if self._are_digests or result[2]:
                take(moved.index, result)
        for row, piece in self._checks:
            if results[row][2] and piece.refuse is not None:
                piece.refuse(piece.arrival.destination.dtype)
        for row, total, times in self._sums:
            total.add_lanes(results[row], times)
        for piece in self.arriving.values():
            piece.arrival.num_elements += piece.source.numel()
            piece.on_done()
        return [moved.index for moved, _ in self._moved] + self._whole


def _copy(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Sources, of other dtypes or of the host, into what comes first in each pair."""
    if pairs:
        torch._foreach_copy_([into for into, _ in pairs], [source for _, source in pairs], non_blocking=True)
