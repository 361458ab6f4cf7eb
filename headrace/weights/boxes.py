"""Boxes: the parts of arrays that weights are moved in. Owns their arithmetic. Knows no names and no tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import msgspec


class Box(msgspec.Struct, frozen=True):
    """Of an array, `shape` elements from `start` on, per axis."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Box:
        """All of an array."""
        return cls((0,) * len(shape), shape)

    def __str__(self) -> str:
        return f"[{', '.join(f'{part.start}:{part.stop}' for part in self.slices)}]"

    @property
    def num_elements(self) -> int:
        """Elements in it."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """What selects it from its array."""
        return tuple(slice(start, start + size) for start, size in zip(self.start, self.shape, strict=True))

    def is_inside(self, shape: tuple[int, ...]) -> bool:
        """It is a box of an array of this shape, and not empty."""
        return len(self.start) == len(self.shape) == len(shape) and all(
            start >= 0 and 0 < size <= limit - start
            for start, size, limit in zip(self.start, self.shape, shape, strict=True)
        )

    def common(self, other: Box) -> Box | None:
        """What it shares with another box of the same array."""
        start = tuple(map(max, self.start, other.start))
        shape = tuple(
            min(mine + size, theirs + other_size) - first
            for mine, size, theirs, other_size, first in zip(
                self.start, self.shape, other.start, other.shape, start, strict=True
            )
        )
        return Box(start, shape) if min(shape) > 0 else None

    def seen_from(self, outer: Box) -> Box:
        """The same box, in an array that is the box `outer` alone."""
        return Box(tuple(mine - first for mine, first in zip(self.start, outer.start, strict=True)), self.shape)


def runs_of(shape: tuple[int, ...], box: Box) -> Iterator[slice]:
    """The runs of elements in row-major order of an array that are a box of it, in that order."""
    cut = cut_axis(shape, box)
    size = math.prod(box.shape[cut:])
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    first = sum(start * stride for start, stride in zip(box.start, strides, strict=True))
    for outer in itertools.product(*(range(count) for count in box.shape[:cut])):
        start = first + sum(index * stride for index, stride in zip(outer, strides, strict=False))
        yield slice(start, start + size)


def cut_axis(shape: tuple[int, ...], box: Box) -> int:
    """The last axis along which a box has less than all; the first if it has all."""
    return max((axis for axis, size in enumerate(box.shape) if size < shape[axis]), default=0)


def find_overlap(boxes: Sequence[Box]) -> tuple[int, int] | None:
    """Two boxes of one array that share an element, as indices; None if no two do.

    A sweep along the first axis: only boxes whose ranges there meet are compared, so the experts of a layer or the rows
    of a fused projection cost little more than their sorting.
    """
    active: list[int] = []
    for index in sorted(range(len(boxes)), key=lambda index: boxes[index].start[0]):
        box = boxes[index]
        active = [other for other in active if boxes[other].start[0] + boxes[other].shape[0] > box.start[0]]
        for other in active:
            if box.common(boxes[other]) is not None:
                return other, index
        active.append(index)
    return None


def boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The boxes that are elements `start` to `stop` of an array, in row-major order: a few, in that order."""
    if len(shape) == 1:
        yield Box((start,), (stop - start,))
        return
    inner = math.prod(shape[1:])
    while start < stop:
        row, within = divmod(start, inner)
        num_rows = (stop - start) // inner if within == 0 else 0
        if num_rows:
            yield Box((row, *(0 for _ in shape[1:])), (num_rows, *shape[1:]))
            start += num_rows * inner
            continue
        end = min(stop, (row + 1) * inner)
        for box in boxes_of_range(shape[1:], within, within + end - start):
            yield Box((row, *box.start), (1, *box.shape))
        start = end
