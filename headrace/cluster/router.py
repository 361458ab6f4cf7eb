"""A router: connections of clients in front, replicas behind, and the table of routes between. Puts the parts together;
decides nothing else."""

from __future__ import annotations

import asyncio
import functools
import socket
from collections.abc import Sequence
from pathlib import Path

from headrace.cluster.catch_up import CatchUp
from headrace.cluster.exchange import Exchange
from headrace.cluster.fan_out import FanOut
from headrace.cluster.fleet import Fleet
from headrace.cluster.front import EarlyAnswer, Front, FrontBounds, not_found
from headrace.cluster.groups import SharedGroups
from headrace.cluster.health import Watch
from headrace.cluster.http_parts import Head
from headrace.cluster.lookout import Lookout
from headrace.cluster.metrics import RouterMetrics
from headrace.cluster.options import RouterOptions
from headrace.cluster.own_calls import OwnCalls
from headrace.cluster.pages import PAGE_PATHS, RouterPages
from headrace.cluster.policies import make_policy
from headrace.cluster.proxy import Proxy
from headrace.cluster.replicas import Replicas
from headrace.cluster.routes import RouterRoute, route_of, worker_of_metrics
from headrace.cluster.sessions import SharedSessions
from headrace.cluster.updates import WeightUpdates
from headrace.cluster.upstream import Upstream
from headrace.server.auth import keys_of, refusal_of
from headrace.server.browsers import Hosts
from headrace.server.errors import body_of, error_body
from headrace.types.errors import ShutdownError


class ReplicaRouter:
    """Routes to the servers at `urls`. Lives on the running loop, from `start` to `stop`."""

    def __init__(
        self,
        urls: Sequence[str],
        options: RouterOptions,
        host: str = "127.0.0.1",
        weights_folder: Path | None = None,
    ) -> None:
        """`weights_folder`: one that all replicas may save to and read from, by which one that has no current weights
        takes them from a peer."""
        self._options = options
        make_upstream = functools.partial(
            Upstream, connect_timeout=options.connect_timeout, answer_timeout=options.answer_timeout
        )
        policy = make_policy(options.policy, options.max_index_blocks)
        self.replicas = Replicas(policy, make_upstream, options.wait_timeout)
        for url in urls:
            self.replicas.add(url)
        self._metrics = RouterMetrics(self.replicas)
        self._watch = Watch(self.replicas, options.stuck_timeout)
        self._lookout = Lookout(self.replicas, options)
        self._own = OwnCalls(self.replicas, self._watch, self._metrics)
        self._pages = RouterPages(self._lookout)
        self._proxy = Proxy(self.replicas, options, self._metrics)
        self._fan_out = FanOut(self.replicas, options)
        self._updates = WeightUpdates(self.replicas, options, self._metrics)
        self._sessions = SharedSessions(self._updates, options)
        self._groups = SharedGroups(self.replicas, self._updates, options)
        self._catch_up: asyncio.Task[None] | None = None
        self._weights_folder = weights_folder
        self._keys = keys_of(options.api_key, options.admin_api_key)
        self._hosts = Hosts(host, options.allowed_hosts)
        bounds = FrontBounds(options.max_body_bytes, options.body_timeout, options.write_timeout)
        self._front = Front(self, bounds, logs_answers=options.access_log)

    async def start(self, listener: socket.socket) -> None:
        """Answer on `listener` from now on, and look at the replicas."""
        for each in self.replicas:
            self._watch.begin(each)
        await self._front.start(listener)
        if self._weights_folder is not None:
            catch_up = CatchUp(self.replicas, self._updates, self._options, self._weights_folder)
            self._catch_up = asyncio.get_running_loop().create_task(catch_up.run())

    async def start_fleet(self, fleet: Fleet) -> None:
        """Have replicas that are processes of this host."""
        await fleet.start(self.replicas, self._watch)

    async def stop(self, timeout: float | None = None) -> None:
        """Refuse what comes (503), let what runs end within `timeout` seconds (`drain_timeout`), then close."""
        self._own.is_draining = True
        await self._front.close(self._options.drain_timeout if timeout is None else timeout)
        self._watch.close()
        self._lookout.close()
        self._updates.close()
        await self._fan_out.close()
        if self._catch_up is not None:
            self._catch_up.cancel()
            await asyncio.wait([self._catch_up])
        for each in self.replicas:
            each.upstream.close()
        await asyncio.sleep(0)  # the transports close

    def refusal(self, head: Head) -> EarlyAnswer | None:
        """See `Handler`."""
        route, refusal = head.derived(self._judged)
        if refusal is None and self._own.is_draining and route is not None and route.treatment != "own":
            return EarlyAnswer(body_of(ShutdownError("the router is shutting down")))
        return refusal

    def _judged(self, head: Head) -> tuple[RouterRoute | None, EarlyAnswer | None]:
        """The route of a request, and the answer to one that is refused. Neither the keys nor anything else that
        decides it ever changes."""
        route = route_of(head.path)
        needed = "data" if route is None else route.access
        body = refusal_of({"headers": head.headers}, needed, self._keys, self._hosts)
        return route, EarlyAnswer(body) if body else _misdirected(head, route)

    async def answer(self, head: Head, body: bytes, exchange: Exchange) -> None:
        """See `Handler`."""
        path = head.path
        route, _ = head.derived(self._judged)
        assert route is not None  # or it had been refused
        try:
            if route.treatment in ("generate", "route"):
                await self._proxy.pass_on(head, body, exchange, generates=route.treatment == "generate")
            elif route.treatment != "own":
                await asyncio.create_task(self._command(route, head, body, exchange))
            elif path in PAGE_PATHS or worker_of_metrics(path):
                await asyncio.create_task(self._pages.answer(head, exchange))
            else:
                self._own.answer(head, body, exchange)
        except asyncio.CancelledError:
            self._metrics.disconnects.inc()
            raise
        finally:
            if route.treatment == "generate":
                self._metrics.observe(path, exchange.status if exchange.is_complete else 0, exchange.seconds())

    async def _command(self, route: RouterRoute, head: Head, body: bytes, exchange: Exchange) -> None:
        """A call that all replicas answer."""
        if route.treatment == "fan_out":
            await self._fan_out.command(head, body, exchange)
        elif route.treatment == "agree":
            await self._fan_out.question(head, body, exchange)
        elif route.treatment == "update":
            await self._updates.command(head, body, exchange)
        elif route.treatment == "group":
            await self._groups.command(head, body, exchange)
        else:
            await self._sessions.command(head, body, exchange)


def _misdirected(head: Head, route: RouterRoute | None) -> EarlyAnswer | None:
    """The answer to what is no call of a router."""
    what = f"{head.method} {head.path[:200]}"
    if route is None:
        return EarlyAnswer(not_found(what))
    if ("GET" if head.method == "HEAD" else head.method) not in route.methods:
        allowed = ", ".join((*route.methods, "HEAD") if "GET" in route.methods else route.methods)
        return EarlyAnswer(error_body(405, f"Method Not Allowed: {what}", kind="405"), ((b"allow", allowed.encode()),))
    if route.treatment == "refuse":
        return EarlyAnswer(error_body(501, f"{what} does not go through a router: {route.advice}"))
    return None
