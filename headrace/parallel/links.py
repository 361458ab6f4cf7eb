"""The link between two stages: a stream of hidden states goes one way, in the order of steps. Owns how far the sender
may be ahead. Must not know models or plans."""

from __future__ import annotations

from collections import deque
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from headrace.parallel.communicator import Communicator, awaited


class StageLink(Protocol):
    """One end. Both raise `RankLost` where the other end is gone or late."""

    def send(self, hidden_TX: Tensor) -> None:
        """To the stage after. Does not wait until that takes it; the tensor may be changed afterwards."""

    def receive_(self, hidden_TX: Tensor) -> None:
        """From the stage before: the next that was sent, of the same shape, in place. Waits for it."""

    def abort(self) -> None:
        """End what is waited for in it."""

    def close(self) -> None:
        """Let go of the other end. Idempotent."""


class HostLink:
    """Over a process group of two, of gloo, by which it sends what it has copied. With more than `depth` on the way it
    waits for the first."""

    def __init__(self, pair: Any, seconds: float, depth: int) -> None:
        self._pair, self._limit, self._depth = pair, timedelta(seconds=seconds), depth
        self._peer = 1 - pair.rank()
        self._leaving: deque[tuple[Any, Tensor]] = deque()

    def send(self, hidden_TX: Tensor) -> None:
        while len(self._leaving) >= self._depth:
            work, _ = self._leaving.popleft()
            awaited(partial(work.wait, self._limit))
        copy = hidden_TX.clone()
        self._leaving.append((awaited(partial(self._pair.send, [copy], self._peer, 0)), copy))

    def receive_(self, hidden_TX: Tensor) -> None:
        awaited(lambda: self._pair.recv([hidden_TX], self._peer, 0).wait(self._limit))

    def abort(self) -> None:
        pair = self._pair  # another thread may close it
        if pair is not None:
            pair.abort()

    def close(self) -> None:
        self._leaving.clear()
        self._pair = None


class DeviceLink:
    """Over a communicator of two ranks of devices: enqueued, so that a graph may hold it. The sender's stream waits
    until the receiver's takes it, which it does as soon as it has no step before it: no stage could go on earlier."""

    def __init__(self, pair: Communicator) -> None:
        self._pair = pair

    def send(self, hidden_TX: Tensor) -> None:
        self._pair.broadcast_(hidden_TX)

    def receive_(self, hidden_TX: Tensor) -> None:
        self._pair.broadcast_(hidden_TX)

    def abort(self) -> None:
        self._pair.abort()

    def close(self) -> None:
        self._pair.close()
