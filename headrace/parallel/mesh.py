"""The place of one rank among those that hold a model together (tensor parallelism)."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.parallel.communicator import Communicator, OnlyRank


@dataclass(frozen=True, eq=False)
class Mesh:
    """Rank `rank` of `num_ranks`, each with an equal share of every layer, and what it reaches the others by."""

    rank: int
    num_ranks: int
    communicator: Communicator

    @classmethod
    def single(cls) -> Mesh:
        """A mesh of one: what is built on it is what would be built without a mesh."""
        return cls(0, 1, OnlyRank())

    @property
    def is_single(self) -> bool:
        return self.num_ranks == 1


SINGLE = Mesh.single()
