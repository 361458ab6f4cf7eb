"""`headrace serve`: serve a model over HTTP until interrupted.

Owns the process's signals and its end: the first SIGTERM or SIGINT drains (new requests are refused, running ones
finish within `--drain-timeout`), a second one ends at once. An engine that is dead for good ends the process too. With
`--dp-size` over 1 there are several replicas, processes of their own (`serve_replicas`). With `--node-rank` over 0
nothing is served: the process has its share of the ranks, and ends with node 0.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import signal
import socket
from typing import Any, Literal

import msgspec

from headrace.cli import serve_replicas
from headrace.cli.config_file import ConfigFile, read_config_file
from headrace.cli.flags import add_flags, flag_names, given, with_keys
from headrace.cli.owner import Owner
from headrace.config import EngineConfig
from headrace.engine import AsyncEngine
from headrace.engine.core_host import resolve_settings
from headrace.server.options import ServerOptions, check_port, from_keywords
from headrace.telemetry import LogContext, configure_logging
from headrace.types.errors import ConfigError, HeadraceError
from headrace.types.plain_values import hint

DEFAULT_PORT = 30000
DEFAULT_CORE_RESTARTS = 3
_RENAMED = {"weight_roots": "weight_root", "save_roots": "save_root", "allowed_hosts": "allowed_host"}
logger = logging.getLogger(__name__)


class ProcessOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Where the process listens, and how it logs.

    host       address to listen on
    port       0: any free port
    log_level  least of what is logged
    log_json   log JSON lines
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_json: bool = False

    def __post_init__(self) -> None:
        check_port(self.port)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="a Hugging Face folder or hub id")
    parser.add_argument("--config", metavar="FILE", help="YAML file of flags; those of the command line win")
    parser.add_argument("--owner", type=int, metavar="FD", help=argparse.SUPPRESS)
    parser.add_argument("--log-role", default="front", help=argparse.SUPPRESS)
    add_flags(parser, ProcessOptions, title="process settings")
    serve_replicas.add_arguments(parser)
    add_flags(parser, ServerOptions, title="server settings", rename=_RENAMED)
    add_flags(parser, EngineConfig, title="engine settings", skip=("model",))


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal, or until the process ends that owns this one."""
    owner = None if arguments.owner is None else Owner(arguments.owner)
    try:
        return _run(arguments, owner)
    except HeadraceError as error:
        if owner is not None:
            owner.tell(error=error)
        raise


def _run(arguments: argparse.Namespace, owner: Owner | None) -> int:
    """Serve until a signal. Every setting is checked before the model is loaded; until it is, the answer is 503."""
    from headrace.server.listening import listen, url_of
    from headrace.server.starting import Starting

    found = read_given(arguments, owner)
    process, config, server_options = found.process, found.config, found.options
    if config.node_rank:
        context = LogContext(f"node {config.node_rank}")
        configure_logging(context, level=process.log_level, as_json=process.log_json)
        return host_node(config)
    with listen(process.host, process.port) as listener:
        if serve_replicas.fleet_options(found.fleet).dp_size > 1:
            return serve_replicas.serve_replicas(
                config, found.given, server_options, found.fleet, listener, process.host, owner
            )
        logger.debug("starting", extra={"fields": {"url": url_of(listener, process.host)}})
        with Starting(listener, server_options):
            engine = AsyncEngine(**msgspec.structs.asdict(config))
        try:
            return asyncio.run(_serve(engine, process.host, listener, server_options, owner))
        finally:
            engine.close()


class GivenSettings(msgspec.Struct, frozen=True):
    """All settings, checked. `given` are those of engine and server, and `fleet` those of several replicas, that
    somebody gave."""

    process: ProcessOptions
    config: EngineConfig
    options: ServerOptions
    given: dict[str, Any]
    fleet: dict[str, Any]


def read_settings(
    arguments: argparse.Namespace, owner: Owner | None = None
) -> tuple[ProcessOptions, EngineConfig, ServerOptions]:
    """See `read_given`."""
    found = read_given(arguments, owner)
    return found.process, found.config, found.options


