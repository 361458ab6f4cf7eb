"""Makes a process, or a thread of one, a rank of a replica: its place in the group, its share of the model, and the
follower of rank 0."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

from headrace.core.executor import LocalExecutor
from headrace.core.follower import Follower
from headrace.core.rank_messages import REACHED, READY, TELL, RankAnswer, RankStart, encode_message
from headrace.core.rank_start import mesh_of
from headrace.core.rank_works import RankWorks
from headrace.ipc.rank_channel import RankChannel
from headrace.ipc.rank_page import RankPage
from headrace.parallel.rendezvous import Rendezvous
from headrace.runner import build_runner
from headrace.types.errors import HeadraceError


def serve_rank(
    start: RankStart,
    channel: RankChannel,
    page: RankPage,
    on_built: Callable[[], object],
    is_left: threading.Event | None = None,
) -> None:
    """Be the rank that `start` names until rank 0 lets go: `PeerClosed`. `on_built` is called before rank 0 hears that
    plans can be executed.

    In a process that is not ours to end, `is_left` ends the waits of this rank for others, and all is freed at the end.
    Raises what keeps it from starting, which rank 0 has been told.
    """

    def answer(ticket: int, error: HeadraceError | None = None) -> None:
        channel.send(TELL, encode_message(RankAnswer(ticket, None if error is None else error.info())))

    with contextlib.ExitStack() as freed:
        try:
            follower, close = _join(start, channel, page, lambda: answer(REACHED), is_left)
        except HeadraceError as error:
            answer(READY, error)
            raise
        if is_left is not None:
            freed.callback(close)
        on_built()
        answer(READY)
        follower.run()


def _join(
    start: RankStart,
    channel: RankChannel,
    page: RankPage,
    on_reached: Callable[[], None],
    is_left: threading.Event | None,
) -> tuple[Follower, Callable[[], None]]:
    """Join the ranks, once `on_reached` was told that they are found, and load this one's share: what follows, and what
    frees it."""
    rendezvous = Rendezvous.reach(start.port, start.secret)
    on_reached()
    resolved = start.resolved

    def group(rank: int, num_ranks: int, name: str) -> Any:
        return rendezvous.group(rank, num_ranks, name, device=resolved.device, host=start.host, is_broken=is_left)

    mesh = mesh_of(resolved, start.rank, group)
    runner = build_runner(resolved, mesh=mesh, shares_process=is_left is not None)
    works = RankWorks(start.rank, LocalExecutor(runner), runner.weights, shares_memory=start.shares_memory)
    sends = mesh.num_stages > 1 and mesh.is_last and mesh.rank == 0

    def close() -> None:
        works.close()
        runner.close()

    launch, depth = runner.launch, resolved.engine.overlap_depth
    return Follower(launch, works, channel, page, depth, sends_results=sends), close
