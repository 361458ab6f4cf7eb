"""`headrace serve`: serve a model over HTTP until interrupted.

Owns the process's signals and its end: the first SIGTERM or SIGINT drains (new requests are refused, running ones
finish within `--drain-timeout`), a second one ends at once.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
from typing import Any

import msgspec

from headrace.cli.flags import add_flags, given
from headrace.config import EngineConfig
from headrace.engine import AsyncEngine
from headrace.server.options import ServerOptions
from headrace.telemetry import LogContext, configure_logging
from headrace.types.errors import ConfigError

DEFAULT_PORT = 30000
_RENAMED = {"weight_roots": "weight_root"}
logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `headrace serve`."""
    parser.add_argument("model", help="a Hugging Face folder or hub id")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help=f"0: any free port (default: {DEFAULT_PORT})")
    levels = ("debug", "info", "warning", "error")
    parser.add_argument("--log-level", default="info", choices=levels, help="(default: info)")
    parser.add_argument("--log-json", action="store_true", help="log JSON lines")
    add_flags(parser, ServerOptions, title="server settings", rename=_RENAMED)
    add_flags(parser, EngineConfig, title="engine settings", skip=("model",))


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal. Every setting is checked before the model is loaded."""
    from rich.console import Console

    configure_logging(LogContext("front"), level=arguments.log_level, as_json=arguments.log_json)
    config = EngineConfig.from_dict({"model": arguments.model, **given(arguments, EngineConfig)})
    options = given(arguments, ServerOptions, rename=_RENAMED)
    ServerOptions.from_dict(options).check_address(arguments.host)
    if not 0 <= arguments.port <= 65535:
        raise ConfigError(f"port must be in [0, 65535], got {arguments.port}", field="port")
    with Console(stderr=True).status(f"loading {config.model}"):
        engine = AsyncEngine(**msgspec.structs.asdict(config))
    try:
        return asyncio.run(_serve(engine, arguments.host, arguments.port, options))
    finally:
        engine.close()


async def _serve(engine: AsyncEngine, host: str, port: int, options: dict[str, Any]) -> int:
    """Serve on the engine's loop; this one only waits for a signal. Closing the engine then drains the server."""
    loop, signalled = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, number, signalled)
    server = await engine.serve(port, host, **options)
    logger.info("serving", extra={"fields": {"url": server.url, "model": engine.config.model}})
    await signalled.wait()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
    logger.info("draining; a second signal ends at once")
    return 0


def _on_signal(number: signal.Signals, signalled: asyncio.Event) -> None:
    logger.info("received %s", number.name)
    signalled.set()

