"""Broadcasts of NCCL into a device's memory, for `headrace.weights.group`. Owns the communicator and that memory.

The ranks find each other at their first broadcast, as they do in torch's own groups: a trainer that waits for all to
have joined before he sends would wait for ever otherwise. So a rank that is missing shows only then.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch

from headrace.types.weights import TensorInfo
from headrace.weights.staging import TORCH_DTYPES

_LOOK_S = 0.0002


class DeviceBuffer:
    """Memory of a device for one broadcast at a time, of up to `capacity` bytes; as `ArrivalBuffer`."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self._bytes = torch.empty(capacity, dtype=torch.uint8, device=device)

    def armed(self, size: int) -> torch.Tensor:
        """What a broadcast of `size` bytes writes to."""
        return self._bytes[:size]

    def mismatch(self, size: int) -> str:
        """NCCL takes no other number of bytes: who sends one waits, or fails."""
        return ""

    def part(self, info: TensorInfo, start: int) -> torch.Tensor:
        """The tensor whose bytes begin at `start`; a copy where they are not aligned to its elements."""
        found, dtype = self._bytes[start : start + info.num_bytes], TORCH_DTYPES[info.dtype]
        return (found.clone() if start % dtype.itemsize else found).view(dtype).view(info.shape)


class NcclBroadcast:
    """Rank `rank` of `world_size` that meet in a store. To be called by one thread."""

    def __init__(self, store: Any, rank: int, world_size: int, device: torch.device, seconds: float) -> None:
        from torch._C import _distributed_c10d as c10d

        self._device = device
        options = c10d.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=seconds)
        self._group: Any = c10d.ProcessGroupNCCL(store, rank, world_size, options)
        self._options = c10d.BroadcastOptions()
        self._options.rootRank = self._options.rootTensor = 0

    def __call__(self, into: torch.Tensor, seconds: float) -> None:
        """Wait until rank 0 has filled these bytes: `TimeoutError` after so many seconds, and none comes then."""
        until = time.monotonic() + seconds
        with torch.cuda.device(self._device):
            work = self._group.broadcast([into], self._options)
            while not work.is_completed():
                if time.monotonic() >= until:
                    self._group.abort()
                    raise TimeoutError("rank 0 has not sent it by then")
                time.sleep(_LOOK_S)
            work.wait()  # raises what kept it from being done
            torch.cuda.current_stream().synchronize()

    def close(self) -> None:
        """Let go of the other ranks, without waiting for them."""
        self._group.abort()
