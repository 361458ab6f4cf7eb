"""The two ends of a link, as interfaces. Owns what a caller may rely on; knows no transport.

A link carries `Command`s one way and `Output`s the other, in order, none lost and none doubled while both ends live.
Either end learns of the other's death at once: the core by `PeerClosed`, the front by `on_close`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from headrace.types.messages import Command, Output


class PeerClosed(Exception):
    """The other end is gone, or does not read any more. Nothing can be sent or received on this link again."""


class CoreLink(Protocol):
    """The core's end; used by one thread, the one that runs the step loop."""

    @property
    def is_behind(self) -> bool:
        """True while much of what was sent waits for the front to read it."""

    def poll(self, timeout: float) -> list[Command]:
        """Every command that has arrived, waiting up to `timeout` seconds for the first one.

        Raises `PeerClosed` once the front is gone and all it sent has been returned.
        """

    def send(self, output: Output) -> None:
        """Send without waiting; waits only while the backlog is over its bound, and not for ever.

        Raises `PeerClosed` when the front is gone or has not read for the link's stall timeout.
        """

    def close(self) -> None:
        """Send what is still queued, within a short deadline, and close. Idempotent."""


class FrontLink(Protocol):
    """The front's end; used from one asyncio loop, the one that called `start`."""

    async def start(self, on_output: Callable[[Output], None], on_close: Callable[[str], None]) -> None:
        """Deliver outputs to `on_output` on this loop from now on.

        `on_close(reason)` is called once if the core goes away; it is not called after `close`.
        """

    def send(self, command: Command) -> None:
        """Queue a command; never blocks.

        Raises `EngineDeadError` when the link is closed, `UnavailableError` when too much waits to be sent.
        """

    async def close(self) -> None:
        """Close this end, which ends the core. Idempotent."""
