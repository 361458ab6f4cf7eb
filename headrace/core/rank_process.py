"""The process of a rank other than the first: `python -m headrace.core.rank_process`, started by
`headrace.ipc.rank_spawn`: by rank 0, or by the keeper of a node (`headrace.core.rank_node`).

Owns what is true of the process as a whole: its descriptors, its log, and that it ends with its parent.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import gc
import logging
import os
import signal
import socket
import stat
import sys
import threading
import time

from headrace.core.awaited_settings import AwaitedSettings
from headrace.core.process import ORPHANED_EXIT_CODE, watch_parent
from headrace.core.rank_opening import Opening
from headrace.core.service import load_torch
from headrace.ipc import PeerClosed
from headrace.ipc.rank_channel import RankChannel
from headrace.ipc.rank_guest import SentPage
from headrace.ipc.rank_page import AwakeClock, RankPage
from headrace.ipc.rank_spawn import is_stopped
from headrace.telemetry import LogContext, configure_logging
from headrace.types.errors import HeadraceError

STOPPED_SECONDS = 2.0
LOOK_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1

logger = logging.getLogger("headrace.core.rank_process")  # as `__main__` it would log past our handler


def main(arguments: list[str]) -> int:
    """Be one rank until rank 0 lets go or is gone. Returns the exit code."""
    options = _parse(arguments)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # also while a signal keeps this process stopped
    configure_logging(LogContext(role=f"rank {options.rank}"), level=options.log_level, as_json=options.log_json)
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch_parent, args=(options.lifeline, options.parent), daemon=True).start()
    channel = RankChannel(socket.socket(fileno=options.channel))
    page = _page_of(options.page)
    page.beat_in_thread()
    try:
        return _serve(channel, page, options.parent)
    except PeerClosed:
        return 0
    except BaseException as error:  # process entry point: rank 0 says it in the name of all
        page.write_text(f"{type(error).__name__}: {error}")
        logger.exception("the rank ends")
        return 1


def _serve(channel: RankChannel, page: RankPage, parent: int) -> int:
    opening = Opening(channel)
    awaited = AwaitedSettings(opening.settings, prepares=True)
    problem = load_torch("headrace.core.rank_member")
    resolved = awaited.wait()
    if problem is not None:
        raise problem
    start = opening.start(resolved.engine.start_timeout)
    if start.guards_parent:
        threading.Thread(target=guard, args=(parent,), daemon=True).start()
    from headrace.core.rank_member import serve_rank

    try:
        serve_rank(resolved, start, channel, page, on_begin=awaited.wait_prepared, on_built=gc.freeze)
    except HeadraceError:
        return 1  # rank 0 knows it
    return 0


def _page_of(descriptor: int) -> RankPage:
    """In memory shared with rank 0, or at the end of a connection."""
    if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        return SentPage(socket.socket(fileno=descriptor))
    page = RankPage.map(descriptor)
    os.close(descriptor)
    return page


def guard(parent: int) -> None:
    """End rank 0 where a signal keeps it stopped: its front then sees that it has died, and starts another."""
    clock, stopped_since = AwakeClock(), None
    while True:
        time.sleep(LOOK_SECONDS)
        now = clock.now()
        if not is_stopped(parent):
            stopped_since = None
        elif stopped_since is None:
            stopped_since = now
        elif now - stopped_since >= STOPPED_SECONDS:
            logger.error("rank 0 (process %d) was stopped by a signal and does not go on: it is ended", parent)
            os.kill(parent, signal.SIGKILL)
            os._exit(ORPHANED_EXIT_CODE)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="headrace.core.rank_process")
    for name in ("--channel", "--lifeline", "--page", "--rank", "--parent"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--log-level", type=int, default=logging.INFO)
    parser.add_argument("--log-json", action="store_true")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    logging.shutdown()
    sys.stdout.flush()
    os._exit(exit_code)  # no teardown, as of a core
