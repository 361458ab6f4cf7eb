"""Which of many replicas serve, and at which address. Owns that list, whether an update of all of them is open, and
what a router knows of them.

One actor of Ray's, `ReplicaRoster`, has it: replicas come to it when they start, also when Ray has started them again,
and who pushes weights asks it whom to push to. Must not know engines, tensors or requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec

from headrace.types.errors import DeadlineError, UnreachableError, UpdateConflictError

ROUTER_SECONDS = 30.0
logger = logging.getLogger(__name__)


class EnrolledReplica(msgspec.Struct, frozen=True):
    """A replica that serves: its number, the handle of its actor, its address, and what the router calls it ("" without
    a router)."""

    number: int
    actor: Any
    url: str
    worker_id: str = ""


class RosterNews(msgspec.Struct, frozen=True):
    """What a replica that starts is told: the others that serve, and how many updates all of them have had."""

    peers: list[Any]
    num_updates: int


class UpdateOfAll(msgspec.Struct, frozen=True):
    """An update of all replicas: its number, and the members that it is for."""

    number: int
    members: list[EnrolledReplica]


class ReplicaRoster:
    """The list. Its coroutines run on one loop, that of its actor."""

    def __init__(self, router: str, router_key: str | None) -> None:
        """`router` is the address of one that replicas are to be registered with, or ""."""
        self._router = router.rstrip("/")
        self._headers = {} if router_key is None else {"authorization": f"Bearer {router_key}"}
        self._members: dict[int, EnrolledReplica] = {}
        self._num_updates = 0
        self._num_begun = 0
        self._update_ends = 0.0  # of the open update; 0.0: none is open
        self._update_is_over = asyncio.Event()
        self._update_is_over.set()

    async def members(self) -> list[EnrolledReplica]:
        """Those that serve, in the order of their numbers."""
        return [self._members[number] for number in sorted(self._members)]

    async def arrive(self, number: int) -> RosterNews:
        """A replica starts that is to have the weights of the others. Waits while an update is open."""
        await self.dismiss(number)
        await self._no_update()
        return RosterNews([each.actor for each in self._members.values()], self._num_updates)

    async def enroll(self, number: int, actor: Any, url: str, num_updates: int) -> bool:
        """It serves from now on. False if there was an update since it arrived, or one is open: then its weights are
        not those of the others, and it is to arrive again. `UnreachableError` if the router does not take it."""
        if num_updates != self._num_updates or self._is_updating:
            return False
        worker_id = await self._register(url) if self._router else ""
        if num_updates != self._num_updates or self._is_updating:  # meanwhile
            await self._withdraw(worker_id)
            return False
        self._members[number] = EnrolledReplica(number, actor, url, worker_id)
        return True

    async def dismiss(self, number: int) -> None:
        """It serves no more. Nothing happens if it did not."""
        member = self._members.pop(number, None)
        if member is not None:
            await self._withdraw(member.worker_id)

    async def begin_update(self, seconds: float) -> UpdateOfAll:
        """All that serve are to get new weights, within so many seconds: after these the update counts as over, as
        whoever began it may be gone. `UpdateConflictError` while another is open."""
        if self._is_updating:
            raise UpdateConflictError("another update of these replicas is open", field="version")
        self._num_begun += 1
        self._update_ends = time.monotonic() + seconds
        self._update_is_over.clear()
        return UpdateOfAll(self._num_begun, await self.members())

    async def end_update(self, number: int, has_committed: bool) -> None:
        """The update of that number is over. Whether it was one that any replica took."""
        self._num_updates += has_committed
        if number == self._num_begun:
            self._update_ends = 0.0
            self._update_is_over.set()

    async def close(self) -> None:
        """Take all of them from the router."""
        for number in list(self._members):
            await self.dismiss(number)

    @property
    def _is_updating(self) -> bool:
        return time.monotonic() < self._update_ends

    async def _no_update(self) -> None:
        while self._is_updating:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._update_is_over.wait(), self._update_ends - time.monotonic())

    async def _register(self, url: str) -> str:
        """Add a replica to the router, which looks at its health itself; its name there."""
        async with self._calling() as http:
            answer = await http.post("/workers", json={"url": url})
            if answer.status_code >= 300:
                raise UnreachableError(f"the router at {self._router} does not take {url}: {answer.text[:200]}")
            return str(answer.json()["worker_id"])

    async def _withdraw(self, worker_id: str) -> None:
        """Take a replica from the router. One that cannot be taken away the router sees to be dead."""
        if not worker_id:
            return
        try:
            async with self._calling() as http:
                await http.delete(f"/workers/{worker_id}")
        except (UnreachableError, DeadlineError) as error:
            logger.warning("%s stays registered: %s", worker_id, error)

    @contextlib.asynccontextmanager
    async def _calling(self) -> AsyncIterator[httpx.AsyncClient]:
        options: Any = {"headers": self._headers, "timeout": ROUTER_SECONDS, "trust_env": False}
        try:
            async with httpx.AsyncClient(base_url=self._router, **options) as http:
                yield http
        except httpx.TimeoutException:
            message = f"the router at {self._router} did not answer within {ROUTER_SECONDS:g} s"
            raise DeadlineError(message, field="router") from None
        except httpx.HTTPError as error:
            raise UnreachableError(f"the router at {self._router} cannot be asked: {error}", field="router") from None
