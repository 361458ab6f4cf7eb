"""Tensors of an open update on their way into the memory of one rank. Owns what is done with each: where it goes, what
is reckoned of it, and whether it only has to be moved. Must not know which update comes next, or how bytes come here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeGuard

import msgspec
import torch

from headrace.types.errors import WeightUpdateError
from headrace.types.weights import BufferEntry, DeviceRef, TensorInfo
from headrace.weights.device_staging import DeviceCopies, Slices
from headrace.weights.memory import Copies, StageBuffer, StageCopy, StagePiece, one_by_one
from headrace.weights.move_plan import MovedSlices, MovePlan
from headrace.weights.piece_slices import ArrivingPiece, PieceSlices, WholeTarget
from headrace.weights.position_sum import DIGEST_LENGTH, PositionKeys, PositionSum
from headrace.weights.region import Place, Region
from headrace.weights.staging import (
    TORCH_DTYPES,
    Arrival,
    SideStream,
    StageWork,
    TensorData,
    as_bytes,
    is_finite,
    not_finite,
    source_of,
)
from headrace.weights.transaction import Transaction
from headrace.weights.weight_map import ManifestPlan, WeightMap


class Arriving:
    """What brings tensors of one update into place; `region_of` a name is its live memory."""

    def __init__(
        self,
        transaction: Transaction,
        weight_map: WeightMap,
        region_of: Callable[[str], Region],
        side: SideStream,
        keys: PositionKeys,
        *,
        check_finite: bool,
        on_device: bool,
    ) -> None:
        """`on_device`: what lies there already comes into place by launches that nobody waits for."""
        self._transaction = transaction
        self._aliases = weight_map.aliases
        self._region_of = region_of
        self._side, self._keys = side, keys
        self._check_finite, self._on_device = check_finite, on_device

    def one(self, index: int, data: memoryview | TensorData, start: int | None = None) -> StageCopy:
        """The work of moving manifest entry `index` into place.

        `data` is the whole tensor: contiguous bytes in the manifest's dtype, or a tensor of its dtype and shape. Or it
        is the next piece of its bytes, from `start` on: one at 0 begins the tensor, the last one completes it. Raises
        `WeightUpdateError` naming the tensor if it is not that, or cannot be read.
        """
        info = self._transaction.manifest[index]
        source = source_of(info, data, start)
        if self._lies_here(data):
            return self.all(iter([StagePiece(index, as_bytes(data.detach()), None, True, False)]))
        arrival = self._arriving(index, start)
        return StageWork(
            source,
            arrival,
            self._side,
            before_write=self._transaction.require_open,
            on_done=lambda: self._arrived(index, info, arrival),
            check=(lambda written: self._require_finite(info.name, written)) if self._check_finite else None,
        )

    def _lies_here(self, data: Any) -> TypeGuard[torch.Tensor]:
        """Launches can move it: they read memory as it lies."""
        if not (self._on_device and isinstance(data, torch.Tensor) and data.device == self._side.device):
            return False
        return data.is_contiguous() and data.numel() > 0

    def all(self, pieces: Iterator[StagePiece]) -> DeviceCopies:
        """The work of moving pieces into place on a device."""

        def target(piece: StagePiece) -> WholeTarget | None:
            is_here = piece.start is None and piece.data.device == self._side.device
            return self._target(piece.index) if is_here else None

        return self._copies(PieceSlices(pieces, target, self._arriving_piece))

    def arrived(self, tensors: Sequence[StagePiece]) -> Copies:
        """The work of moving whole tensors into place, of which each is as `one` takes it: those that lie on the device
        together."""
        here, others = list[StagePiece](), list[StagePiece]()
        for piece in tensors:
            if self._lies_here(piece.data):
                here.append(msgspec.structs.replace(piece, data=as_bytes(piece.data.detach())))
            else:
                others.append(piece)
        if here:
            yield from together(lambda: self.all(iter(here)))
        yield from one_by_one(self.one, iter(others))

    def moved(self, plan: MovePlan, buffer: StageBuffer) -> Copies:
        """The work of a command of which a plan knows everything."""
        yield from together(lambda: self._copies(MovedSlices(plan, buffer)))

    def move_plan(self, manifest: ManifestPlan, entries: Sequence[BufferEntry], ref: DeviceRef) -> MovePlan | None:
        """Of a command of whole tensors, if none of them is to be replaced, or anything but moved."""
        targets: list[Place] = []
        for entry in entries:
            num_bytes = self._transaction.manifest[entry.index].num_bytes
            is_whole = not (entry.start or entry.replaces) and entry.num_bytes in (None, num_bytes)
            target = self._target(entry.index) if is_whole and num_bytes else None
            if target is None:
                return None
            targets.append(target.place)
        plan = MovePlan(manifest, entries, ref, targets)
        return plan if plan.is_inside else None

    @property
    def writes_live(self) -> bool:
        """Whole tensors go where live ones are, and no part of one is there yet."""
        return self._transaction.mode == "inplace" and not self._transaction.arrivals

    def _copies(self, slices: Slices) -> DeviceCopies:
        transaction = self._transaction
        take = partial(transaction.take_moved, check_finite=self._check_finite)
        are_digests = transaction.has_digests
        return DeviceCopies(slices, take, self._side, self._keys, transaction.require_open, are_digests=are_digests)

    def _target(self, index: int) -> WholeTarget | None:
        name = self._transaction.manifest[index].name
        return None if name in self._aliases else self._transaction.whole_target(index, self._region_of(name))

    def _arriving_piece(self, piece: StagePiece) -> ArrivingPiece:
        info = self._transaction.manifest[piece.index]
        arrival = self._arriving(piece.index, piece.start)

        def refuse(dtype: torch.dtype) -> None:
            raise WeightUpdateError(not_finite(info.name, dtype), field=info.name)

        return ArrivingPiece(
            piece.data.view(TORCH_DTYPES[info.dtype]),
            arrival,
            lambda: self._arrived(piece.index, info, arrival),
            refuse if self._check_finite else None,
        )

    def _arriving(self, index: int, start: int | None) -> Arrival:
        """The tensor that a piece at byte `start` is of, begun anew by its first."""
        info = self._transaction.manifest[index]
        arrival = self._transaction.arrivals.pop(index, None)  # one that is never done leaves a tensor to begin again
        if not start:
            return self._arrival(info)
        if arrival is None or arrival.num_elements * TORCH_DTYPES[info.dtype].itemsize != start:
            raise WeightUpdateError(f"{info.name}: a piece at byte {start} is not the next one", field=info.name)
        return arrival

    def _arrival(self, info: TensorInfo) -> Arrival:
        transaction, destination = self._transaction, self._destination(info.name)
        is_live = transaction.mode == "inplace" and info.name not in self._aliases
        is_summed = info.name in transaction.compared or len(info.digest) == DIGEST_LENGTH
        summed = [destination] if is_summed else []
        if self._tied_live(info.name):  # owns no memory: its destination is scratch
            summed.append(self._region_of(info.name))
        sums = [(region, PositionSum(self._keys)) for region in summed]
        return Arrival(destination, sums, is_live=is_live, hashes=len(info.digest) > DIGEST_LENGTH)

    def _tied_live(self, name: str) -> str:
        """What `name` has to equal as it is live, since it is not sent as well; else ""."""
        target = self._aliases.get(name, "")
        return "" if target in self._transaction.names else target

    def _arrived(self, index: int, info: TensorInfo, arrival: Arrival) -> None:
        if not arrival.is_whole:
            self._transaction.arrivals[index] = arrival
            return
        target = self._tied_live(info.name)
        if target:
            self._transaction.totals[target] = arrival.sums[-1][1].hexdigest()
        self._transaction.finish(info, arrival)

    def _require_finite(self, name: str, written: torch.Tensor) -> None:
        if not is_finite(written):
            raise WeightUpdateError(not_finite(name, written.dtype), field=name)

    def _destination(self, name: str) -> Region:
        live = self._region_of(name)
        if name in self._aliases:  # owns no memory: converted into scratch, to be compared and forgotten
            with self._side.enqueuing():
                return live.over([torch.empty_like(each) for each in live.memories])
        return live.over(self._transaction.shadow[name]) if self._transaction.mode == "shadow" else live


def together(make: Callable[[], DeviceCopies]) -> Copies:
    """Copies of many pieces as one, made when it begins."""
    copies = make()
    yield copies.whole, copies
