"""What one rank of a mesh holds of a tensor. Owns the arithmetic of tensor parallelism over boxes; knows no models."""

from __future__ import annotations

import msgspec

from headrace.config.shares import vocabulary_rows
from headrace.types.errors import UnsupportedModelError
from headrace.weights.boxes import Box


class Shard(msgspec.Struct, frozen=True):
    """One rank of `num_ranks` of a stage, of which there are `num_stages`; by default the only one."""

    rank: int = 0
    num_ranks: int = 1
    stage: int = 0
    num_stages: int = 1

    @classmethod
    def of_rank(cls, number: int, num_ranks: int, num_stages: int) -> Shard:
        """Of all ranks, that number: those of a stage follow each other."""
        return cls(number % num_ranks, num_ranks, number // num_ranks, num_stages)

    @property
    def number(self) -> int:
        """Which of all ranks it is."""
        return self.stage * self.num_ranks + self.rank

    @property
    def num_all(self) -> int:
        """Ranks of all stages."""
        return self.num_ranks * self.num_stages

    def part(self, shape: tuple[int, ...], axis: int, unit: int = 1) -> tuple[Box, bool]:
        """An equal share of `axis`, in whole units (heads), and whether this rank's is the one that counts: where there
        are fewer units than ranks, several ranks hold one of them. Raises `UnsupportedModelError` where neither number
        divides the other."""
        num_units = shape[axis] // unit
        share, num_holders = max(1, num_units // self.num_ranks), self.num_holders(num_units)
        if share * self.num_ranks != num_units * num_holders:
            message = f"{num_units} parts of a tensor of shape {list(shape)} do not split over {self.num_ranks} ranks"
            raise UnsupportedModelError(message)
        start = self.rank // num_holders * share * unit
        return _cut(shape, axis, start, share * unit), self.rank % num_holders == 0

    def num_holders(self, num_units: int) -> int:
        """How many ranks hold each part of an axis of so many units."""
        return max(1, self.num_ranks // num_units)

    def padded_rows(self, shape: tuple[int, ...]) -> tuple[Box, tuple[Box, ...]]:
        """A share of the vocabulary's rows, and the box of padding, if any, that makes it as large as every other
        rank's."""
        share = vocabulary_rows(shape[0], self.num_ranks)
        size = min(share, shape[0] - self.rank * share)
        if size <= 0:
            raise UnsupportedModelError(f"{shape[0]} rows do not split over {self.num_ranks} ranks")
        padding = (_cut((share, *shape[1:]), 0, size, share - size),) if size < share else ()
        return _cut(shape, 0, self.rank * share, size), padding


ONLY_RANK = Shard()


def _cut(shape: tuple[int, ...], axis: int, start: int, size: int) -> Box:
    begin = tuple(start if each == axis else 0 for each in range(len(shape)))
    return Box(begin, tuple(size if each == axis else whole for each, whole in enumerate(shape)))
