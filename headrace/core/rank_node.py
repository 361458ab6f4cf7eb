"""A replica over several hosts, its nodes: where they meet, and the process of every node but the first.

That process, the keeper, says to rank 0 where its ranks would be, starts one process for each once all nodes have come,
and ends them with rank 0. Where a rank was lost, another rank 0 may take the place of the first: the keeper comes to it
again. Owns the address, the secret and the keeper's life. Decides nothing about the replica.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time

from headrace.config import ResolvedConfig
from headrace.core.rank_terms import GuestPlace, terms_of
from headrace.ipc import PeerClosed
from headrace.ipc.rank_guest import GuestLink, Over, Seated, Started
from headrace.ipc.rank_meeting import (
    ROLES,
    Address,
    GuestHello,
    Meeting,
    RankHello,
    StoreTunnel,
    WrongSecret,
    reach,
)
from headrace.ipc.rank_spawn import KeptRank, keep_rank
from headrace.types.errors import ConfigError, DeadlineError, EngineDeadError
from headrace.types.weights import BufferRef

logger = logging.getLogger(__name__)

SECRET_NAME = "HEADRACE_DIST_SECRET"
MIN_SECRET_BYTES = 16
RETRY_SECONDS = 0.25
LOOK_SECONDS = 0.1
END_SECONDS = 5.0


def meet_nodes(resolved: ResolvedConfig) -> Meeting:
    """Where the other nodes come to this one, which is the first. Raises `ConfigError`."""
    address, num_others = address_of(resolved), resolved.engine.nnodes - 1
    secret, where = secret_of_nodes(), resolved.engine.dist_init_addr
    try:
        family, *_, found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server((str(found[0]), int(found[1])), family=family, backlog=64)
    except OSError as error:
        message = f"node 0 cannot listen on dist_init_addr {where}: {error.strerror or error}"
        raise ConfigError(message, field="dist_init_addr") from None
    missing = f"not come to {where} in time"
    return Meeting(listener, secret, num_guests=num_others, kind="node", missing=missing)


def address_of(resolved: ResolvedConfig) -> Address:
    """Where nodes meet."""
    host, _, port = (resolved.engine.dist_init_addr or "").rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def secret_of_nodes() -> bytes:
    """What every node has in its environment. Raises `ConfigError`."""
    secret = os.environ.get(SECRET_NAME, "").strip().encode("utf-8", "surrogateescape")
    if len(secret) < MIN_SECRET_BYTES:
        message = f"{SECRET_NAME} must hold at least {MIN_SECRET_BYTES} characters, the same on every node (nnodes > 1)"
        raise ConfigError(message, field=SECRET_NAME)
    return secret


class NodeKeeper:
    """The ranks of one node, `engine.node_rank`, from one rank 0 to the next. `stop` may be called from anywhere."""

    def __init__(self, resolved: ResolvedConfig) -> None:
        self._resolved = resolved
        self._address, self._secret = address_of(resolved), secret_of_nodes()
        self._terms = terms_of(resolved)
        self._stop = threading.Event()
        self._until = 0.0

    def stop(self) -> None:
        """End."""
        self._stop.set()

    def run(self) -> None:
        """Returns when rank 0 has ended for good, or after `stop`. Raises `DeadlineError` where no rank 0 is found for
        `start_timeout`, `ConfigError` and whatever else rank 0 says that keeps the replica from starting."""
        is_over = False
        self._await_longer()
        while not (is_over or self._stop.is_set()):
            tunnel = StoreTunnel(self._address, self._secret)
            try:
                is_over = self._serve_one(tunnel)
            finally:
                tunnel.close()

    def _serve_one(self, tunnel: StoreTunnel) -> bool:
        """Belong to one rank 0 until it is gone; whether there will be no other."""
        link = self._join(tunnel)
        if link is None:
            return True
        ranks: list[KeptRank] = []
        has_started = is_lost = False
        try:
            while not self._stop.is_set():
                word = link.hear(LOOK_SECONDS)
                match word:
                    case Seated():
                        ranks = self._start(word.ranks)
                    case Started() if not has_started:
                        has_started = True
                        logger.info("this node executes plans", extra={"fields": {"ranks": len(ranks)}})
                    case Over():
                        is_lost = word.is_lost
                        if has_started:
                            self._await_longer()
                        return self._has_ended(word, has_started)
            return True
        finally:
            link.close()
            for rank in ranks:
                rank.close(0.0 if is_lost or self._stop.is_set() else END_SECONDS)

    def _join(self, tunnel: StoreTunnel) -> GuestLink | None:
        """Say to a rank 0 what is here, as soon as there is one."""
        number, place = self._resolved.engine.node_rank, GuestPlace.of(self._resolved, tunnel.port).encode()
        # Memory of this host is not that of rank 0, also where it is: so every node is like any other.
        hello = GuestHello(number, f"node {number}", os.getpid(), self._terms, BufferRef("", 0), place)
        problem = "it lets nobody in"
        while not self._stop.is_set():
            if time.monotonic() >= self._until:
                where, seconds = self._resolved.engine.dist_init_addr, self._resolved.engine.start_timeout
                message = f"node {number} has found no node 0 at {where} for {seconds:g} s: {problem}"
                raise DeadlineError(message, field="dist_init_addr")
            try:
                return GuestLink(reach(self._address, self._secret, lambda _: hello))
            except WrongSecret:
                raise ConfigError(f"node 0 has another secret in {SECRET_NAME}", field=SECRET_NAME) from None
            except (OSError, PeerClosed) as error:
                problem = str(error)
            self._stop.wait(RETRY_SECONDS)
        return None

    def _start(self, numbers: tuple[int, ...]) -> list[KeptRank]:
        """Start ranks, each with its connections. None where rank 0 is gone meanwhile, which it will say."""
        ranks: list[KeptRank] = []
        with contextlib.suppress(OSError, PeerClosed, WrongSecret):
            for number in numbers:
                channel, page = (self._connect(RankHello(number, role)) for role in ROLES)
                ranks.append(keep_rank(number, channel, page))
        return ranks

    def _connect(self, hello: RankHello) -> socket.socket:
        return reach(self._address, self._secret, lambda _: hello)

    def _await_longer(self) -> None:
        """There has been a rank 0: another one has as long to come."""
        self._until = time.monotonic() + self._resolved.engine.start_timeout

    def _has_ended(self, word: Over, has_started: bool) -> bool:
        if word.error is not None:
            raise word.error.to_exception()
        if word.is_lost:
            if has_started:
                logger.warning("rank 0 or another rank is lost: this node waits for the next rank 0")
            self._stop.wait(RETRY_SECONDS)
            return False
        if not has_started:
            raise EngineDeadError("rank 0 has ended before it had started")
        logger.info("rank 0 has ended")
        return True
