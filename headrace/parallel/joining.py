"""How a rank comes to its mesh: the process groups that it is part of. Owns their names and the order in which all
join; who keeps the store in which they meet is `headrace.parallel.rendezvous`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from headrace.parallel.communicator import Communicator, GroupCommunicator, OnlyRank
from headrace.parallel.links import DeviceLink, HostLink, StageLink
from headrace.parallel.mesh import Mesh

Join = Callable[[int, int, str], Any]
"""Of a rank, the number of ranks and the name: a group, once all of them have joined it."""


class LinkLimits(NamedTuple):
    """How many seconds a rank waits for another, and how many steps a stage may be ahead of the next."""

    seconds: float
    depth: int


def join_mesh(number: int, num_ranks: int, num_stages: int, join: Join, limits: LinkLimits) -> Mesh:
    """The place of rank `number` of all, of which `num_ranks` that follow each other are a stage."""
    stage, rank = divmod(number, num_ranks)
    everyone = join(number, num_ranks * num_stages, "all")
    of_all: Communicator = GroupCommunicator(everyone, limits.seconds)
    if num_stages == 1:
        return Mesh(rank, num_ranks, of_all)
    own: Communicator = OnlyRank()
    if num_ranks > 1:
        own = GroupCommunicator(join(rank, num_ranks, f"stage {stage}"), limits.seconds)

    def link(first: int) -> StageLink:
        """From that rank to the one of the same share in the stage after."""
        pair = join(int(number != first), 2, f"link {first}")
        if everyone.name() == "nccl":
            return DeviceLink(GroupCommunicator(pair, limits.seconds))
        return HostLink(pair, *limits)

    before = link(number - num_ranks) if stage else None
    after = link(number) if stage + 1 < num_stages else None
    return Mesh(rank, num_ranks, own, stage, num_stages, before, after, of_all)
