"""Stage commands of whole tensors that are only to be moved over live weights: all that is done for each, worked out
once and good for every later command that names the same bytes. A trainer sends the same with every update.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from headrace.types.weights import BufferEntry, DeviceRef
from headrace.weights.device_staging import Take, read_back
from headrace.weights.memory import StageBuffer
from headrace.weights.piece_slices import LIVE_SLICE_BYTES, MAX_SLICE_PIECES
from headrace.weights.position_sum import PositionKeys
from headrace.weights.region import Place
from headrace.weights.staging import Enqueued
from headrace.weights.weight_map import ManifestPlan

Numbers = npt.NDArray[np.int64]


class MovePlan:
    """Where each tensor of a command is, as an area and an offset into it, and where it goes: P tensors.

    Good for the `manifest` it was made for, and areas of the same sizes, wherever those are.
    """

    def __init__(
        self,
        manifest: ManifestPlan | None = None,
        entries: Sequence[BufferEntry] = (),
        ref: DeviceRef | None = None,
        targets: Sequence[Place] = (),
    ) -> None:
        """`targets` are the live places of the entries, which begin inside `ref` and have bytes. Without a manifest it
        fits none."""
        self._manifest, self._entries, self._sizes = manifest, tuple(entries), _sizes(ref)
        self.indices = [entry.index for entry in entries]
        ends = list(accumulate(self._sizes, initial=0))
        self.starts = ends[:-1]  # of the areas, counted through all
        offsets_P = np.array([entry.offset for entry in entries], dtype=np.int64)
        self.areas_P: Numbers = np.searchsorted(ends[1:], offsets_P, side="right").astype(np.int64)
        self.offsets_P: Numbers = offsets_P - np.array(self.starts, dtype=np.int64)[self.areas_P]
        self.targets_P5: Numbers = np.array(targets, dtype=np.int64).reshape(-1, 5)
        sizes_P = self.targets_P5[:, 2] * self.targets_P5[:, 4]
        self.parts = list(_parts(sizes_P.tolist()))
        self.is_inside = bool((offsets_P + sizes_P <= np.array(ends)[self.areas_P + 1]).all())
        """Each tensor is inside one area."""

    def fits(self, manifest: ManifestPlan, entries: Sequence[BufferEntry], ref: DeviceRef) -> bool:
        """Whether these are moved by it too."""
        is_alike = manifest is self._manifest and len(entries) == len(self._entries)
        return is_alike and tuple(entries) == self._entries and _sizes(ref) == self._sizes


class MovedSlices:
    """All tensors of a plan, which are in this buffer."""

    def __init__(self, plan: MovePlan, buffer: StageBuffer) -> None:
        self._plan, self._buffer = plan, buffer
        self._next = 0

    @property
    def is_empty(self) -> bool:
        """No slice is left."""
        return self._next == len(self._plan.parts)

    def next(self, busy: Collection[int]) -> MovedSlice:
        """The next one."""
        self._next += 1
        return MovedSlice(self._plan, self._plan.parts[self._next - 1], self._buffer)


class MovedSlice:
    """Tensors `part` of a plan."""

    is_live = True
    arriving: Collection[int] = ()
    copied: Enqueued
    _are_digests: bool
    _results: torch.Tensor

    def __init__(self, plan: MovePlan, part: slice, buffer: StageBuffer) -> None:
        self._plan, self._part, self._buffer = plan, part, buffer
        self._addresses_P = np.empty(0, dtype=np.int64)

    def locate(self) -> None:
        """The last area first: who maps is woken for once, not for each."""
        areas_P = self._plan.areas_P[self._part]
        areas, place_of = np.unique(areas_P, return_inverse=True)
        starts = [self._plan.starts[area] for area in areas.tolist()]
        bases = [self._buffer.part(start, 0).data_ptr() for start in reversed(starts)][::-1]
        self._addresses_P = np.array(bases, dtype=np.int64)[place_of] + self._plan.offsets_P[self._part]

    def enqueue(self, keys: PositionKeys, *, are_digests: bool) -> None:
        """One row of results for each."""
        from headrace.kernels.triton.weight_pieces import move_rows

        rows = np.column_stack((self._addresses_P, self._plan.targets_P5[self._part]))
        found = move_rows(rows, keys.words, sums=are_digests)
        self._are_digests = are_digests
        self._results = read_back(found)

    def hash(self, stop_at: float) -> bool:
        """There is no more to be done."""
        return True

    def finish(self, take: Take) -> list[int]:
        results, indices = self._results.numpy(), self._plan.indices[self._part]
        for row in range(len(indices)) if self._are_digests else results[:, 2].nonzero()[0].tolist():
            take(indices[row], results[row].tolist())
        return indices


def _sizes(ref: DeviceRef | None) -> list[int]:
    return [] if ref is None else [area.size for area in ref.areas]


def _parts(sizes: Sequence[int]) -> Iterator[slice]:
    """As many tensors of so many bytes as are moved by one launch, and so on."""
    start = num_bytes = 0
    for number, size in enumerate(sizes, 1):
        num_bytes += size
        if num_bytes >= LIVE_SLICE_BYTES or number - start == MAX_SLICE_PIECES or number == len(sizes):
            yield slice(start, number)
            start, num_bytes = number, 0
