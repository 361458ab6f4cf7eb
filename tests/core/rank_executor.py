"""An executor of several ranks over gloo: rank 0 is this process, to the others a plan goes as one flat array.

Each rank has its share of weights, heads and KV (`tests.core.ranks`); results are compared, digests added up. What the
others do of a copy or a commit is a ticket: they answer in a store that rank 0 looks into without waiting.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from headrace.config import ResolvedConfig
from headrace.core.executor import CheckpointSlices, WeightGroup, Weights
from headrace.core.faults import DeviceLost
from headrace.types.errors import WeightUpdateError
from headrace.types.foreign import Payload
from headrace.types.memory import MemoryTag, Restore
from headrace.types.messages import JoinGroup
from headrace.types.plan import PlanRefused, SamplePatch, StepPlan, StepResult
from headrace.types.plan_words import encode
from headrace.types.request import Int32Array
from headrace.types.weights import BufferRef, DeviceRef, TensorInfo, UpdateMode
from headrace.weights.memory import (
    Copies,
    ResolvedMode,
    SharedTensors,
    StageBuffer,
    StageCopy,
    StagePiece,
    Ticket,
    one_by_one,
)
from headrace.weights.position_sum import add_digests
from headrace.weights.staging import TORCH_DTYPES, StageWork, source_of
from tests.core.ranks import START_SECONDS, Group, Kind, Rank, dist

ROOT = Path(__file__).parents[2]


class Others:
    """The other ranks' processes, and messages to them."""

    def __init__(self, resolved: ResolvedConfig, num_ranks: int, seconds: float) -> None:
        self.seconds = seconds
        timeout = timedelta(seconds=START_SECONDS)
        self.store = dist.TCPStore("127.0.0.1", 0, num_ranks, is_master=True, wait_for_workers=False, timeout=timeout)
        self.store.set("config", msgspec.msgpack.encode(resolved))
        command = [sys.executable, "-m", "tests.core.rank_process", str(self.store.port)]
        self.processes = [
            subprocess.Popen([*command, str(rank), str(num_ranks), str(seconds)], stdin=subprocess.PIPE, cwd=ROOT)
            for rank in range(1, num_ranks)
        ]
        self.group = Group(self.store, 0, num_ranks, seconds)
        self.breaks_commits = False
        self._num_tickets = 0

    def tell(self, kind: Kind, first: int = 0, second: int = 0, data: bytes = b"") -> None:
        """Send a message. Raises `DeviceLost` where somebody is gone."""
        for process in self.processes:
            assert process.stdin is not None
            try:
                process.stdin.write(b"!")
                process.stdin.flush()
            except OSError as error:
                raise DeviceLost(f"a rank is lost: its process ended: {error}") from error
        self.group.from_first(torch.tensor([kind, first, second, len(data)], dtype=torch.int64))
        if data:
            self.group.from_first(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def new_ticket(self) -> int:
        """The number of what all are about to do."""
        self._num_tickets += 1
        return self._num_tickets

    def have_done(self, ticket: int, since: float) -> bool:
        """Whether all others have answered; raises what one of them says, or `DeviceLost`."""
        keys = [f"ticket {ticket} of rank {rank}" for rank in range(1, self.group.num_ranks)]
        if not self.store.check(keys):
            if time.monotonic() > since + self.seconds or any(process.poll() is not None for process in self.processes):
                raise DeviceLost("a rank is lost: it does not answer")
            return False
        for key in keys:
            answer = self.store.get(key).decode()
            if answer != "done":
                raise WeightUpdateError(f"another rank: {answer}")
        return True

    def close(self) -> None:
        """End them, and wait until they have ended."""
        for process in self.processes:
            process.kill()
            process.wait()
            with suppress(OSError):
                assert process.stdin is not None
                process.stdin.close()


class RankCopy:
    """The copy of a tensor into all ranks' parts of it."""

    def __init__(self, work: StageWork, others: Others, ticket: int) -> None:
        self.has_written = True
        self._work, self._others, self._ticket, self._since = work, others, ticket, time.monotonic()

    def advance(self, deadline_s: float) -> bool:
        return self._work.advance(deadline_s) and self._others.have_done(self._ticket, self._since)


class RankCommit:
    """A commit on all ranks."""

    def __init__(self, own: Ticket, others: Others, ticket: int) -> None:
        self._own, self._others, self._ticket, self._since = own, others, ticket, time.monotonic()

    def is_done(self) -> bool:
        return self._own.is_done() and self._others.have_done(self._ticket, self._since)


class RankWeights:
    """The memory of all ranks as one."""

    def __init__(self, rank: Rank, others: Others) -> None:
        self._store, self._rank, self._others = rank.store, rank, others
        self._is_open = False
        self.device_id = ""

    def begin(self, manifest: Sequence[TensorInfo], mode: UpdateMode, partial: bool) -> ResolvedMode:
        resolved = self._store.begin(manifest, mode, partial)
        self._others.tell(Kind.BEGIN, data=msgspec.msgpack.encode((list(manifest), resolved, partial)))
        if not self._others.group.agree(is_ready=True):
            self._store.abort()
            raise WeightUpdateError("another rank refuses the update", field="mode")
        self._is_open = True
        return resolved

    def begin_open(self, mode: UpdateMode, partial: bool) -> ResolvedMode:
        resolved = self._store.begin_open(mode, partial)
        self._others.tell(Kind.BEGIN_OPEN, int(resolved == "inplace"), int(partial))
        self._is_open = True
        return resolved

    def extend(self, manifest: Sequence[TensorInfo]) -> int:
        """Where another rank refuses what this one takes, the update can only be aborted."""
        num_missing = self._store.extend(manifest)
        self._others.tell(Kind.EXTEND, data=msgspec.msgpack.encode(list(manifest)))
        if not self._others.group.agree(is_ready=True):
            raise WeightUpdateError("another rank refuses the tensors", field="mode")
        return num_missing

    def missing(self) -> list[str]:
        return self._store.missing()

    def stage(self, index: int, data: Any, start: int | None = None) -> StageCopy:
        info = self._store._require_update().manifest[index]
        source = source_of(info, data, start)
        values = torch.empty(source.num_elements, dtype=TORCH_DTYPES[info.dtype])
        source.copy(slice(0, source.num_elements), values)
        payload = values.view(torch.uint8).numpy().tobytes()
        work, ticket = self._store.stage(index, memoryview(payload), start), self._others.new_ticket()
        message = ticket.to_bytes(8, "little") + payload
        self._others.tell(Kind.STAGE, index, -1 if start is None else start, message)
        return RankCopy(work, self._others, ticket)

    def stage_pieces(self, pieces: Iterator[StagePiece]) -> Copies:
        return one_by_one(self.stage, pieces)

    def open_buffer(self, ref: BufferRef | DeviceRef) -> StageBuffer:
        return self._store.open_buffer(ref)

    def open_payload(self, payload: Payload) -> SharedTensors:
        return self._store.open_payload(payload)

    def forget(self, index: int) -> list[int]:
        self._others.tell(Kind.FORGET, index)
        return self._store.forget(index)

    def commit(self) -> Ticket:
        ticket = self._others.new_ticket()
        self._others.tell(Kind.COMMIT, ticket, int(self._others.breaks_commits))
        self._is_open = False
        return RankCommit(self._store.commit(), self._others, ticket)

    def abort(self) -> None:
        """Also of what some rank has not committed, where others have."""
        if self._is_open:
            self._store.abort()
        self._others.tell(Kind.ABORT, int(self._is_open))
        self._is_open = False

    def let_go(self, budget_s: float) -> bool:
        return self._store.let_go(budget_s)

    def digest_in_slices(self) -> Iterator[tuple[str, str] | None]:
        names = []
        for found in self._store.digest_in_slices():
            names += [found[0]] if found else []
            yield None
        self._others.tell(Kind.DIGEST)
        for name, *parts in zip(names, *self._rank.digests(), strict=True):
            yield name, add_digests(*parts)

    def info(self, name: str) -> TensorInfo:
        return self._store.info(name)

    def copy_in_slices(self, name: str, start: int, into: memoryview) -> Iterator[None]:
        self._others.tell(Kind.READ, start, len(into), name.encode())
        into[:] = self._rank.read(name, start, len(into))
        yield

    def scramble(self, seed: int) -> None:
        self._others.tell(Kind.SCRAMBLE, seed >> 1)
        self._store.scramble(seed >> 1)


class RankExecutor:
    """Executes plans on all ranks. `mangle` is what becomes of a plan on its way."""

    def __init__(self, resolved: ResolvedConfig, num_ranks: int = 2, *, seconds: float = 20.0) -> None:
        self.others = Others(resolved, num_ranks, seconds)
        self._rank = Rank(resolved, self.others.group)
        self.weights: Weights = RankWeights(self._rank, self.others)
        self.mangle: Callable[[Int32Array], Int32Array] = lambda words: words

    def submit(self, plan: StepPlan) -> None:
        try:
            words = encode(plan)
        except PlanRefused as refusal:
            self.others.tell(Kind.REFUSE, plan.step_id)
            self._rank.refuse(plan.step_id, refusal)
            return
        self.others.tell(Kind.PLAN, plan.step_id, data=self.mangle(words).tobytes())
        self._rank.submit_together(plan, plan.step_id)

    def sample(self, step_id: int, patch: SamplePatch | None = None) -> None:
        words = b"" if patch is None else np.concatenate((patch.rows, patch.masks.reshape(-1))).tobytes()
        self.others.tell(Kind.SAMPLE, step_id, 0 if patch is None else len(patch.rows), words)
        self._rank.sample(step_id, patch)

    def collect(self) -> StepResult:
        self.others.tell(Kind.COLLECT)
        return self._rank.collect_together()

    def examine(self, fault: BaseException) -> None:
        self._rank.examine(fault)

    def counters(self) -> dict[str, float]:
        return self._rank.counters()

    def checkpoint(self, folder: Path, root: Path | None) -> CheckpointSlices:
        return self._rank.checkpoint(folder, root)

    def release(self, tags: Collection[MemoryTag], *, keeps_copy: bool) -> Generator[None]:
        ticket, since = self.others.new_ticket(), time.monotonic()
        self.others.tell(Kind.RELEASE, ticket, int(keeps_copy), msgspec.msgpack.encode(list(tags)))
        yield from self._rank.release(tags, keeps_copy=keeps_copy)
        while not self.others.have_done(ticket, since):
            yield

    def resume(self, tags: Collection[MemoryTag], restore: Restore) -> Generator[None]:
        ticket, since = self.others.new_ticket(), time.monotonic()
        self.others.tell(Kind.RESUME, ticket, data=msgspec.msgpack.encode((list(tags), restore)))
        is_there = False
        try:
            yield from self._rank.resume(tags, restore)
            while not self.others.have_done(ticket, since):
                yield
            is_there = True
        finally:
            if not is_there:
                undoing, keeps_copy = self.others.new_ticket(), restore == "copy" and "weights" in tags
                self.others.tell(Kind.RELEASE, undoing, int(keeps_copy), msgspec.msgpack.encode(list(tags)))

    def join_group(self, terms: JoinGroup, seconds: float) -> WeightGroup:
        raise WeightUpdateError("these ranks join no group", field="group_name")

    def close(self) -> None:
        self.others.close()
        self._rank.close()
