"""The place of one rank among those that hold a model together."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from headrace.parallel.communicator import Communicator, OnlyRank
from headrace.parallel.links import StageLink


@dataclass(frozen=True, eq=False)
class Mesh:
    """Rank `rank` of the `num_ranks` of a stage, each with an equal share of every layer of it, and the communicator by
    which it reaches the others (tensor parallelism).

    Of several stages (pipeline parallelism) each has some of the layers. `before` and `after` are the links by which
    the stream of hidden states comes and goes, each to the rank of the same share; `everyone` are the ranks of all
    stages."""

    rank: int
    num_ranks: int
    communicator: Communicator
    stage: int = 0
    num_stages: int = 1
    before: StageLink | None = None
    after: StageLink | None = None
    everyone: Communicator | None = None

    @classmethod
    def single(cls) -> Mesh:
        """A mesh of one: what is built on it is what would be built without a mesh."""
        return cls(0, 1, OnlyRank())

    @property
    def has_shares(self) -> bool:
        """Whether the layers of a stage are shared by several ranks."""
        return self.num_ranks > 1

    @property
    def is_last(self) -> bool:
        """Whether this stage has the head, and so samples."""
        return self.stage == self.num_stages - 1

    @property
    def of_all(self) -> Communicator:
        """The ranks of all stages."""
        return self.everyone or self.communicator

    def abort(self) -> None:
        """End, from any thread, what this rank waits for in others on a device."""
        for each in self._ends():
            each.abort()

    def close(self) -> None:
        """Let go of all other ranks, when nothing is computed any more. Idempotent."""
        with contextlib.ExitStack() as closing:
            for each in reversed(self._ends()):
                closing.callback(each.close)

    def _ends(self) -> list[Communicator | StageLink]:
        ends = (self.communicator, self.before, self.after, self.everyone)
        return [each for each in ends if each is not None]


SINGLE = Mesh.single()
