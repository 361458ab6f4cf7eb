"""What ranks compute together, and for how long one waits for the others. Owns the words between them, not their order:
all ranks make the same calls, one after the other. Must not know models or plans.

Legend: T tokens, X hidden size, N ranks.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from headrace.parallel.peer_sums import MAX_RANKS, PeerMemory, RowNorm
from headrace.types.plan import RankLost

Reduction = Literal["sum", "min", "max"]
Value = TypeVar("Value")
_CLOSE_SECONDS = 5.0


class Communicator(Protocol):
    """The ranks of a mesh to one of them. Every call raises `RankLost` where another rank is gone or late."""

    def reduce_add_(
        self,
        residual_TX: Tensor,
        partial_TX: Tensor,
        bias_X: Tensor | None,
        norm: RowNorm | None = None,
        *,
        in_order: bool = False,
    ) -> Tensor | None:
        """residual += the sum of all ranks' partials, + bias once, in place; the partial is used up.

        All ranks get the same bits. `in_order`: each element is summed by itself, in float32, from rank 0 on, so that
        its bits do not depend on how many tokens there are; for that each partial is sent to every rank. `norm`: what
        is done with the residual next; its norm is returned where the same launch can compute it, `in_order` with the
        bits of a norm by itself, and else None.
        """

    def all_gather(self, values: Tensor) -> Tensor:
        """Those of every rank, all of one shape (with at least one axis), by rank: [N, ...], contiguous."""

    def exchange(self, values: Tensor) -> Tensor:
        """Of each rank's values, cut along the first axis into as many equal parts as there are ranks, that which is
        for this one, by rank: [N, ...], contiguous."""

    def all_reduce_(self, values: Tensor, reduction: Reduction = "sum") -> None:
        """The sum, least or greatest over the ranks, in place; all get the same bits."""

    def broadcast_(self, values: Tensor, source: int = 0) -> None:
        """Those of one rank, in place."""

    def connect(self, device: torch.device) -> None:
        """From now on the ranks, which all call this, may sum by each other's memory on devices, of which this is the
        one that the caller's thread uses."""

    def abort(self) -> None:
        """End what is waited for in it, without waiting for that; no call succeeds afterwards."""

    def close(self) -> None:
        """Let go of the others: no call is made afterwards. Idempotent."""


class OnlyRank:
    """The communicator of a mesh of one: nothing is told to anybody."""

    def reduce_add_(
        self,
        residual_TX: Tensor,
        partial_TX: Tensor,
        bias_X: Tensor | None,
        norm: RowNorm | None = None,
        *,
        in_order: bool = False,
    ) -> Tensor | None:
        _add_(residual_TX, partial_TX, bias_X)
        return None

    def all_gather(self, values: Tensor) -> Tensor:
        return values.contiguous()[None]

    def exchange(self, values: Tensor) -> Tensor:
        return values.contiguous()[None]

    def all_reduce_(self, values: Tensor, reduction: Reduction = "sum") -> None:
        pass

    def broadcast_(self, values: Tensor, source: int = 0) -> None:
        pass

    def connect(self, device: torch.device) -> None:
        pass

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


