"""A rank that is not the first: `python -m tests.core.rank_process PORT RANK NUM_RANKS SECONDS`.

A byte on standard input announces each message; the end of it is the end of rank 0, and of this process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import msgspec
import numpy as np
import torch

from headrace.config import ResolvedConfig
from headrace.core.faults import StepError
from headrace.types.errors import HeadraceError, UpdateConflictError, WeightUpdateError
from headrace.types.memory import MemoryTag, Restore
from headrace.types.plan import PlanRefused
from headrace.types.plan_words import decode
from headrace.types.weights import TensorInfo
from headrace.weights.memory import ResolvedMode
from tests.core.ranks import START_SECONDS, Group, Kind, Rank, dist, patch_of


class Follower:
    """Does what rank 0 sends."""

    def __init__(self, rank: Rank, store: Any) -> None:
        self._rank, self._store = rank, store
        self._released: set[MemoryTag] = set()

    def run(self) -> None:
        """Until rank 0 closes, or is gone."""
        while sys.stdin.buffer.read(1):
            kind, first, second, num_bytes = self._rank.group.from_first(torch.zeros(4, dtype=torch.int64)).tolist()
            data = torch.zeros(num_bytes, dtype=torch.uint8)
            if num_bytes:
                self._rank.group.from_first(data)
            if kind == Kind.CLOSE:
                return
            self._do(Kind(kind), first, second, data.numpy().tobytes())

    def _do(self, kind: Kind, first: int, second: int, data: bytes) -> None:
        rank = self._rank
        if kind == Kind.PLAN:
            self._submit(first, np.frombuffer(data, np.int32))
        elif kind == Kind.REFUSE:
            rank.refuse(first, PlanRefused("rank 0 could not send it"))
        elif kind == Kind.SAMPLE:
            rank.sample(first, patch_of(second, np.frombuffer(data, np.int32)))
        elif kind == Kind.COLLECT:
            with suppress(StepError):  # rank 0 has the same one
                rank.collect_together()
        elif kind == Kind.BEGIN:
            manifest, mode, partial = msgspec.msgpack.decode(data, type=tuple[list[TensorInfo], ResolvedMode, bool])
            rank.group.agree(is_ready=_succeeds(lambda: rank.store.begin(manifest, mode, partial)) == "")
        elif kind == Kind.BEGIN_OPEN:
            rank.store.begin_open("inplace" if first else "shadow", second == 1)
        elif kind == Kind.EXTEND:
            part = msgspec.msgpack.decode(data, type=list[TensorInfo])
            rank.group.agree(is_ready=_succeeds(lambda: rank.store.extend(part)) == "")
        elif kind == Kind.STAGE:
            ticket, payload = int.from_bytes(data[:8], "little"), memoryview(data)[8:]
            self._answer(ticket, lambda: self._stage(first, payload, None if second < 0 else second))
        elif kind == Kind.COMMIT:
            self._answer(first, lambda: self._commit(is_broken=second == 1))
        elif kind == Kind.FORGET:
            rank.store.forget(first)
        elif kind == Kind.ABORT:
            with suppress(UpdateConflictError):  # committed here
                rank.store.abort()
        elif kind == Kind.DIGEST:
            rank.digests()
        elif kind == Kind.READ:
            rank.read(data.decode(), first, second)
        elif kind == Kind.SCRAMBLE:
            rank.store.scramble(first)
        elif kind == Kind.RELEASE:
            given = msgspec.msgpack.decode(data, type=set[MemoryTag])
            self._answer(first, lambda: self._release(given, keeps_copy=second == 1))
        elif kind == Kind.RESUME:
            taken, restore = msgspec.msgpack.decode(data, type=tuple[list[MemoryTag], Restore])
            self._answer(first, lambda: self._resume(taken, restore))

    def _submit(self, step_id: int, words: np.ndarray) -> None:
        try:
            plan = decode(words)
        except PlanRefused:
            plan = None
        self._rank.submit_together(plan, step_id)

    def _stage(self, index: int, data: memoryview, start: int | None) -> None:
        work = self._rank.store.stage(index, data, start)
        while not work.advance(1.0):
            pass

    def _commit(self, *, is_broken: bool) -> None:
        if is_broken:
            raise WeightUpdateError("this rank was told to fail")
        self._rank.store.commit()

    def _release(self, tags: set[MemoryTag], *, keeps_copy: bool) -> None:
        """Also what was taken here by a resume that failed elsewhere; what is released already stays as it is."""
        list(self._rank.release(tags - self._released, keeps_copy=keeps_copy))
        self._released |= tags

    def _resume(self, tags: list[MemoryTag], restore: Restore) -> None:
        list(self._rank.resume(tags, restore))
        self._released -= set(tags)

    def _answer(self, ticket: int, work: Callable[[], object]) -> None:
        self._store.set(f"ticket {ticket} of rank {self._rank.group.rank}", _succeeds(work) or "done")


def _succeeds(work: Callable[[], object]) -> str:
    """Do it; "" or why it failed."""
    try:
        work()
    except HeadraceError as error:
        return error.message
    return ""


def main(port: int, rank: int, num_ranks: int, seconds: float) -> None:
    store = dist.TCPStore("127.0.0.1", port, num_ranks, is_master=False, timeout=timedelta(seconds=START_SECONDS))
    resolved = msgspec.msgpack.decode(store.get("config"), type=ResolvedConfig)
    Follower(Rank(resolved, Group(store, rank, num_ranks, seconds)), store).run()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
