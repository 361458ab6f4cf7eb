"""`headrace serve --dp-size N`: N servers of the model, each a process of this host, behind a router in this process.

Owns which settings go to the router and which to the servers, and the order of start and end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import signal
import socket
from collections.abc import Mapping
from typing import Any

from headrace.cli.flags import add_flags, flag_names, given
from headrace.cli.owner import Owner
from headrace.cluster import event_loop
from headrace.cluster.fleet_options import FleetOptions
from headrace.cluster.options import RouterOptions
from headrace.config import EngineConfig
from headrace.server.options import ServerOptions
from headrace.types.errors import ConfigError, HeadraceError

_SHARED = ("api_key", "admin_api_key", "allowed_hosts", "insecure", "access_log")
_OF_FRONT = frozenset((*_SHARED, "api_key_file", "admin_api_key_file"))
_BOUNDS = ("max_body_bytes", "body_timeout", "write_timeout", "drain_timeout")
_NOT_FLAGS = frozenset(ServerOptions.__struct_fields__) | frozenset(EngineConfig.__struct_fields__)
_IS_THEIRS = ("replica_",)
_SKIPPED = tuple(name for name in RouterOptions.__struct_fields__ if name in _NOT_FLAGS or name.startswith(_IS_THEIRS))
_OWN = tuple(name for name in RouterOptions.__struct_fields__ if name not in _SKIPPED)
NAMES = (*FleetOptions.__struct_fields__, *_OWN)
"""The settings that are of the replicas together, not of one engine or server."""
logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, FleetOptions, title="replicas")
    add_flags(parser, RouterOptions, title="routing between replicas (--dp-size over 1)", skip=_SKIPPED)


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those of `NAMES` that were given as flags."""
    return {**given(arguments, FleetOptions), **given(arguments, RouterOptions, skip=_SKIPPED)}


def flags_of_settings() -> dict[str, str]:
    """The names of their flags, as in a file, and the settings they are."""
    of_router = flag_names(RouterOptions)
    return flag_names(FleetOptions) | {flag: name for flag, name in of_router.items() if name in _OWN}


def fleet_options(settings: Mapping[str, Any]) -> FleetOptions:
    """How many replicas are asked for; what only several have is refused of one."""
    options = FleetOptions.from_dict({name: settings[name] for name in settings if name not in _OWN})
    for name in settings:
        if name != "dp_size" and options.dp_size == 1:
            raise ConfigError(f"{name} is for several replicas: give dp_size, too", field=name)
    return options


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise `ConfigError` naming what of `NAMES` no replicas can have, or is there for several alone."""
    fleet_options(settings)
    RouterOptions.from_dict({name: settings[name] for name in settings if name in _OWN})


def serve_replicas(
    config: EngineConfig,
    settings: Mapping[str, Any],
    options: ServerOptions,
    fleet: Mapping[str, Any],
    listener: socket.socket,
    host: str,
    owner: Owner | None,
) -> int:
    """Serve until a signal. `settings` are those of engine and server as given; `fleet` those of `NAMES`."""
    if config.nnodes > 1:
        raise ConfigError("dp_size: a replica over several hosts is started by itself, and routed to", field="dp_size")
    for_router = {name: fleet[name] for name in fleet if name in _OWN}
    for_router |= {name: getattr(options, name) for name in (*_SHARED, *_BOUNDS)}
    for_router["control_timeout"] = config.control_timeout
    return event_loop.run(_serve(config, settings, for_router, fleet_options(fleet), listener, host, owner))


async def _serve(
    config: EngineConfig,
    settings: Mapping[str, Any],
    for_router: dict[str, Any],
    fleet_settings: FleetOptions,
    listener: socket.socket,
    host: str,
    owner: Owner | None,
) -> int:
    from headrace.cluster.catch_up import WeightsFolder
    from headrace.cluster.fleet import Fleet
    from headrace.cluster.router import ReplicaRouter
    from headrace.server.listening import url_of

    loop, signalled = asyncio.get_running_loop(), asyncio.Event()
    with contextlib.closing(WeightsFolder()) as folder:
        roots = {name: (*settings.get(name, ()), str(folder.path)) for name in ("weight_roots", "save_roots")}
        of_replicas = {name: value for name, value in settings.items() if name not in _OF_FRONT} | roots
        fleet = Fleet(config, of_replicas, fleet_settings)
        router = ReplicaRouter([], RouterOptions(**for_router, replica_api_key=fleet.key), host, folder.path)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, signalled.set)
        await router.start(listener)
        try:
            end = await _until_end(fleet, router, signalled, url_of(listener, host), owner)
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
            if end is not None:
                raise end
            logger.info("draining; a second signal ends at once")
        finally:
            await router.stop(None if signalled.is_set() else 0.0)
            await fleet.close()
    return 0


async def _until_end(
    fleet: Any, router: Any, signalled: asyncio.Event, url: str, owner: Owner | None
) -> HeadraceError | None:
    """Start the replicas, and wait for a signal or for the end of the last one: the reason, if it is that."""
    loop = asyncio.get_running_loop()
    waiting, starting = loop.create_task(signalled.wait()), loop.create_task(router.start_fleet(fleet))
    await asyncio.wait([waiting, starting], return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.wait([starting])
        return None
    starting.result()
    gc.collect()
    gc.freeze()  # what is loaded by now stays, and need not be walked again
    logger.info("serving", extra={"fields": {"url": url, "replicas": len(router.replicas)}})
    if owner is not None:
        owner.tell(url=url)
    await asyncio.wait([waiting, fleet.ended], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    return fleet.ended.result() if fleet.ended.done() and not signalled.is_set() else None
