"""The replicas of a router. Owns which there are, which of them may be chosen, the load of each as the router counts
it, and whether its weights are current. Sends nothing itself: `health` looks, `proxy`, `fan_out` and `updates` ask.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Collection, Iterator
from urllib.parse import urlsplit

from headrace.cluster.fence import NO_WEIGHTS, Fence
from headrace.cluster.policies import Ask, Candidate, Policy, ReplicaChoice
from headrace.cluster.upstream import Upstream
from headrace.types.errors import ConfigError, NeedsWeightsError, NotFoundError, UnreachableError, UpdateConflictError

MAX_REPLICAS = 4096
_MAX_HOST_BYTES = 253
logger = logging.getLogger(__name__)


class RemoteReplica:
    """One server. What is true of it is set by `Replicas` alone."""

    def __init__(self, number: int, url: str, upstream: Upstream) -> None:
        self.number = number
        self.id = f"replica-{number}"
        self.url = url
        self.host_header = url.partition("://")[2].encode()
        self.upstream = upstream
        self.is_healthy = False
        self.trouble = "not looked at yet"
        """Why it is not healthy, or would not start a request now; "" if it would."""
        self.unhealthy_since: float | None = None
        self.weight_version: str | None = None
        self.instance = b""
        """The process that answers there; b"" where it does not say."""
        self.held = 0
        """The update whose weights it holds (`Fence`)."""
        self.is_another_name = False
        """The same process answers at another replica's address, too, and is asked there."""
        self.is_current = True
        """Its weights are those of the last update that has returned: without that it is not chosen."""
        self.wanted_version: str | None = None
        """Of that update, while it is not current."""
        self.num_requests = 0
        self.num_tokens = 0
        self.num_sent = 0

    def is_at(self, instance: bytes) -> bool:
        """That process answers there; of one that does not say which it is nothing is known."""
        return bool(instance) and self.instance == instance

    @property
    def is_ready(self) -> bool:
        """A request would start there now, and may."""
        return self.is_healthy and self.is_current and not self.trouble

    @property
    def ailment(self) -> str:
        """Why it is not ready; "" if it is."""
        if self.trouble or self.is_current:
            return self.trouble
        return f"its weights are {self.weight_version!r}, not those of the last update, {self.wanted_version!r}"

    @property
    def candidate(self) -> Candidate:
        """It as a policy sees it."""
        return Candidate(self.number, self.num_requests, self.num_tokens)


