"""The core's process: `python -m headrace.core.process`, started by `headrace.ipc.spawn`.

Owns what is true of the process as a whole: its descriptors, its log, and that it dies with its parent.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import logging
import os
import select
import signal
import socket
import sys
import threading
from functools import partial

import msgspec

from headrace.config import ResolvedConfig
from headrace.core.awaited_settings import SETTINGS_SECONDS, AwaitedSettings
from headrace.core.begun_ranks import BegunRanks
from headrace.core.service import CORE_MODULES, FIRST_RANK_MODULES, load_torch, serve_core
from headrace.ipc import PeerClosed, Pulse, PulsePage
from headrace.ipc.codec import DECODE_ERRORS
from headrace.ipc.socket_link import SocketCoreLink
from headrace.telemetry import LogContext, configure_logging

PARENT_CHECK_MILLISECONDS = 1000
ORPHANED_EXIT_CODE = 3
logger = logging.getLogger("headrace.core.process")  # as `__main__` it would log past our handler


def main(arguments: list[str]) -> int:
    """Serve one core over the inherited link until the front or the parent is gone. Returns the exit code."""
    options = _parse(arguments)
    configure_logging(LogContext(role="core"), level=options.log_level, as_json=options.log_json)
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the front decides; a terminal's Ctrl-C is not for us
    threading.Thread(target=watch_parent, args=(options.lifeline, options.parent), daemon=True).start()
    link = SocketCoreLink(socket.socket(fileno=options.link))
    pulse = Pulse(PulsePage.map(options.pulse))
    os.close(options.pulse)
    ranks = BegunRanks()
    with contextlib.suppress(OSError):  # whoever needs them tries again, and says what is wrong then
        ranks.begin(options.ranks)
    awaited = AwaitedSettings(partial(_receive, link, ranks), prepares=options.ranks > 0)
    problem = load_torch(*(FIRST_RANK_MODULES if options.ranks > 1 else CORE_MODULES)) if options.ranks else None
    try:
        resolved = awaited.wait()
    except (PeerClosed, *DECODE_ERRORS) as error:
        logger.error("no configuration: %s", error)
        return 2

    def begin() -> None:
        if problem is not None:
            raise problem
        awaited.wait_prepared()

    # What is built lives as long as the process: the collector need not walk it again, in the middle of a step.
    return serve_core(resolved, link, options.executor, pulse=pulse, ranks=ranks, on_begin=begin, on_built=gc.freeze)


def _receive(link: SocketCoreLink, ranks: BegunRanks) -> ResolvedConfig:
    """The settings, which ranks that have begun wait for as well."""
    resolved = msgspec.msgpack.decode(link.receive_frame(SETTINGS_SECONDS), type=ResolvedConfig)
    ranks.settle(resolved)
    return resolved


def watch_parent(lifeline: int, parent: int) -> None:
    """End this process at once, whatever it does, when the parent is gone or lets go of the lifeline.

    The parent's id is looked at too: a process forked off the parent may still hold the other end of the pipe.
    """
    poller = select.poll()
    poller.register(lifeline, select.POLLIN)
    while os.getppid() == parent:
        if poller.poll(PARENT_CHECK_MILLISECONDS):
            break
    os._exit(ORPHANED_EXIT_CODE)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="headrace.core.process")
    parser.add_argument("--link", type=int, required=True)
    parser.add_argument("--lifeline", type=int, required=True)
    parser.add_argument("--pulse", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--executor", choices=("local", "free"), default="local")
    parser.add_argument("--ranks", type=int, default=0, help="ranks here that load torch before the settings come")
    parser.add_argument("--log-level", type=int, default=logging.INFO)
    parser.add_argument("--log-json", action="store_true")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    logging.shutdown()
    sys.stdout.flush()
    os._exit(exit_code)  # no teardown: device libraries may hang in it, and there is nothing left to save
