"""The processes of the other ranks of this host, from their beginning until a replica has them: they load torch as soon
as they are there, and prepare their devices once they have their settings.

Owns who has begun, who has been told, and that none is left of those whom no replica takes.
"""

from __future__ import annotations

import contextlib

from headrace.config import ResolvedConfig
from headrace.ipc import PeerClosed
from headrace.ipc.rank_spawn import RankProcess, start_rank


class BegunRanks:
    """None at first. Used by one thread at a time; `shares_process`: this process is a caller's."""

    def __init__(self, *, shares_process: bool = False) -> None:
        self._shares_process = shares_process
        self._children: list[RankProcess] = []
        self._num_settled = 0

    def begin(self, num_here: int) -> None:
        """Have `num_here` ranks on this host: the first, which is this process, and a child for each other one; those
        that there are stay. Raises `OSError` where one cannot be started."""
        for rank in range(len(self._children) + 1, num_here):
            self._children.append(start_rank(rank, shares_process=self._shares_process))

    def settle(self, resolved: ResolvedConfig) -> None:
        """Tell those who have not been told what is settled. How one has ended that cannot be told any more is said by
        whoever starts the replica."""
        told, self._num_settled = self._num_settled, len(self._children)
        if told == self._num_settled:
            return
        from headrace.core.rank_messages import SETTINGS, encode_message  # which a core that is alone does without

        for child in self._children[told:]:
            with contextlib.suppress(PeerClosed):
                child.channel.send(SETTINGS, encode_message(resolved.of_rank(child.rank)))

    def take(self) -> list[RankProcess]:
        """They are the caller's from now on."""
        taken, self._children, self._num_settled = self._children, [], 0
        return taken

    def close(self) -> None:
        """End those that nobody has taken, at once. Idempotent."""
        for child in self.take():
            child.close(0.0)