class Replicas:
    """All of them, in the order in which they came. Lives on the router's loop."""

    def __init__(self, policy: Policy, make_upstream: Callable[[str, int], Upstream], wait_timeout: float) -> None:
        self._policy = policy
        self._make_upstream = make_upstream
        self._wait_timeout = wait_timeout
        self.fence = Fence()
        self._by_number: dict[int, RemoteReplica] = {}
        self._numbers = itertools.count()
        self._waiters: set[asyncio.Future[None]] = set()

    def __iter__(self) -> Iterator[RemoteReplica]:
        return iter(list(self._by_number.values()))

    def __len__(self) -> int:
        return len(self._by_number)

    def add(self, url: str) -> RemoteReplica:
        """A replica more, which is chosen once it is seen healthy. `UpdateConflictError` for one that is there."""
        host, port, plain = parse_url(url)
        if any(each.url == plain for each in self):
            raise UpdateConflictError(f"{plain} is a replica already", field="url")
        if len(self) >= MAX_REPLICAS:
            raise ConfigError(f"a router has at most {MAX_REPLICAS} replicas", field="url")
        replica = RemoteReplica(next(self._numbers), plain, self._make_upstream(host, port))
        if self.fence.number:
            self._set_held(replica, NO_WEIGHTS)
        self._by_number[replica.number] = replica
        return replica

    def remove(self, identity: str) -> RemoteReplica:
        """One less; what it was asked already it answers. `NotFoundError` for one that is not there."""
        replica = self.find(identity)
        del self._by_number[replica.number]
        self._policy.forget(replica.number)
        replica.upstream.close()
        return replica

    def find(self, identity: str) -> RemoteReplica:
        """The one of that id. `NotFoundError` if there is none."""
        for each in self:
            if each.id == identity:
                return each
        raise NotFoundError(f"there is no worker {identity[:100]!r}", field="worker_id")

    def set_healthy(
        self,
        replica: RemoteReplica,
        ailment: str,
        weight_version: str | None,
        instance: bytes = b"",
        *,
        has_weights: bool = True,
        now: float = 0.0,
    ) -> None:
        """It answers, from the process `instance`; `ailment` says why it would not start a request now, "" if it
        would. `weight_version` is None where it does not say; one that has no weights needs those of an update.

        A process that is healthy at another address, too, is not chosen or asked for a second time.
        """
        first = next((each for each in self if each is not replica and each.is_healthy and each.is_at(instance)), None)
        if first is not None:
            self._note_another_name(replica, first, now)
            return
        if not replica.is_healthy:
            logger.info("%s is healthy: %s", replica.id, replica.url)
        if instance != replica.instance:
            if replica.instance:
                self._policy.forget(replica.number)
                self._set_held(replica, NO_WEIGHTS)  # another process has other weights
            replica.instance = instance
        if not has_weights and self.fence.number:
            self._set_held(replica, NO_WEIGHTS)
        elif weight_version is not None:
            if weight_version != replica.weight_version:
                replica.weight_version = weight_version
                self._policy.forget(replica.number)  # what it cached belongs to other weights
            if not replica.is_current:
                self._set_held(replica, self.fence.held_by_label(weight_version))
        replica.is_healthy, replica.trouble = True, ailment
        replica.unhealthy_since, replica.is_another_name = None, False
        self._wake()

    def set_unhealthy(self, replica: RemoteReplica, reason: str, now: float) -> None:
        """It is not to be chosen until it is seen healthy again."""
        if replica.is_healthy or replica.unhealthy_since is None:
            logger.warning("%s is not healthy: %s: %s", replica.id, replica.url, reason)
            self._policy.forget(replica.number)
            replica.unhealthy_since = now
        replica.is_healthy, replica.trouble = False, reason
        replica.is_another_name = False
        if not replica.instance and self.fence.number:
            self._set_held(replica, NO_WEIGHTS)  # who does not say may be another process when it is back

    def _note_another_name(self, replica: RemoteReplica, first: RemoteReplica, now: float) -> None:
        replica.instance, replica.weight_version = first.instance, first.weight_version
        self.set_unhealthy(replica, f"the server there is {first.id}, {first.url}, under another name", now)
        replica.is_another_name = True
        self._set_held(replica, first.held)

    def pass_fence(self, version: str | None, updated: Collection[RemoteReplica]) -> list[RemoteReplica]:
        """An update has returned, and `updated` hold its weights. Returns those that have fallen behind by it: what
        they were asked is given up, so that nothing of older weights is answered from here on."""
        self.fence.advance(version, [each.weight_version for each in self])
        behind = []
        for each in self:
            self._policy.forget(each.number)
            if any(each is one or each.is_another_name and one.is_at(each.instance) for one in updated):
                each.weight_version = version or each.weight_version
                self._set_held(each, self.fence.number)
                continue
            was_current = each.is_current
            self._set_held(each, NO_WEIGHTS)
            if was_current:
                behind.append(each)
            each.upstream.cut_data(f"{each.id} left the rotation: {each.ailment}")
        self._wake()
        return behind

    def confirm(self, replica: RemoteReplica, fence_number: int) -> bool:
        """It was given the weights of that update, outside of one. False if they are not the current ones any more."""
        if fence_number != self.fence.number:
            return False
        self._set_held(replica, fence_number)
        replica.weight_version = self.fence.version or replica.weight_version
        self._wake()
        return True

    async def choose(self, ask: Ask, avoided: Collection[int] = ()) -> tuple[RemoteReplica, ReplicaChoice]:
        """A healthy replica; one that is ready and not among `avoided` if there is any. While none is healthy it waits,
        and raises `UnreachableError` after `wait_timeout`; `NeedsWeightsError` at once where none has current weights:
        then nothing helps but another update."""
        candidates = self._offered(avoided)
        if not candidates:
            candidates = await asyncio.get_running_loop().create_task(self._offered_later(avoided))
        choice = self._policy.choose(ask, candidates)
        return self._by_number[choice.number], choice

    def forget_caches(self) -> None:
        """No replica holds what it was sent."""
        for each in self:
            self._policy.forget(each.number)

    def note_sent(self, replica: RemoteReplica, choice: ReplicaChoice) -> None:
        """A request is at the replica from now on, until `note_answered`."""
        replica.num_requests += 1
        replica.num_tokens += choice.num_tokens
        replica.num_sent += 1

    def note_answered(self, replica: RemoteReplica, choice: ReplicaChoice) -> None:
        """It is there no more, whatever has become of it."""
        replica.num_requests -= 1
        replica.num_tokens -= choice.num_tokens

    def _offered(self, avoided: Collection[int]) -> list[Candidate]:
        ready = [
            each.candidate
            for each in self._by_number.values()
            if each.is_healthy and each.is_current and not each.trouble and each.number not in avoided
        ]
        return ready or self._offered_where_none_is_ready(avoided)

    async def _offered_later(self, avoided: Collection[int]) -> list[Candidate]:
        try:
            async with asyncio.timeout(self._wait_timeout):
                while not (candidates := self._offered(avoided)):
                    self._check_weights()
                    await self._changed()
                return candidates
        except TimeoutError:
            raise UnreachableError(self._why_none()) from None

    def _offered_where_none_is_ready(self, avoided: Collection[int]) -> list[Candidate]:
        healthy = [each for each in self._by_number.values() if each.is_healthy and each.is_current]
        others = [each for each in healthy if each.number not in avoided]
        return [each.candidate for each in others or healthy]

    def _check_weights(self) -> None:
        if self._by_number and not any(each.is_current for each in self):
            raise NeedsWeightsError(f"no replica holds the current weights: push all of them again ({self._told()})")

    def _set_held(self, replica: RemoteReplica, held: int) -> None:
        was_current = replica.is_current
        replica.held, replica.is_current = held, self.fence.admits(held)
        replica.wanted_version = self.fence.version
        if was_current and not replica.is_current:
            logger.warning("%s leaves the rotation: its weights are not those of %r", replica.id, self.fence.version)
        elif replica.is_current and not was_current:
            logger.info("%s is in the rotation again: it holds the current weights", replica.id)

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.pop()
            if not waiter.done():
                waiter.set_result(None)

    async def _changed(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    def _why_none(self) -> str:
        if not self:
            return "there is no replica: POST /workers adds one"
        return f"no replica is healthy ({self._told()})"

    def _told(self) -> str:
        """Why each is not ready."""
        told = [f"{each.id}: {each.ailment}" for each in self]
        return f"{'; '.join(told[:4])}{'; ...' if len(told) > 4 else ''}"


def _is_host(host: str) -> bool:
    """Whether it may be looked up."""
    try:
        return 0 < len(host.encode("idna")) <= _MAX_HOST_BYTES
    except UnicodeError:  # a part of it is empty, or too long
        return False


def parse_url(url: str) -> tuple[str, int, str]:
    """(host, port, the URL without what says nothing). `ConfigError` for what is no address of a replica."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise ConfigError(f"url {url!r} is no address: {error}", field="url") from None
    is_name = _is_host(host)
    is_bare = not (parts.username or parts.query or parts.fragment or parts.path.strip("/"))
    if parts.scheme != "http" or not is_name or not is_bare or not (url.isascii() and url.isprintable()) or " " in url:
        raise ConfigError(f"url {url!r} is no address like http://127.0.0.1:30000", field="url")
    port = 80 if port is None else port
    return host, port, f"http://{f'[{host}]' if ':' in host else host}:{port}"
