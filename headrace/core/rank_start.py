"""Starts a replica of several ranks: the other ranks' processes first, so that all load at once. Owns the order of it:
all find the rendezvous, all join the group, each loads its share, and each says that it can execute plans.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from headrace.config import ResolvedConfig
from headrace.core.faults import DeviceLost
from headrace.core.rank_executor import RankExecutor
from headrace.core.rank_group import LOOK_SECONDS, Asked, OtherRanks
from headrace.core.rank_messages import REACHED, READY, START, RankStart, encode_message
from headrace.ipc.rank_spawn import RankProcess, start_rank
from headrace.parallel import Mesh
from headrace.parallel.joining import Join, LinkLimits, join_mesh
from headrace.parallel.rendezvous import JOIN_SECONDS, Rendezvous
from headrace.types.errors import DeviceLostError
from headrace.types.plan import RankLost

if TYPE_CHECKING:
    from headrace.runner.device_runner import DeviceRunner
    from headrace.runner.runner import Runner

Build = Callable[[Mesh], "Runner | DeviceRunner"]


def start_ranks(resolved: ResolvedConfig, build: Build, *, shares_process: bool = False) -> RankExecutor:
    """The executor of all ranks, of which this process is the first; `build` makes its runner.

    Raises what `build` raises, here or on another rank, and `DeviceLostError` where a rank ends.
    """
    num_ranks = resolved.num_ranks
    rendezvous = Rendezvous.host()
    others = _started(num_ranks, shares_process)
    try:
        reached, ready = others.expect(REACHED), others.expect(READY)
        starts = [
            RankStart(resolved, rank, num_ranks, rendezvous.port, rendezvous.secret, not shares_process)
            for rank in others.numbers
        ]
        others.tell_each(START, [encode_message(start) for start in starts])
        others.watch()
        reached.wait(JOIN_SECONDS)
        mesh = mesh_of(resolved, 0, partial(rendezvous.group, device=resolved.device))
        if resolved.device == "cuda":
            others.break_off = mesh.abort  # of gloo's a lost rank's end breaks every connection
        executor = RankExecutor(build(mesh), others, rendezvous)
        _await_ready(ready, resolved.engine.start_timeout)
    except (DeviceLost, RankLost) as lost:
        raise _told(others, ready, lost) from None
    except BaseException:
        others.close()
        raise
    return executor


def mesh_of(resolved: ResolvedConfig, rank: int, join: Join) -> Mesh:
    """The place of a rank in the groups that it joins. What ranks wait for each other takes no longer than a step
    may."""
    engine = resolved.engine
    limits = LinkLimits(engine.watchdog_timeout, engine.overlap_depth + 1)
    return join_mesh(rank, engine.tp_size, engine.pp_size, join, limits)


def _started(num_ranks: int, shares_process: bool) -> OtherRanks:
    processes: list[RankProcess] = []
    try:
        for rank in range(1, num_ranks):
            processes.append(start_rank(rank, shares_process=shares_process))
    except OSError:
        OtherRanks(processes, shares_process=shares_process).close()
        raise
    return OtherRanks(processes, shares_process=shares_process)


def _await_ready(ready: Asked, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not ready.is_done():
        if time.monotonic() >= until:
            ready.wait(0.0)
        time.sleep(LOOK_SECONDS / 10)


def _told(others: OtherRanks, ready: Asked, lost: BaseException) -> Exception:
    """What kept a start from its end: the error of a rank that has said so, or how one ended."""
    others.look_at_last_words()
    found = ready.first_error()
    if found is None:
        cause = str(lost) if isinstance(lost, DeviceLost) else str(others.cause_of(lost))
        found = DeviceLostError(f"the ranks cannot start: {cause}")
    others.close()
    return found
