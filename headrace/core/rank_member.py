"""Makes a process, or a thread of one, a rank of a replica: its place in the group, its share of the model, and the
follower of rank 0."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

from headrace.config import ResolvedConfig
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


class Leave(threading.Event):
    """Once it is set, a rank in a process that is not ours to end waits for no other any more."""

    def __init__(self) -> None:
        super().__init__()
        self.break_off: Callable[[], object] = lambda: None
        """Ends the waits of those who do not look at it."""

    def set(self) -> None:
        super().set()
        self.break_off()


def serve_rank(
    resolved: ResolvedConfig,
    start: RankStart,
    channel: RankChannel,
    page: RankPage,
    *,
    on_begin: Callable[[], object] | None = None,
    on_built: Callable[[], object] | None = None,
    is_left: Leave | None = None,
) -> None:
    """Be the rank that `start` names, with the settings that hold for it, until rank 0 lets go: `PeerClosed`.
    `on_begin` is called first, and what it raises keeps the rank from starting; `on_built` is called before rank 0
    hears that plans can be executed.

    In a process that is not ours to end, `is_left` ends the waits of this rank for others, and all is freed at the end.
    Raises what keeps it from starting, which rank 0 has been told.
    """

    def answer(ticket: int, error: HeadraceError | None = None) -> None:
        channel.send(TELL, encode_message(RankAnswer(ticket, None if error is None else error.info())))

    freed = contextlib.ExitStack()
    try:
        try:
            if on_begin is not None:
                on_begin()
            follower = _join(resolved, start, channel, page, lambda: answer(REACHED), is_left, freed)
        except HeadraceError as error:
            answer(READY, error)
            raise
        if on_built is not None:
            on_built()
        answer(READY)
        follower.run()
    finally:
        if is_left is not None:
            freed.close()


def _join(
    resolved: ResolvedConfig,
    start: RankStart,
    channel: RankChannel,
    page: RankPage,
    on_reached: Callable[[], None],
    is_left: Leave | None,
    freed: contextlib.ExitStack,
) -> Follower:
    """Join the ranks, once `on_reached` was told that they are found, and load this one's share. What is to be closed
    at the end goes to `freed`."""
    rendezvous = freed.enter_context(contextlib.closing(Rendezvous.reach(start.port, start.secret)))
    on_reached()

    def group(rank: int, num_ranks: int, name: str) -> Any:
        return rendezvous.group(rank, num_ranks, name, device=resolved.device, host=start.host, is_broken=is_left)

    mesh = freed.enter_context(contextlib.closing(mesh_of(resolved, start.rank, group)))
    if is_left is not None and resolved.device == "cuda":
        is_left.break_off = mesh.abort
    runner = build_runner(resolved, mesh=mesh, shares_process=is_left is not None)
    freed.callback(runner.close)
    works = RankWorks(start.rank, LocalExecutor(runner), runner.weights, shares_memory=start.shares_memory)
    freed.callback(works.close)
    sends = mesh.num_stages > 1 and mesh.is_last and mesh.rank == 0
    return Follower(runner.launch, works, channel, page, resolved.engine.overlap_depth, sends_results=sends)
