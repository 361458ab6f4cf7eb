"""One rank of several that hold a model together, and what ranks tell each other.

The ranks are processes over gloo. All do the same for a message, in the order in which rank 0 sends them. A rank that
cannot be reached, or answers too late, is a lost device: `DeviceLost`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import timedelta
from enum import IntEnum
from typing import Any, TypeVar

import msgspec
import numpy as np
import torch
import torch.distributed
from torch import Tensor

from headrace.config import ResolvedConfig
from headrace.core.executor import LocalExecutor
from headrace.core.faults import DeviceLost, StepError
from headrace.parallel import GroupCommunicator, Mesh
from headrace.runner.runner import Runner
from headrace.types.plan import PlanRefused, RankLost, SamplePatch, StepPlan, StepResult

Value = TypeVar("Value")
dist: Any = torch.distributed  # whose types lack most of it
START_SECONDS = 60.0


class Kind(IntEnum):
    """What rank 0 asks of all; the message's two numbers and bytes in brackets."""

    CLOSE = 0
    PLAN = 1  # (bytes: a plan's words)
    REFUSE = 2  # (step)
    SAMPLE = 3  # (step, number of rows; bytes: rows and masks)
    COLLECT = 4
    BEGIN = 5  # (bytes: manifest, mode, partial)
    STAGE = 6  # (index, start or -1; bytes: the tensor or piece, after the ticket's number)
    FORGET = 7  # (index)
    COMMIT = 8  # (ticket)
    ABORT = 9
    DIGEST = 10
    READ = 11  # (start, number of bytes; bytes: the name)
    SCRAMBLE = 12  # (seed)
    BEGIN_OPEN = 13  # (in place, partial)
    EXTEND = 14  # (bytes: manifest)
    RELEASE = 15  # (ticket, whether a copy is kept; bytes: tags)
    RESUME = 16  # (ticket; bytes: tags, where weights come from)


class Group:
    """The ranks, and what they compute together beside their steps."""

    def __init__(self, store: Any, rank: int, num_ranks: int, seconds: float) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        keys = [f"rank {each}" for each in range(num_ranks)]
        store.set(keys[rank], "is here")
        store.wait(keys, timedelta(seconds=START_SECONDS))
        gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, num_ranks, timedelta(seconds=seconds))
        self._communicator = GroupCommunicator(gloo, seconds)
        self.mesh = Mesh(rank, num_ranks, self._communicator)

    def greatest(self, values: Tensor) -> Tensor:
        """The greatest over the ranks, in place."""
        _reached(lambda: self._communicator.all_reduce_(values, "max"))
        return values

    def all_of(self, values: Tensor) -> list[Tensor]:
        """Those of every rank."""
        return _reached(lambda: self._communicator.all_gather(values))

    def from_first(self, values: Tensor) -> Tensor:
        """Those of rank 0, in place."""
        _reached(lambda: self._communicator.broadcast_(values))
        return values

    def agree(self, *, is_ready: bool) -> bool:
        """Whether every rank is."""
        return not self.greatest(torch.tensor([not is_ready], dtype=torch.int32)).item()


def _reached(call: Callable[[], Value]) -> Value:
    try:
        return call()
    except RankLost as error:
        raise DeviceLost(str(error)) from error


class Rank(LocalExecutor):
    """What every rank does for a plan: its own part, and to agree with the others on what came of it."""

    def __init__(self, resolved: ResolvedConfig, group: Group) -> None:
        runner = Runner(resolved, mesh=group.mesh)
        super().__init__(runner)
        self.store, self.group = runner.weights, group

    def submit_together(self, plan: StepPlan | None, step_id: int) -> None:
        """Execute a plan if all ranks have it; None: it is none here."""
        if self.group.agree(is_ready=plan is not None) and plan is not None:
            self.submit(plan)
        else:
            self.refuse(step_id, PlanRefused("a rank could not read it"))

    def refuse(self, step_id: int, cause: PlanRefused) -> None:
        """A plan that nothing is done for."""
        self._fail(StepError(step_id, cause))

    def collect_together(self) -> StepResult:
        """The oldest result, of which all ranks have the same bits. Raises `StepError` where all have that."""
        try:
            found: StepResult | StepError = self.collect()
        except StepError as error:
            found = error
        digest = torch.from_numpy(np.frombuffer(hashlib.sha256(_told(found)).digest(), np.int64).copy())
        if any(not torch.equal(each, digest) for each in self.group.all_of(digest)):
            raise DeviceLost(f"the ranks disagree on {found}")
        if isinstance(found, StepError):
            raise found
        return found

    def digests(self) -> list[list[str]]:
        """The digests of all tensors, as each rank has them."""
        own = "".join(self.store.digest().values()).encode()
        found = self.group.all_of(torch.frombuffer(bytearray(own), dtype=torch.uint8))
        texts = [part.numpy().tobytes().decode() for part in found]
        return [[text[at : at + 32] for at in range(0, len(text), 32)] for text in texts]

    def read(self, name: str, start: int, num_bytes: int) -> bytes:
        """Bytes of a tensor: what a rank does not hold reads as zero there."""
        part = bytearray(num_bytes)
        for _ in self.store.copy_in_slices(name, start, memoryview(part)):
            pass
        return self.group.greatest(torch.frombuffer(part, dtype=torch.uint8)).numpy().tobytes()


def _told(found: StepResult | StepError) -> bytes:
    if isinstance(found, StepError):
        return f"{found.step_id} failed".encode()
    return msgspec.msgpack.encode(found, enc_hook=lambda array: array.tobytes())


def patch_of(num_rows: int, words: np.ndarray) -> SamplePatch | None:
    """A patch as it travels: rows, then masks; no rows: None."""
    masks = words[num_rows:]
    return SamplePatch(words[:num_rows], masks.reshape(num_rows, -1)) if num_rows else None
