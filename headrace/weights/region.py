"""Where one tensor is in memory. Owns the way between its elements in Hugging Face order and the boxes of parameters
that they fill. Must not know names, updates or which memory is live."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch

from headrace.weights.boxes import Box, boxes_of_range, cut_axis, runs_of
from headrace.weights.weight_map import Piece

MIN_GAP_BYTES = 4096
"""Between two runs of a tensor that are read one by one: reading over less costs no more than another call."""

_Parts = list[tuple[Box, torch.Tensor]]


Place = tuple[int, ...]
"""Memory as a kernel that moves rows is told of it."""


def place_in(memory: torch.Tensor) -> Place:
    """All of memory that is flat and contiguous."""
    from headrace.kernels.triton.weight_pieces import target_of

    return target_of(memory)


class Region:
    """A tensor of `shape`, of which each piece is in a memory of its own, `memories[i]` of the shape of its target box.

    Its elements are counted in row-major order of the Hugging Face tensor. What no piece holds is not stored, and reads
    as zero.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        pieces: Sequence[Piece],
        memories: Sequence[torch.Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shape = shape
        self.memories = memories
        self._pieces = pieces
        self.dtype, self.device = dtype, device
        self.num_elements = torch.Size(shape).numel()
        held = zip(pieces, memories, strict=True)
        self._parts = [(piece.source, _as_source(piece, memory)) for piece, memory in held]
        self._times = [piece.times for piece in pieces]
        self._several_times = sorted(set(self._times))
        is_flat = bool(pieces) and pieces[0].source.shape == shape and self._parts[0][1].is_contiguous()
        self.flat = self._parts[0][1].view(-1) if is_flat else None
        """All of it as it lies in memory, where that is in the tensor's own order."""
        self.is_plain = is_flat and not pieces[0].axes and self._times == [1]
        self._is_whole = sum(piece.source.num_elements for piece in pieces) == self.num_elements
        self._is_in_runs = not self._is_whole and all(self._is_apart(piece.source) for piece in pieces)

    @cached_property
    def place(self) -> Place | None:
        """All of it as it lies, where that is in the tensor's own order and counts once."""
        return place_in(self.flat) if self.is_plain and self.flat is not None else None

    def _is_apart(self, box: Box) -> bool:
        """The runs of a box are worth reading one by one."""
        cut = cut_axis(self.shape, box)
        gap = (math.prod(self.shape[cut:]) - math.prod(box.shape[cut:])) * self.dtype.itemsize
        return cut == 0 or gap >= MIN_GAP_BYTES

    @classmethod
    def of_memory(cls, name: str, memory: torch.Tensor) -> Region:
        """Parameter `name` as a tensor of its own."""
        box = Box.whole(tuple(memory.shape))
        return cls(box.shape, [Piece(name, box, box)], [memory], memory.dtype, memory.device)

    def over(self, memories: Sequence[torch.Tensor]) -> Region:
        """The same tensor in other memory."""
        return Region(self.shape, self._pieces, memories, self.dtype, self.device)

    def read(self, part: slice) -> torch.Tensor:
        """These elements, flat: their memory where it is in order, else a copy."""
        return self.flat[part] if self.flat is not None else self._copied(part, self._parts)

    def counted(self, part: slice) -> Iterator[tuple[torch.Tensor, int]]:
        """As `read`, with how often that is in a digest: apart where that differs."""
        if len(self._several_times) == 1:
            yield self.read(part), self._several_times[0]
            return
        for times in self._several_times:
            parts = [held for held, each in zip(self._parts, self._times, strict=True) if each == times]
            yield self._copied(part, parts), times

    def holds_any(self, part: slice) -> bool:
        """Whether any piece holds one of these elements. What none does need not be had to be written."""
        if self._is_whole:
            return True
        boxes = boxes_of_range(self.shape, part.start, part.stop)
        return any(box.common(source) is not None for box in boxes for source, _ in self._parts)

    def runs(self, part: slice) -> list[slice] | None:
        """Of these elements, seen from the first, the runs that some piece holds; None where all may as well be read
        at once."""
        if not self._is_in_runs:
            return None
        boxes = boxes_of_range(self.shape, part.start, part.stop)
        common = (box.common(source) for box in boxes for source, _ in self._parts)
        found = [run for box in common if box is not None for run in runs_of(self.shape, box)]
        return None if found == [part] else [slice(run.start - part.start, run.stop - part.start) for run in found]

    def write_view(self, part: slice) -> torch.Tensor:
        """Where to write these elements, flat, before they are written back: their memory where it is in order, else
        scratch."""
        if self.flat is not None:
            return self.flat[part]
        return torch.empty(part.stop - part.start, dtype=self.dtype, device=self.device)

    def write_back(self, part: slice, block: torch.Tensor) -> None:
        """Make these elements, written to a `write_view`, the tensor's."""
        if self.flat is None:
            for held, given in self._overlaps(part, block, self._parts):
                held.copy_(given)

    def equals(self, part: slice, block: torch.Tensor) -> bool:
        """Whether these elements, as far as any piece holds them, are those of the block."""
        return all(torch.equal(held, given) for held, given in self._overlaps(part, block, self._parts))

    def _copied(self, part: slice, parts: _Parts) -> torch.Tensor:
        block = torch.zeros(part.stop - part.start, dtype=self.dtype, device=self.device)
        for held, wanted in self._overlaps(part, block, parts):
            wanted.copy_(held)
        return block

    def _overlaps(self, part: slice, block: torch.Tensor, parts: _Parts) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Views of the same elements: in a piece's memory and in the block. A run of elements in row-major order is a
        few boxes of the tensor, and each of them shares a box with some pieces."""
        done = 0
        for box in boxes_of_range(self.shape, part.start, part.stop):
            values = block[done : done + box.num_elements].view(box.shape)
            done += box.num_elements
            for source, view in parts:
                common = box.common(source)
                if common is not None:
                    yield view[common.seen_from(source).slices], values[common.seen_from(box).slices]


def _as_source(piece: Piece, memory: torch.Tensor) -> torch.Tensor:
    """The memory of a target box, seen with the axes of the source."""
    if not piece.axes:
        return memory if memory.shape == piece.source.shape else memory.view(piece.source.shape)
    inverse = sorted(range(len(piece.axes)), key=piece.axes.__getitem__)
    return memory.view([piece.source.shape[axis] for axis in piece.axes]).permute(inverse)