class GroupCommunicator:
    """The ranks of a `torch.distributed` process group or backend: gloo's for tensors of a CPU, NCCL's for a device's.

    On a CPU a call that others do not join within `seconds` fails, and so does every later one. A device's calls are
    enqueued, so that a graph may hold them: whoever waits for the device bounds that.
    """

    def __init__(self, group: Any, seconds: float) -> None:
        from torch._C import _distributed_c10d as c10d

        self._group, self._num_ranks = group, group.size()
        self._aborting: threading.Thread | None = None
        self._peers: PeerMemory | None = None
        limit = timedelta(seconds=seconds)
        self._reductions = {}
        for name in ("sum", "min", "max"):
            options = _limited(c10d.AllreduceOptions(), limit)
            options.reduceOp = getattr(c10d.ReduceOp, name.upper())
            self._reductions[name] = options
        self._gathering = _limited(c10d.AllgatherOptions(), limit)
        self._exchanging = _limited(c10d.AllToAllOptions(), limit)
        self._broadcasts = []
        for rank in range(self._num_ranks):
            options = _limited(c10d.BroadcastOptions(), limit)
            options.rootRank, options.rootTensor = rank, 0
            self._broadcasts.append(options)

    def reduce_add_(
        self,
        residual_TX: Tensor,
        partial_TX: Tensor,
        bias_X: Tensor | None,
        norm: RowNorm | None = None,
        *,
        in_order: bool = False,
    ) -> Tensor | None:
        if self._peers is not None and self._peers.sums.takes(partial_TX, residual_TX):
            return self._peers.sums.sum(partial_TX, residual_TX, bias_X, norm, adds=True, in_order=in_order)
        if not in_order:
            self.all_reduce_(partial_TX)
            _add_(residual_TX, partial_TX, bias_X)
            return None
        first, *others = self.all_gather(partial_TX)
        total_TX = first.float()
        for other in others:
            total_TX += other
        _add_(residual_TX, total_TX.to(residual_TX.dtype), bias_X)
        return None

    def all_gather(self, values: Tensor) -> Tensor:
        found = values.new_empty(self._num_ranks * values.shape[0], *values.shape[1:])
        source = values.contiguous()
        _wait(lambda: self._group._allgather_base(found, source, self._gathering))
        return found.view(self._num_ranks, *values.shape)

    def exchange(self, values: Tensor) -> Tensor:
        source, found = values.contiguous(), torch.empty_like(values)
        _wait(lambda: self._group.alltoall_base(found, source, [], [], self._exchanging))
        return found.view(self._num_ranks, len(values) // self._num_ranks, *values.shape[1:])

    def all_reduce_(self, values: Tensor, reduction: Reduction = "sum") -> None:
        if reduction == "sum" and self._peers is not None and self._peers.sums.takes(values, values):
            self._peers.sums.sum(values, values, adds=False)
            return
        _wait(lambda: self._group.allreduce([values], self._reductions[reduction]))

    def broadcast_(self, values: Tensor, source: int = 0) -> None:
        _wait(lambda: self._group.broadcast([values], self._broadcasts[source]))

    def connect(self, device: torch.device) -> None:
        if self._group.name() == "nccl" and self._num_ranks <= MAX_RANKS:
            self._peers = PeerMemory.connect(self._group.rank(), self._num_ranks, device, self.all_gather)

    def abort(self) -> None:
        group, peers = self._group, self._peers  # another thread may close it
        if peers is not None:
            peers.sums.abort()
        if group is not None and self._aborting is None:
            # NCCL stops what runs on the device at once, and then waits until no graph is left that could run it: who
            # calls this may be who frees them, and has other groups to abort.
            self._aborting = threading.Thread(target=_abort, args=(group,), name="headrace-abort", daemon=True)
            self._aborting.start()

    def close(self) -> None:
        group = self._group
        if group is not None and group.name() == "nccl":
            self.abort()
        if self._aborting is not None:
            self._aborting.join(_CLOSE_SECONDS)
        peers, self._peers = self._peers, None
        self._group = None  # with the last reference to it go its threads and descriptors
        if peers is not None:
            peers.close()


def _abort(group: Any) -> None:
    with contextlib.suppress(RuntimeError):  # it has been, by another thread
        group.abort()


def _add_(residual_TX: Tensor, total_TX: Tensor, bias_X: Tensor | None) -> None:
    residual_TX.add_(total_TX)
    if bias_X is not None:
        residual_TX.add_(bias_X)


def _limited(options: Any, limit: timedelta) -> Any:
    options.timeout = limit
    options.asyncOp = False  # a device's stream itself, not one beside it that it would wait for
    return options


def _wait(begin: Callable[[], Any]) -> None:
    def run() -> None:
        work = begin()
        if work is not None:
            work.wait()

    awaited(run)


def awaited(call: Callable[[], Value]) -> Value:
    """What comes of a call that waits for other ranks. Raises `RankLost` where they are gone or late."""
    try:
        return call()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RankLost(f"a rank is lost: {str(error).splitlines()[0][:300]}") from error
