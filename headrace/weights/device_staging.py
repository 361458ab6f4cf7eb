"""Moving tensors of an update into place on a device, many at a time and without waiting for it.

Owns `DeviceCopies`. Must not know sessions, versions or which memory is live, as `headrace.weights.staging`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from headrace.weights.memory import StagePiece
from headrace.weights.position_sum import PositionKeys, PositionSum
from headrace.weights.staging import Arrival, Enqueued, SideStream

SLICE_BYTES = 1 << 30
"""Copied by one launch: a fraction of a millisecond's work for a device, beside which a step does not wait long."""

MAX_SLICE_PIECES = 256
_MAX_AHEAD = 2  # slices that are enqueued and not done: the device goes on while the host looks at the first


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


class DeviceCopies:
    """The copies of all pieces of a command, enqueued in slices on a stream of its own; a `StageCopy`. `whole` are the
    indices of the tensors that it has completed.

    Nothing is waited for: `advance` enqueues, and later looks whether the device has done it. What the pieces are read
    from must be left alone until then, also by who gives up. `before_write` raises if the update is over.
    """

    def __init__(
        self,
        pieces: Iterator[StagePiece],
        arrive: Callable[[StagePiece], ArrivingPiece],
        side: SideStream,
        keys: PositionKeys,
        before_write: Callable[[], None],
    ) -> None:
        self.has_written = False
        self.whole: list[int] = []
        self._pieces = pieces
        self._next = next(pieces, None)
        self._arrive = arrive
        self._side = side
        self._keys = keys
        self._before_write = before_write
        self._under_way: deque[_Slice] = deque()

    def advance(self, budget_s: float) -> bool:
        """True once all pieces are in place. Raises as `StageWork.advance`, when the device has come to it."""
        if not self._side.is_ready():
            return False
        stop_at = time.perf_counter() + budget_s
        while self._next is not None or self._under_way:
            if self._under_way and self._under_way[0].copied.is_done():
                self._before_write()
                self.whole += self._under_way.popleft().finish()
            elif not self._enqueue():
                return False
            if time.perf_counter() >= stop_at:
                break
        return self._next is None and not self._under_way

    def _enqueue(self) -> bool:
        """The next slice. False where there is none, or what is under way comes first."""
        if self._next is None or len(self._under_way) == _MAX_AHEAD:
            return False
        busy = {index for each in self._under_way for index in each.arriving}
        part, num_bytes = _Slice(), 0
        while self._next is not None and num_bytes < SLICE_BYTES and len(part.arriving) < MAX_SLICE_PIECES:
            index = self._next.index
            if index in busy or index in part.arriving:
                break  # the next piece of a tensor can come only when the one before is there
            arriving = self._arrive(self._next)
            part.add(arriving, self._next)
            num_bytes += arriving.source.nbytes
            self._next = next(self._pieces, None)
        if not part.arriving:
            return False
        self._before_write()
        self.has_written |= any(piece.arrival.is_live for piece in part.arriving.values())
        with self._side.enqueuing():
            part.enqueue(self._keys)
            part.copied = Enqueued(self._side.device)
        self._under_way.append(part)
        return True


class _Slice:
    """Pieces of different tensors, by index, whose copies are enqueued together."""

    copied: Enqueued
    _results: torch.Tensor

    def __init__(self) -> None:
        self.arriving: dict[int, ArrivingPiece] = {}
        self._whole: list[int] = []
        self._sums: list[tuple[int, PositionSum]] = []

    def add(self, arriving: ArrivingPiece, piece: StagePiece) -> None:
        self.arriving[piece.index] = arriving
        if piece.is_last:
            self._whole.append(piece.index)

    def enqueue(self, keys: PositionKeys) -> None:
        """Copy all, and reckon what is to be known of them: a row of results for each piece, then further rows."""
        from headrace.kernels.triton.weight_pieces import UnitPiece, move_pieces

        moves, pairs = list[UnitPiece](), list[tuple[torch.Tensor, torch.Tensor]]()
        for piece in self.arriving.values():
            source, place, destination = piece.source, piece.place, piece.arrival.destination
            block = destination.write_view(place)
            is_alike = source.dtype == block.dtype and source.device == block.device
            if is_alike and destination.flat is not None:
                moves.append(UnitPiece(source, block, place.start))
            else:  # copied first, and only looked at then
                moves.append(UnitPiece(block, None, place.start))
                pairs.append((block, source))
        _copy(pairs)
        for row, piece in enumerate(self.arriving.values()):
            place, destination = piece.place, piece.arrival.destination
            destination.write_back(place, moves[row].source)
            for region, total in piece.arrival.sums:
                if region is destination and region.flat is not None:
                    self._sums.append((row, total))
                    continue
                self._sums.append((len(moves), total))
                moves.append(UnitPiece(region.read(place), None, place.start))
        found = move_pieces(moves, keys.words, sums=bool(self._sums))
        self._results = torch.empty(found.shape, dtype=found.dtype, device="cpu", pin_memory=found.is_cuda)
        self._results.copy_(found, non_blocking=True)

    def finish(self) -> list[int]:
        """The device has done it: the indices of the tensors that are whole."""
        results = self._results.tolist()
        for piece, (_, _, is_bad) in zip(self.arriving.values(), results, strict=False):
            if is_bad and piece.refuse is not None:
                piece.refuse(piece.arrival.destination.dtype)
        for row, total in self._sums:
            total.add_lanes(results[row])
        for piece in self.arriving.values():
            piece.arrival.num_elements += piece.source.numel()
            piece.on_done()
        return self._whole


def _copy(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Sources, of other dtypes or of the host, into what comes first in each pair."""
    if pairs:
        torch._foreach_copy_([into for into, _ in pairs], [source for _, source in pairs], non_blocking=True)