def read_given(arguments: argparse.Namespace, owner: Owner | None = None) -> GivenSettings:
    """All settings, checked: those of the command line, then the owner's, then the file's. Logging follows them."""
    flags = given(arguments, EngineConfig, skip=("model",)) | given(arguments, ServerOptions, rename=_RENAMED)
    flags |= given(arguments, ProcessOptions) | serve_replicas.given_settings(arguments)
    if arguments.model is not None:
        flags["model"] = arguments.model
    file = _read_file(arguments.config).without(flags)
    with file.naming_lines():
        process = from_keywords(ProcessOptions, {**file.of(ProcessOptions), **_of(ProcessOptions, flags)}, "a setting")
    configure_logging(LogContext(arguments.log_role), level=process.log_level, as_json=process.log_json)
    if owner is not None:
        known = *EngineConfig.__struct_fields__, *ServerOptions.__struct_fields__, *serve_replicas.NAMES
        for name, value in owner.read_order().config.items():
            if name not in known:
                raise ConfigError(f"{name} is no setting of an engine or a server{hint(name, known)}", field=name)
            flags[name] = value
    with file.naming_lines():
        engine = {**file.of(EngineConfig), **_of(EngineConfig, flags)}
        config = EngineConfig.from_dict({"max_core_restarts": DEFAULT_CORE_RESTARTS, **engine})
        server = {**file.of(ServerOptions), **_of(ServerOptions, flags)}
        server_options = ServerOptions.from_dict(with_keys(server))
        all_given = {**file.values, **flags}
        fleet = {name: all_given[name] for name in serve_replicas.NAMES if name in all_given}
        serve_replicas.check_settings(fleet)
        if not config.node_rank:
            server_options.check_address(process.host)
    engine.pop("model", None)
    return GivenSettings(process, config, server_options, {**engine, **server}, fleet)


def _read_file(path: str | None) -> ConfigFile:
    if path is None:
        return ConfigFile()
    flags = flag_names(ProcessOptions) | flag_names(EngineConfig) | flag_names(ServerOptions, rename=_RENAMED)
    return read_config_file(path, flags | serve_replicas.flags_of_settings())


def _of(settings: type[msgspec.Struct], values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in settings.__struct_fields__}


def host_node(config: EngineConfig) -> int:
    """Have the ranks of a node that is not the first: nothing listens here, and it ends with node 0, or by a signal."""
    from headrace.core.rank_node import NodeKeeper

    keeper = NodeKeeper(resolve_settings(config))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: keeper.stop())
    keeper.run()
    return 0


async def _serve(
    engine: AsyncEngine, host: str, listener: socket.socket, options: ServerOptions, owner: Owner | None
) -> int:
    """Serve on the engine's loop; this one only waits for a signal, then for the running requests."""
    from headrace.server import serve

    loop, signalled = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, number, signalled)
    server = await serve(engine, host=host, listener=listener, **msgspec.structs.asdict(options))
    # What is loaded by now stays: without this each full collection walks it again, about 1 ms per request.
    gc.collect()
    gc.freeze()
    # A full collection waits for ten times as many new objects: all else waits for it, and 65,536 sequences are many.
    gc.set_threshold(*gc.get_threshold()[:2], 100)
    seed = engine.resolved.engine.seed
    logger.info("serving", extra={"fields": {"url": server.url, "model": engine.config.model, "seed": seed}})
    if owner is not None:
        owner.tell(url=server.url)
    end = await _first_of(signalled, engine)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
    if end is not None:
        await server.stop(0.0)
        raise end
    logger.info("draining; a second signal ends at once")
    await server.stop()
    return 0


async def _first_of(signalled: asyncio.Event, engine: AsyncEngine) -> HeadraceError | None:
    """Wait for a signal; returns the reason if the engine ends before one comes."""
    signal_comes, engine_ends = asyncio.create_task(signalled.wait()), asyncio.create_task(engine.wait_ended())
    await asyncio.wait([signal_comes, engine_ends], return_when=asyncio.FIRST_COMPLETED)
    is_over = engine_ends.done() and not signal_comes.done()
    signal_comes.cancel()
    engine_ends.cancel()
    return engine_ends.result() if is_over else None


def _on_signal(number: signal.Signals, signalled: asyncio.Event) -> None:
    logger.info("received %s", number.name)
    signalled.set()
