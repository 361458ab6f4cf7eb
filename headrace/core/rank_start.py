"""Starts a replica of several ranks, whose processes on this host have begun. Owns the order of it: guests come and
bring their ranks, all find the rendezvous, all join the group, each loads its share, and each says that it can
execute plans.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from headrace.config import ResolvedConfig
from headrace.core.faults import FAULTS, DeviceLost
from headrace.core.rank_executor import RankExecutor
from headrace.core.rank_group import LOOK_SECONDS, Asked, OtherRanks
from headrace.core.rank_messages import REACHED, READY, SETTINGS, START, RankStart, encode_message
from headrace.core.rank_terms import GuestPlace, terms_of
from headrace.ipc.rank_guest import GuestRank
from headrace.ipc.rank_meeting import Meeting
from headrace.ipc.rank_peer import RankPeer
from headrace.parallel import Mesh
from headrace.parallel.joining import Join, LinkLimits, join_mesh
from headrace.parallel.rendezvous import JOIN_SECONDS, LOOPBACK, Rendezvous
from headrace.types.errors import DeviceLostError, HeadraceError
from headrace.types.plan import RankLost

if TYPE_CHECKING:
    from headrace.runner.device_runner import DeviceRunner
    from headrace.runner.runner import Runner

GATHER_SHARE = 0.7
"""Of `start_timeout`, for guests to come in; the rest is for loading."""

Build = Callable[[Mesh], "Runner | DeviceRunner"]


def start_ranks(
    resolved: ResolvedConfig,
    build: Build,
    children: Sequence[RankPeer],
    *,
    shares_process: bool = False,
    meeting: Meeting | None = None,
) -> RankExecutor:
    """The executor of all ranks, of which this process is the first; `build` makes its runner. Some are its `children`,
    which have been told their settings, and are ended with it, or where there is no replica. Guests come to the
    `meeting`, and bring the others.

    Raises what `build` raises, here or on another rank, `DeviceLostError` where a rank ends, and as `Meeting.gather`.
    """
    others = OtherRanks(children, shares_process=shares_process)
    ready = None
    with contextlib.ExitStack() as undo:
        try:
            rendezvous = undo.enter_context(contextlib.closing(Rendezvous.host()))
            others = _gathered(resolved, rendezvous, children, meeting, shares_process)
            reached, ready = others.expect(REACHED), others.expect(READY)
            others.tell_each(SETTINGS, _settings_of_guests(resolved, others))
            others.tell_each(START, _starts(resolved, rendezvous, others, shares_process))
            others.watch()
            reached.wait(JOIN_SECONDS)
            is_broken = threading.Event()
            others.break_off = is_broken.set
            where: dict[str, Any] = {"device": resolved.device, "host": _host_of(others)}
            # A child that is lost is ended, which breaks its connections by itself: only to join is waited without any.
            group = partial(rendezvous.group, **where, is_broken=is_broken, breaks_calls=meeting is not None)
            mesh = undo.enter_context(contextlib.closing(mesh_of(resolved, 0, group)))
            if resolved.device == "cuda":
                others.break_off = mesh.abort  # of gloo's a lost rank's end breaks every connection
            executor = RankExecutor(build(mesh), others, mesh, rendezvous, meeting)
            undo.callback(_close, executor)
            undo.callback(mesh.close)  # first: a device may wait for a rank that has failed
            _await_ready(ready, resolved.engine.start_timeout)
        except (DeviceLost, RankLost) as lost:
            told = _told(others, ready, lost)
            _end(told, others, meeting)
            raise told from None
        except BaseException as error:
            _end(error, others, meeting)
            raise
        undo.pop_all()
    others.have_started()
    return executor


def mesh_of(resolved: ResolvedConfig, rank: int, join: Join) -> Mesh:
    """The place of a rank in the groups that it joins. What ranks wait for each other takes no longer than a step
    may."""
    engine = resolved.engine
    limits = LinkLimits(engine.watchdog_timeout, engine.overlap_depth + 1)
    return join_mesh(rank, engine.tp_size, engine.pp_size, join, limits)


def _gathered(
    resolved: ResolvedConfig,
    rendezvous: Rendezvous,
    children: Sequence[RankPeer],
    meeting: Meeting | None,
    shares_process: bool,
) -> OtherRanks:
    """The children, and what guests bring."""
    peers = list(children)
    if meeting is not None:
        until = time.monotonic() + GATHER_SHARE * resolved.engine.start_timeout
        meeting.gather(terms_of(resolved), until)
        peers += meeting.seat(rendezvous.port, resolved.num_ranks, until)
    return OtherRanks(peers, shares_process=shares_process)


def _settings_of_guests(resolved: ResolvedConfig, others: OtherRanks) -> dict[int, bytes]:
    """What those are told, by rank, who have not begun here."""
    return {
        peer.rank: encode_message(GuestPlace.decode(peer.guest.place).resolved_of(resolved, peer.number))
        for peer in others.peers
        if isinstance(peer, GuestRank)
    }


def _starts(
    resolved: ResolvedConfig, rendezvous: Rendezvous, others: OtherRanks, shares_process: bool
) -> dict[int, bytes]:
    """What each of the others is told, by rank."""
    found: dict[int, bytes] = {}
    for peer in others.peers:
        if isinstance(peer, GuestRank):
            port, host = GuestPlace.decode(peer.guest.place).store_port, peer.guest.address
        else:
            port, host = rendezvous.port, _host_of(others)
        guards = not (shares_process or isinstance(peer, GuestRank))
        start = RankStart(peer.rank, resolved.num_ranks, port, rendezvous.secret, guards, host, peer.shares_memory)
        found[peer.rank] = encode_message(start)
    return found


def _host_of(others: OtherRanks) -> str:
    """The address by which others reach this process: that to which they have come."""
    return next((peer.guest.own_address for peer in others.peers if isinstance(peer, GuestRank)), LOOPBACK)


def _end(error: BaseException, others: OtherRanks, meeting: Meeting | None) -> None:
    """There will be no replica: tell all others why, and end them."""
    if meeting is not None:
        if isinstance(error, HeadraceError):
            meeting.refuse(error)
        meeting.close()
    others.close()


def _close(executor: RankExecutor) -> None:
    """A device that is lost cannot be closed: what it was lost by is told."""
    with contextlib.suppress(*FAULTS):
        executor.close()


def _await_ready(ready: Asked, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not ready.is_done():
        if time.monotonic() >= until:
            ready.wait(0.0)
        time.sleep(LOOK_SECONDS / 10)


def _told(others: OtherRanks, ready: Asked | None, lost: BaseException) -> Exception:
    """What kept a start from its end: the error of a rank that has said so, or how one ended."""
    others.look_at_last_words()
    found = None if ready is None else ready.first_error()
    if found is None:
        cause = str(lost) if isinstance(lost, DeviceLost) else str(others.cause_of(lost))
        found = DeviceLostError(f"the ranks cannot start: {cause}")
    return found
