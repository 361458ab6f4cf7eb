"""Sums over the ranks of one host whose devices reach each other's memory. Owns that memory, and for which sums it is
used; the kernel is `headrace.kernels.triton.rank_sums`.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from headrace.parallel.device_sharing import MappedMemory, SharedDeviceMemory, bytes_at
from headrace.types.errors import UnavailableError
from headrace.types.weights import DeviceArea

if TYPE_CHECKING:
    from headrace.kernels.triton.rank_sums import RankMemory

logger = logging.getLogger(__name__)

RowNorm = tuple[Tensor, float]
"""An RMS norm over rows: weight [X], and what is added to the mean square."""

Gather = Callable[[Tensor], Tensor]

MAX_RANKS = 8
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ALIGNMENT = 16
_NO_HANDLE = bytes(64)
_MARK_BYTES = 16


class Tier(NamedTuple):
    """Launches of one kind: how many programs each has, and the bytes of an inbox. Without flags sums go by words."""

    num_programs: int
    inbox_bytes: int
    has_flags: bool

    def inboxes_bytes(self, num_ranks: int) -> int:
        """Of one rank."""
        return 2 * num_ranks * self.inbox_bytes

    def flags_bytes(self, num_ranks: int) -> int:
        """Of one rank."""
        return 4 * num_ranks * self.num_programs if self.has_flags else 0


TIERS = (
    Tier(32, 128 << 10, has_flags=False),
    Tier(256, 1 << 20, has_flags=False),
    Tier(256, 8 << 20, has_flags=True),
)
"""Of larger sums NCCL's take little longer, on two H200 (docs/benchmarks.md)."""


class PeerSums:
    """Sums of this rank with the others, each of a call that all of them make."""

    def __init__(self, rank: int, memories: Sequence[RankMemory], stop: Tensor) -> None:
        self._rank, self._memories, self._stop = rank, memories, stop

    def takes(self, values: Tensor, out: Tensor) -> bool:
        """Whether such a sum is to be had: of one shape, contiguous, and not too large. By what is the same on all
        ranks, or one would wait for others that sum otherwise."""
        fits = 0 < values.nbytes <= self._memories[-1].max_bytes and values.shape[-1] % 2 == 0
        is_alike = values.shape == out.shape and values.dtype == out.dtype in _DTYPES
        return fits and is_alike and _lies_well(values) and _lies_well(out)

    def sum(
        self,
        values: Tensor,
        out: Tensor,
        bias_X: Tensor | None = None,
        norm: RowNorm | None = None,
        *,
        adds: bool,
        in_order: bool = False,
    ) -> Tensor | None:
        """As `rank_sums.sum_over_ranks`, enqueued. Returned is the norm of the sum where its launch can compute it;
        `in_order`: of the same bits as a norm by itself."""
        from headrace.kernels.triton.rank_sums import SumNorm, sum_over_ranks

        memory = next(each for each in self._memories if values.nbytes <= each.max_bytes)
        if norm is not None and in_order:
            memory = self._memories[-1]
        sum_norm = None
        if norm is not None and memory.norms(len(values)):
            sum_norm = SumNorm(*norm, torch.empty_like(out))
        sum_over_ranks(memory, self._rank, values, out, bias_X, sum_norm, adds=adds, pdl=True)
        return sum_norm and sum_norm.out_TX

    def abort(self) -> None:
        """No sum waits any more, and none is right."""
        self._stop.fill_(1)


