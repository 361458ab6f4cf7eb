"""What rank 0 has of any other rank, wherever that runs."""

from __future__ import annotations

from typing import Protocol

from headrace.ipc.rank_channel import RankChannel
from headrace.ipc.rank_page import RankPage


class RankPeer(Protocol):
    """One other rank. `channel` is for one thread; all else for any.

    `shares_memory`: it opens what rank 0 has in shared memory. It is silent, and lost, once it has not beaten for
    `silent_seconds`.
    """

    rank: int
    channel: RankChannel
    page: RankPage
    shares_memory: bool
    silent_seconds: float

    @property
    def name(self) -> str:
        """As in "rank 1 (process 4242)"."""

    @property
    def is_stopped(self) -> bool:
        """Whether it is known that a signal keeps it from running."""

    def has_started(self) -> None:
        """It executes plans from now on."""

    def describe_exit(self, seconds: float = 0.0) -> str:
        """How it ended, in words, if it does within so many seconds; "" while it runs."""

    def kill(self) -> None:
        """End it now, whatever it does; what is not ours to end is left to itself."""

    def close(self, seconds: float) -> None:
        """Let go of it, and wait up to `seconds` for its end. Idempotent."""
