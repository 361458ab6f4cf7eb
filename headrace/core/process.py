"""The core's process: `python -m headrace.core.process`, started by `headrace.ipc.spawn`.

Owns what is true of the process as a whole: its descriptors, its log, and that it dies with its parent.
"""

from __future__ import annotations

import argparse
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
from headrace.core.awaited_settings import AwaitedSettings
from headrace.core.service import load_torch, serve_core
from headrace.ipc import PeerClosed, Pulse, PulsePage
from headrace.ipc.codec import DECODE_ERRORS
from headrace.ipc.socket_link import SocketCoreLink
from headrace.telemetry import LogContext, configure_logging

CONFIG_TIMEOUT = 600.0
"""It runs while the front decides, which slow files and drivers may hold up, or a signal that stops it. Once the front
is gone the lifeline ends this process, long before."""
PARENT_CHECK_MILLISECONDS = 1000
ORPHANED_EXIT_CODE = 3
logger = logging.getLogger(__name__)


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
    awaited = AwaitedSettings(partial(_receive, link), prepares=options.imports)
    problem = load_torch() if options.imports else None
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
    return serve_core(resolved, link, options.executor, pulse=pulse, on_begin=begin, on_built=gc.freeze)


def _receive(link: SocketCoreLink) -> ResolvedConfig:
    return msgspec.msgpack.decode(link.receive_frame(CONFIG_TIMEOUT), type=ResolvedConfig)


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
    parser.add_argument("--imports", action="store_true", help="load torch before the configuration comes")
    parser.add_argument("--log-level", type=int, default=logging.INFO)
    parser.add_argument("--log-json", action="store_true")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    logging.shutdown()
    sys.stdout.flush()
    os._exit(exit_code)  # no teardown: device libraries may hang in it, and there is nothing left to save
