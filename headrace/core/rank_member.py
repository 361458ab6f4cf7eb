"""Makes a process a rank of a replica: its place in the group, its share of the model, and the follower of rank 0."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from headrace.core.executor import LocalExecutor
from headrace.core.follower import Follower
from headrace.core.rank_messages import RankStart
from headrace.core.rank_start import mesh_of
from headrace.core.rank_works import RankWorks
from headrace.ipc.rank_channel import RankChannel
from headrace.ipc.rank_page import RankPage
from headrace.parallel.rendezvous import Rendezvous
from headrace.runner import build_runner


def join(start: RankStart, channel: RankChannel, page: RankPage, on_reached: Callable[[], None]) -> Follower:
    """Join the ranks that `start` names, once `on_reached` was told that they are found, and load this one's share.

    Raises what the runner raises.
    """
    rendezvous = Rendezvous.reach(start.port, start.secret)
    on_reached()
    resolved = start.resolved.of_rank(start.rank)
    mesh = mesh_of(resolved, start.rank, partial(rendezvous.group, device=resolved.device))
    runner = build_runner(resolved, mesh=mesh)
    executor = LocalExecutor(runner)
    works = RankWorks(start.rank, executor, runner.weights)
    sends = mesh.num_stages > 1 and mesh.is_last and mesh.rank == 0
    return Follower(runner.launch, works, channel, page, resolved.engine.overlap_depth, sends_results=sends)
