"""Replicas that are processes of this host: they are started, looked after, and started again within a budget.

Owns the processes and what each is given: a key that only the router knows, a seed, devices or threads. They listen on
loopback and end with this process, however it ends. Whether one may be chosen is `Replicas`' to say; a replacement has
no current weights before `catch_up` has brought them. Lives on the router's loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from headrace.client.runtime import START_SECONDS, ServerProcess
from headrace.cluster.fleet_options import FleetOptions
from headrace.cluster.health import Watch
from headrace.cluster.replicas import RemoteReplica, Replicas
from headrace.config.devices import cuda_devices
from headrace.config.engine_config import EngineConfig
from headrace.config.machine import available_cores
from headrace.engine.seeds import sample_seed
from headrace.ipc.restarts import RestartBudget
from headrace.telemetry import LOGGER_NAME, logging_words
from headrace.types.errors import ConfigError, EngineDeadError, HeadraceError

LOOK_SECONDS = 0.1
_DRAIN_SECONDS = 2.0
_SEED_BITS = 64
_DEVICES = "CUDA_VISIBLE_DEVICES"
logger = logging.getLogger(__name__)


class OwnedServer(Protocol):
    """A server process that ends with its owner (`ServerProcess`)."""

    @property
    def pid(self) -> int: ...

    @property
    def exit_code(self) -> int | None: ...

    def wait_started(self, timeout: float) -> str: ...

    def kill(self) -> None: ...

    def close(self) -> None: ...


class Member(msgspec.Struct):
    """One of the processes, and what it is started with."""

    number: int
    config: dict[str, Any]
    environment: dict[str, str]
    budget: RestartBudget
    process: OwnedServer | None = None
    replica: RemoteReplica | None = None


class Fleet:
    """The processes of one router: `dp_size` servers of the model of `engine`, whose settings `config` are as given, of
    the engine and of the server."""

    def __init__(
        self,
        engine: EngineConfig,
        config: Mapping[str, Any],
        options: FleetOptions,
        make_server: Callable[..., OwnedServer] = ServerProcess,
    ) -> None:
        """Raises `ConfigError` where there are not as many devices. `make_server` takes what `ServerProcess` takes."""
        self._make_server = make_server
        self.key = secrets.token_urlsafe(32)
        self.ended: asyncio.Future[HeadraceError]
        """Set when there is no process any more, and will be none."""
        self._model = engine.model
        self._engine = engine
        self._options = options
        own = {"api_key": self.key, "admin_api_key": None, "drain_timeout": _DRAIN_SECONDS}
        places = _places(engine, options.dp_size)
        budget = options.max_replica_restarts, options.replica_restart_window
        self._members = [
            Member(number, {**config, **own, **seed, **settings}, environment, RestartBudget(*budget))
            for number, (seed, (settings, environment)) in enumerate(
                zip(_seeds(engine, options.dp_size), places, strict=True)
            )
        ]
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, replicas: Replicas, watch: Watch) -> None:
        """Start all of them, at once, and register them in their order. Raises what keeps one from starting; none is
        left then."""
        self._replicas = replicas
        loop = asyncio.get_running_loop()
        self.ended = loop.create_future()
        starts = [loop.create_task(self._start(member)) for member in self._members]
        try:
            urls = await asyncio.gather(*starts)
        except BaseException:  # whatever it is: nobody would end them
            for each in starts:
                each.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            await self.close()
            raise
        for member, url in zip(self._members, urls, strict=True):
            member.replica = replicas.add(url)
            watch.begin(member.replica)
        self._tasks = [loop.create_task(self._look_after(member)) for member in self._members]

    async def close(self) -> None:
        """End them all, and wait until they are gone. Idempotent."""
        for task in self._tasks:
            task.cancel()
        processes = [each.process for each in self._members if each.process is not None]
        await asyncio.gather(*(asyncio.to_thread(each.close) for each in processes))

    async def _start(self, member: Member) -> str:
        """Start one, at the port that it had before. Returns its address."""
        port = 0 if member.replica is None else int(member.replica.url.rpartition(":")[2])
        words = (*_log_words(), "--log-role", f"replica {member.number}")
        process = self._make_server(self._model, member.config, words, port=port, environment=member.environment)
        member.process = process
        url = await asyncio.to_thread(process.wait_started, self._engine.start_timeout + START_SECONDS)
        logger.info("replica process started", extra={"fields": {"url": url, "pid": process.pid}})
        return url

    async def _look_after(self, member: Member) -> None:
        """Until its budget is spent."""
        while True:
            reason = await self._wait_ended(member)
            delay = member.budget.take(asyncio.get_running_loop().time())
            if delay is None:
                break
            logger.warning("%s: it is started again in %g s", reason, delay)
            await asyncio.sleep(delay)
            try:
                await self._start(member)
            except (HeadraceError, OSError) as error:
                logger.error("replica process %d did not start again: %s", member.number, error)
        budget = f"{self._options.max_replica_restarts} in {self._options.replica_restart_window:g} s"
        message = f"{reason}; max_replica_restarts {budget} are spent"
        logger.error("%s", message)
        member.process = None
        if not any(each.process for each in self._members) and not self.ended.done():
            self.ended.set_result(EngineDeadError(f"no replica is left: {message}"))

    async def _wait_ended(self, member: Member) -> str:
        """Wait until it has ended, or ended it for it hangs; nothing of it is left then. Returns why, in words."""
        process, replica, loop = member.process, member.replica, asyncio.get_running_loop()
        assert process is not None and replica is not None
        began = loop.time()
        while process.exit_code is None:
            since = replica.unhealthy_since
            if since is not None and loop.time() - max(since, began) > self._options.hang_timeout:
                logger.error("%s has answered nothing for %g s", replica.id, self._options.hang_timeout)
                process.kill()
            await asyncio.sleep(LOOK_SECONDS)
        reason = f"{replica.id}: its process {process.pid} ended with exit code {process.exit_code}"
        self._replicas.set_unhealthy(replica, reason, loop.time())
        replica.upstream.cut(reason)
        await asyncio.to_thread(process.close)
        return reason


def _log_words() -> list[str]:
    """With which a server logs as this process does."""
    level = logging.getLevelName(logging.getLogger(LOGGER_NAME).getEffectiveLevel()).lower()
    return ["--log-level", level, *(word for word in logging_words() if word == "--log-json")]


def _seeds(engine: EngineConfig, num_replicas: int) -> list[dict[str, int]]:
    """A default seed for each. Weights that a seed makes have to be the same."""
    if engine.load_format == "dummy":
        seed = secrets.randbits(_SEED_BITS) if engine.seed is None else engine.seed
        return [{"seed": seed}] * num_replicas
    if engine.seed is None:
        return [{}] * num_replicas  # each draws its own
    return [{"seed": sample_seed(engine.seed, number)} for number in range(num_replicas)]


def _places(engine: EngineConfig, num_replicas: int) -> Sequence[tuple[dict[str, Any], dict[str, str]]]:
    """(settings, environment) of each: devices of its own, or a share of this process's cores."""
    num_ranks = engine.tp_size * engine.pp_size
    num_devices = 0 if engine.device == "cpu" else len(cuda_devices())
    if not num_devices:
        num_threads = max(1, available_cores() // (num_replicas * num_ranks))
        is_told = engine.num_threads is not None or "OMP_NUM_THREADS" in os.environ
        return [({} if is_told else {"num_threads": num_threads}, {})] * num_replicas
    if num_devices < num_replicas * num_ranks:
        needed = f"{num_replicas} replicas of {num_ranks} ranks need {num_replicas * num_ranks} devices"
        raise ConfigError(f"{needed}, and this process sees {num_devices}", field="dp_size")
    names = [name.strip() for name in os.environ.get(_DEVICES, "").split(",") if name.strip()]
    names = names or [str(number) for number in range(num_devices)]
    shares = [names[first : first + num_ranks] for first in range(0, num_replicas * num_ranks, num_ranks)]
    return [({}, {_DEVICES: ",".join(share)}) for share in shares]
