"""Reading live weights between steps, a slice at a time. Owns the reads that wait, that each is of one version, and the
digests that the weights checker compares with.

A commit does not wait for a read: one that it interrupts begins again with the new weights. While an update writes live
weights in place nothing is read. Reads are done one after the other, in the order they came.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

import msgspec

from headrace.core.executor import Executor
from headrace.core.faults import FAULTS, failure
from headrace.core.outbox import Outbox
from headrace.core.updating import UpdateControl
from headrace.ipc import SharedBuffer
from headrace.types.errors import DeadlineError, HeadraceError, RequestError, UpdateConflictError
from headrace.types.messages import GetWeight, WeightPart
from headrace.types.weights import ELEMENT_BYTES, TensorInfo, WeightsDescription

Slices = Generator[None, None, Any]
"""A read: it rests after each block, and returns what the call is answered with."""


class _Read(msgspec.Struct):
    """`check` raises why it may not go on. `slices` are those begun when live memory had `stamp`; `close` lets go of
    what the read holds."""

    call_id: int
    deadline: float
    check: Callable[[], None]
    begin: Callable[[int], Slices]
    close: Callable[[], None]
    slices: Slices | None = None
    stamp: int = -1


class ReadControl:
    """The reads of live weights of one replica."""

    def __init__(self, executor: Executor, update: UpdateControl, outbox: Outbox) -> None:
        self._executor = executor
        self._update = update
        self._outbox = outbox
        self.reads: deque[_Read] = deque()
        self._snapshot: dict[str, str] | None = None

    @property
    def deadline(self) -> float | None:
        """When the first of the reads fails; None while there is none."""
        return min((read.deadline for read in self.reads), default=None)

    def digest(
        self, call_id: int, deadline: float, finish: Callable[[dict[str, str]], Any], *, of_whole: bool = True
    ) -> None:
        """Digest all live weights; the call is answered with what `finish` makes of the digests by name. Not `of_whole`
        ones: also what is left of weights that are not whole, for telling what of them differs."""
        check = self._update.check_whole if of_whole else self._update.check_readable
        check()

        def begin(stamp: int) -> Slices:
            return finish((yield from self._digests(None)))

        self.reads.append(_Read(call_id, deadline, check, begin, lambda: None))

    def digest_ranks(self, call_id: int, deadline: float) -> None:
        """Digest all live weights rank by rank: all that each holds, one rank after the other."""
        self._update.check_whole()

        def begin(stamp: int) -> Slices:
            found: list[dict[str, str]] = []
            for rank in range(len(self._executor.weights.parameters())):
                found.append((yield from self._digests(rank)))
            return found

        self.reads.append(_Read(call_id, deadline, self._update.check_whole, begin, lambda: None))

    def _digests(self, rank: int | None) -> Generator[None, None, dict[str, str]]:
        digests: dict[str, str] = {}
        for found in self._executor.weights.digest_in_slices(rank):
            if found is not None:
                digests[found[0]] = found[1]
            yield
        return digests

    def snapshot(self, call_id: int, deadline: float) -> None:
        """Digest all live weights, and keep the digests for `compare`."""

        def keep(live: dict[str, str]) -> dict[str, str]:
            self._snapshot = live
            return live

        self.digest(call_id, deadline, keep)

    def compare(self, call_id: int, deadline: float) -> None:
        """Digest what is live; the call is answered with the digests that differ from the snapshot."""
        snapshot = self._snapshot
        if snapshot is None:
            raise UpdateConflictError("compare needs a snapshot taken before", field="action")

        def differing(live: dict[str, str]) -> dict[str, str]:
            return {name: found for name, found in live.items() if snapshot.get(name) != found}

        self.digest(call_id, deadline, differing, of_whole=False)

    def describe(self, call_id: int, deadline: float) -> None:
        """Digest all live weights; the call is answered with what they are."""
        machine, weights = self._update.machine, self._executor.weights

        def described(digests: dict[str, str]) -> WeightsDescription:
            tensors = [msgspec.structs.replace(weights.info(name), digest=found) for name, found in digests.items()]
            stamp, parameters = self._update.live_stamp, weights.parameters()
            return WeightsDescription(machine.live_version, machine.epoch, stamp, tuple(tensors), parameters)

        self.digest(call_id, deadline, described)

    def copy(self, command: GetWeight) -> None:
        """Copy a part of one tensor into the caller's buffer. Raises what is wrong with the command."""
        self._update.check_whole()
        info = self._executor.weights.info(command.name, command.rank)
        element, start, stop = ELEMENT_BYTES[info.dtype], command.start, _num_bytes_read(info, command.max_rows)
        if not 0 <= start <= stop or start % element:
            raise RequestError(f"no element of {command.name} begins at byte {start}", field="start")
        size = min(stop - start, command.buffer.size - command.buffer.size % element)
        buffer = SharedBuffer.open(command.buffer, writable=True)

        def begin(stamp: int) -> Slices:
            into = buffer.view[:size]
            yield from self._executor.weights.copy_in_slices(command.name, start, into, command.rank)
            return WeightPart(info, size, stamp, stop)

        self.reads.append(_Read(command.call_id, command.deadline, self._update.check_whole, begin, buffer.close))

    def expire(self, now: float) -> None:
        """End what was not read by its deadline."""
        if not self.reads:
            return
        for read in [read for read in self.reads if now >= read.deadline]:
            self._refuse(read, DeadlineError("the weights were not read by the deadline"))

    def advance(self, budget_s: float) -> bool:
        """Read for about `budget_s` seconds, at least one block. True when it did something."""
        if not self.reads:
            return False
        read = self.reads[0]
        try:
            read.check()
            self._advance(read, time.perf_counter() + budget_s)
        except HeadraceError as error:
            self._refuse(read, error)
        except FAULTS as fault:
            self._executor.examine(fault)
            self._refuse(read, failure("reading weights", fault))
        return True

    def give_up(self, call_id: int, error: HeadraceError) -> None:
        """Forget the read of this call, if there is one."""
        for read in [read for read in self.reads if read.call_id == call_id]:
            self._refuse(read, error)

    def end(self, error: HeadraceError) -> None:
        """Answer every read with `error`."""
        for read in list(self.reads):
            self._refuse(read, error)

    def _advance(self, read: _Read, stop_at: float) -> None:
        if read.slices is None or read.stamp != self._update.live_stamp:
            read.stamp = self._update.live_stamp
            read.slices = read.begin(read.stamp)
        while True:
            try:
                next(read.slices)
            except StopIteration as end:
                self._drop(read)
                self._outbox.reply(read.call_id, end.value)
                return
            if time.perf_counter() >= stop_at:
                return

    def _refuse(self, read: _Read, error: HeadraceError) -> None:
        self._drop(read)
        self._outbox.refuse(read.call_id, error.info())

    def _drop(self, read: _Read) -> None:
        self.reads.remove(read)
        if read.slices is not None:
            read.slices.close()
        read.slices = None
        read.close()


def _num_bytes_read(info: TensorInfo, max_rows: int | None) -> int:
    """Bytes of the first rows of a tensor; None: of all."""
    if max_rows is None or not info.shape or max_rows >= info.shape[0]:
        return info.num_bytes
    return msgspec.structs.replace(info, shape=(max(0, max_rows), *info.shape[1:])).num_bytes
