"""Broadcasts of NCCL into a device's memory, for `headrace.weights.group`. Owns that memory and what is waited
for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from headrace.config.cuda_driver import capture_by_thread
from headrace.types.weights import TensorInfo
from headrace.weights.nccl import NcclRank
from headrace.weights.staging import TORCH_DTYPES

_SHORTEST_LOOK_S, _LONGEST_LOOK_S = 0.00005, 0.01


def pause_of(waited_s: float) -> float:
    """Seconds until the next look at what has been waited for so long. Without a pause the interpreter would go back
    and forth between this thread and the one that stages, and each of these ways takes as long as one."""
    return min(_LONGEST_LOOK_S, _SHORTEST_LOOK_S + waited_s / 16)


Found = TypeVar("Found")


class DeviceBuffer:
    """Memory of a device for one broadcast at a time, of up to `capacity` bytes; as `ArrivalBuffer`."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self._bytes = torch.empty(capacity, dtype=torch.uint8, device=device)

    def armed(self, size: int, num_integer: int = 0) -> torch.Tensor:
        """What a broadcast of `size` bytes writes to."""
        return self._bytes[:size]

    def mismatch(self, size: int) -> str:
        """NCCL takes no other number of bytes: who sends one waits, or fails."""
        return ""

    def part(self, info: TensorInfo, start: int) -> torch.Tensor:
        """The tensor whose bytes begin at `start`; a copy where they are not aligned to its elements."""
        found, dtype = self._bytes[start : start + info.num_bytes], TORCH_DTYPES[info.dtype]
        if start % dtype.itemsize:
            found = found.clone()
            torch.cuda.current_stream(found.device).synchronize()  # it is read on another one
        return found.view(dtype).view(info.shape)


class NcclBroadcast:
    """Rank `rank` of `num_ranks`, which know each other by an id. To be called by one thread, from its constructor on.

    `find_id` looks whether the id has been published. Once `is_over` nothing is waited for any more.
    """

    def __init__(
        self,
        find_id: Callable[[], bytes | None],
        rank: int,
        num_ranks: int,
        device: torch.device,
        is_over: Callable[[], bool],
    ) -> None:
        self._find_id = find_id
        self._place = rank, num_ranks
        self._device = device
        self._is_over = is_over
        self._rank: NcclRank | None = None
        torch.cuda.set_device(device)
        capture_by_thread()
        # Of a priority of its own: streams of the usual one are dealt out again, and steps must not wait for a trainer.
        self._stream: Any = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    def join(self, until: float) -> None:
        """Find the other ranks: `TimeoutError` where they are not all there by then."""
        unique_id = self._await(self._find_id, until)
        self._rank = rank = NcclRank(unique_id, *self._place)
        self._await(rank.is_idle, until)

    def warm_up(self, until: float) -> None:
        """Take part in the first thing that all ranks of a trainer of vLLM's do: the sum of a number each."""
        number = torch.zeros(1, dtype=torch.float32, device=self._device)
        self._await(
            self._begin(number, until, lambda rank, stream: rank.sum_floats(number.data_ptr(), 1, stream)), until
        )

    def __call__(self, into: torch.Tensor, seconds: float) -> Callable[[], bool]:
        """Begin to receive these bytes from rank 0, behind what was begun before. Returned is what looks whether they
        are there. Both raise `TimeoutError` after so many seconds from now, and none comes then."""
        until = time.monotonic() + seconds
        if self._rank is None:
            self.join(until)
        return self._begin(into, until, lambda rank, stream: rank.receive(into.data_ptr(), into.nbytes, stream))

    def close(self) -> None:
        """Let go of the other ranks, without waiting for them. Idempotent."""
        if self._rank is not None:
            self._rank.abort()

    def _begin(self, memory: torch.Tensor, until: float, begin: Callable[[NcclRank, int], None]) -> Callable[[], bool]:
        rank, done = self._rank, torch.cuda.Event()  # type: ignore[no-untyped-call]
        assert rank is not None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        memory.record_stream(self._stream)  # whatever becomes of this, nobody else has it before the device is done
        begin(rank, self._stream.cuda_stream)
        self._await(rank.is_idle, until)
        done.record(self._stream)

        def look() -> bool:
            return rank.is_idle() and bool(done.query())  # type: ignore[no-untyped-call]

        return lambda: bool(self._found(look, until))

    def _await(self, look: Callable[[], Found | None], until: float) -> Found:
        """What is found at last."""
        began = time.monotonic()
        while not (found := self._found(look, until)):
            now = time.monotonic()
            time.sleep(max(0.0, min(pause_of(now - began), until - now)))
        return found

    def _found(self, look: Callable[[], Found | None], until: float) -> Found | None:
        """What is found now. Raises where it is not to be waited for any longer."""
        found = look()
        if not found and time.monotonic() >= until:
            raise TimeoutError("not all ranks have come to it by then")
        if not found and self._is_over():
            found = look()  # it may have come before that
            if not found:
                raise ConnectionError("rank 0 has ended")
        return found
