"""Makes a process, or a thread of one, a rank of a replica: its place in the group, its share of the model, and the
follower of rank 0."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from headrace.core.executor import LocalExecutor
from headrace.core.follower import Follower
from headrace.core.rank_messages import REACHED, READY, TELL, RankAnswer, RankStart, encode_message
from headrace.core.rank_start import mesh_of
from headrace.core.rank_works import RankWorks
from headrace.ipc.rank_channel import RankChannel
from headrace.ipc.rank_page import RankPage
from headrace.parallel.breakable_group import BreakableGroup
from headrace.parallel.rendezvous import Rendezvous
from headrace.runner import build_runner
from headrace.types.errors import HeadraceError


def serve_rank(
    start: RankStart,
    channel: RankChannel,
    page: RankPage,
    on_built: Callable[[], object],
    on_group: Callable[[BreakableGroup], None] | None = None,
) -> None:
    """Be the rank that `start` names until rank 0 lets go: `PeerClosed`. `on_built` is called before rank 0 hears that
    plans can be executed.

    In a process that is not ours to end, `on_group` is given what ends the waits of this rank for others, and all is
    freed at the end. Raises what keeps it from starting, which rank 0 has been told.
    """

    def answer(ticket: int, error: HeadraceError | None = None) -> None:
        channel.send(TELL, encode_message(RankAnswer(ticket, None if error is None else error.info())))

    with contextlib.ExitStack() as freed:
        try:
            follower, close = _join(start, channel, page, lambda: answer(REACHED), on_group)
        except HeadraceError as error:
            answer(READY, error)
            raise
        if on_group is not None:
            freed.callback(close)
        on_built()
        answer(READY)
        follower.run()


def _join(
    start: RankStart,
    channel: RankChannel,
    page: RankPage,
    on_reached: Callable[[], None],
    on_group: Callable[[BreakableGroup], None] | None,
) -> tuple[Follower, Callable[[], None]]:
    """Join the ranks, once `on_reached` was told that they are found, and load this one's share: what follows, and what
    frees it."""
    rendezvous = Rendezvous.reach(start.port, start.secret)
    on_reached()
    resolved = start.resolved
    group = rendezvous.group(start.rank, start.num_ranks, device=resolved.device, host=start.host)
    if on_group is not None and resolved.device == "cpu":
        group = BreakableGroup(group)
        on_group(group)
    mesh = mesh_of(resolved, start.rank, group)
    runner = build_runner(resolved, mesh=mesh, shares_process=on_group is not None)
    works = RankWorks(start.rank, LocalExecutor(runner), runner.weights, shares_memory=start.shares_memory)

    def close() -> None:
        works.close()
        runner.close()

    return Follower(runner.launch, works, channel, page, resolved.engine.overlap_depth), close