class PeerMemory:
    """What the sums of one rank need of the memory of all, until it is closed."""

    def __init__(self, sums: PeerSums, held: contextlib.ExitStack) -> None:
        self.sums = sums
        self._held = held

    @classmethod
    def connect(cls, rank: int, num_ranks: int, device: torch.device, gather: Gather) -> PeerMemory | None:
        """With ranks that all call this. None, for all of them, where one device cannot reach another. What fails
        leaves nothing behind."""
        with contextlib.ExitStack() as held:
            handle, addresses, problem = _NO_HANDLE, list[int](), ""
            mark = secrets.token_bytes(_MARK_BYTES)
            try:
                own = _empty(num_ranks, device, mark, held)
                handle = own.ref.areas[0].handle
            except UnavailableError as error:
                problem = error.message
            found = _gathered(handle + mark, device, gather)
            try:
                if not any(each.startswith(_NO_HANDLE) for each in found):
                    at = own.view(0, 1).data_ptr()
                    addresses += [at if n == rank else _mapped(found[n], num_ranks, held) for n in range(num_ranks)]
                    problem = _unlike(addresses, found, num_ranks, device)
            except UnavailableError as error:
                problem = error.message
            is_reached = len(addresses) == num_ranks and not problem
            if b"\0" not in _gathered(bytes([is_reached]), device, gather):
                stop = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
                return cls(PeerSums(rank, _memories(addresses, device, stop), stop), held.pop_all())
            if problem:
                logger.info("ranks do not reach each other's memory: %s", problem)
        return None

    def close(self) -> None:
        """Give it back, all that can be: no rank sums any more. Idempotent."""
        self._held.close()


def _lies_well(values: Tensor) -> bool:
    """Memory itself is aligned."""
    return values.is_contiguous() and values.storage_offset() * values.element_size() % _ALIGNMENT == 0


def _num_bytes(num_ranks: int) -> int:
    """Of one rank: inboxes and flags of all tiers, and its mark."""
    return _mark_at(num_ranks) + _MARK_BYTES


def _mark_at(num_ranks: int) -> int:
    return sum(tier.inboxes_bytes(num_ranks) + tier.flags_bytes(num_ranks) for tier in TIERS)


def _empty(num_ranks: int, device: torch.device, mark: bytes, held: contextlib.ExitStack) -> SharedDeviceMemory:
    """Inboxes and flags of no launch, with this mark."""
    size = _num_bytes(num_ranks)
    memory = SharedDeviceMemory(size, device, shares_process=False)
    held.callback(memory.close)
    view = memory.view(0, size)
    view.zero_()
    view[-_MARK_BYTES:].copy_(torch.frombuffer(bytearray(mark), dtype=torch.uint8))
    memory.flush()
    return memory


def _mapped(place: bytes, num_ranks: int, held: contextlib.ExitStack) -> int:
    """Where another's memory begins here."""
    memory = MappedMemory(DeviceArea(place[: len(_NO_HANDLE)], 0, _num_bytes(num_ranks)))
    held.callback(memory.close)
    return memory.address


def _unlike(addresses: Sequence[int], found: Sequence[bytes], num_ranks: int, device: torch.device) -> str:
    """What is wrong with what was mapped: a handle of another host may be one of this host too, of other memory."""
    for rank, (address, place) in enumerate(zip(addresses, found, strict=True)):
        mark = bytes_at(address + _mark_at(num_ranks), _MARK_BYTES, device) + 0  # by a kernel, as in sums
        if bytes(mark.cpu().numpy()) != place[len(_NO_HANDLE) :]:
            return f"what rank {rank} shares is not there"
    return ""


def _gathered(values: bytes, device: torch.device, gather: Gather) -> list[bytes]:
    sent = torch.frombuffer(bytearray(values), dtype=torch.uint8).to(device)
    return [bytes(each.cpu().numpy()) for each in gather(sent)]


def _memories(addresses: Sequence[int], device: torch.device, stop: Tensor) -> list[RankMemory]:
    """What each tier has of the ranks' memories, which begin at these addresses."""
    from headrace.kernels.triton.rank_sums import RankMemory

    num_ranks, found, start = len(addresses), list[RankMemory](), 0
    for tier in TIERS:
        inboxes = torch.tensor([address + start for address in addresses], dtype=torch.int64, device=device)
        start += tier.inboxes_bytes(num_ranks)
        flags = None
        if tier.has_flags:
            flags = torch.tensor([address + start for address in addresses], dtype=torch.int64, device=device)
            start += tier.flags_bytes(num_ranks)
        num_launches = torch.zeros(tier.num_programs, dtype=torch.int32, device=device)
        found.append(RankMemory(inboxes, flags, num_launches, stop, tier.inbox_bytes))
    return found
