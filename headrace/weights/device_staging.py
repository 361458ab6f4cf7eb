"""Moving tensors of an update into place on a device, many at a time and without waiting for it.

Owns `DeviceCopies`: what is enqueued, and when it is looked at. Must not know what a slice consists of, sessions,
versions or which memory is live, as `headrace.weights.staging`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import torch

from headrace.weights.position_sum import PositionKeys
from headrace.weights.staging import Enqueued, SideStream

Take = Callable[[int, Sequence[int]], None]

_MAX_AHEAD = 2  # slices that are enqueued and not done: the device goes on while the host looks at the first


class Slice(Protocol):
    """Copies that one launch makes: enqueued together, done together. `arriving` are the indices of tensors of which
    it has pieces; `is_live`: it writes to live memory; `copied` is done when the device has done it."""

    is_live: bool
    copied: Enqueued

    @property
    def arriving(self) -> Collection[int]: ...

    def locate(self) -> None:
        """Wait until all that it reads is mapped."""

    def enqueue(self, keys: PositionKeys, *, are_digests: bool) -> None: ...

    def hash(self, stop_at: float) -> bool:
        """The device has done it: what else is to be done with what is there, until then; whether that was all."""

    def finish(self, take: Take) -> list[int]:
        """The device has done it: the indices of the tensors that are whole."""


def read_back(results: torch.Tensor) -> torch.Tensor:
    """Results of a launch in memory of the host, where they are once the device has come to it."""
    host = torch.empty(results.shape, dtype=results.dtype, device="cpu", pin_memory=results.is_cuda)
    return host.copy_(results, non_blocking=True)


class Slices(Protocol):
    """All that a command brings, in slices."""

    @property
    def is_empty(self) -> bool: ...

    def next(self, busy: Collection[int]) -> Slice | None:
        """The next one. None where pieces of tensors that are `busy` come first."""


class DeviceCopies:
    """The copies of all pieces of a command, enqueued in slices on a stream of its own; a `StageCopy`. `whole` are the
    indices of the tensors that it has completed.

    Nothing is waited for: `advance` enqueues, and later looks whether the device has done it. What the pieces are read
    from must be left alone until then, also by who gives up. `before_write` raises if the update is over. `take` is
    called with the index and the row of results of each tensor that was only moved, once it is there, if it is not
    finite or there `are_digests`.
    """

    def __init__(
        self,
        slices: Slices,
        take: Take,
        side: SideStream,
        keys: PositionKeys,
        before_write: Callable[[], None],
        *,
        are_digests: bool,
    ) -> None:
        self.has_written = False
        self.whole: list[int] = []
        self._slices = slices
        self._take = take
        self._are_digests = are_digests
        self._side = side
        self._keys = keys
        self._before_write = before_write
        self._under_way: deque[Slice] = deque()

    def advance(self, budget_s: float) -> bool:
        """True once all pieces are in place. Raises as `StageWork.advance`, when the device has come to it."""
        if not self._side.is_ready():
            return False
        stop_at = time.perf_counter() + budget_s
        while not self._slices.is_empty or self._under_way:
            if self._under_way and self._under_way[0].copied.is_done():
                with self._side.enqueuing():  # what is read back waits for no step
                    if not self._under_way[0].hash(stop_at):
                        return False
                self._before_write()
                self.whole += self._under_way.popleft().finish(self._take)
            elif not self._enqueue():
                return False
            if time.perf_counter() >= stop_at:
                break
        return self._slices.is_empty and not self._under_way

    def _enqueue(self) -> bool:
        """The next slice. False where there is none, or what is under way comes first."""
        if self._slices.is_empty or len(self._under_way) == _MAX_AHEAD:
            return False
        part = self._slices.next({index for each in self._under_way for index in each.arriving})
        if part is None:
            return False
        part.locate()
        self._before_write()
        self.has_written |= part.is_live
        with self._side.enqueuing():
            part.enqueue(self._keys, are_digests=self._are_digests)
            part.copied = Enqueued(self._side.device)
        self._under_way.append(part)
        return True
