"""`headrace router`: stand in front of servers that run, and be one server to clients.

Owns the process's signals and its end: the first SIGTERM or SIGINT drains (new requests are refused, running ones
finish within `--drain-timeout`), a second one ends at once.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import signal
import socket
from collections.abc import Sequence

from headrace.cli.flags import add_flags, given, with_keys
from headrace.cluster import event_loop
from headrace.cluster.options import RouterOptions
from headrace.telemetry import LogContext, configure_logging

DEFAULT_PORT = 30100
_RENAMED = {"allowed_hosts": "allowed_host"}
_KEYS = ("api_key", "admin_api_key", "replica_api_key", "replica_admin_api_key")
logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("urls", nargs="*", metavar="URL", help="a replica, as http://127.0.0.1:30000")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help=f"0: any free port (default: {DEFAULT_PORT})")
    levels = ("debug", "info", "warning", "error")
    parser.add_argument("--log-level", default="info", choices=levels, help="(default: info)")
    parser.add_argument("--log-json", action="store_true", help="log JSON lines")
    add_flags(parser, RouterOptions, title="router settings", rename=_RENAMED)


def run(arguments: argparse.Namespace) -> int:
    """Route until a signal."""
    from headrace.server.listening import listen

    configure_logging(LogContext("router"), level=arguments.log_level, as_json=arguments.log_json)
    options = RouterOptions.from_dict(with_keys(given(arguments, RouterOptions, rename=_RENAMED), _KEYS))
    options.check_address(arguments.host)
    with listen(arguments.host, arguments.port) as listener:
        return event_loop.run(_route(arguments.urls, arguments.host, listener, options))


async def _route(urls: Sequence[str], host: str, listener: socket.socket, options: RouterOptions) -> int:
    from headrace.cluster.router import ReplicaRouter
    from headrace.server.listening import url_of

    loop, signalled = asyncio.get_running_loop(), asyncio.Event()
    router = ReplicaRouter(urls, options, host)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled.set)
    await router.start(listener)
    gc.collect()
    gc.freeze()  # what is loaded by now stays, and need not be walked again
    fields = {"url": url_of(listener, host), "replicas": len(router.replicas), "loop": type(loop).__module__}
    logger.info("routing", extra={"fields": fields})
    if not urls:
        logger.warning("no replica is given: requests wait, then get 503, until POST /workers names one")
    await signalled.wait()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
    logger.info("draining; a second signal ends at once")
    await router.stop()
    return 0
