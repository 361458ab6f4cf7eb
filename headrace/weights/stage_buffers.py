"""Buffers that tensors are staged from, as the memory of a replica reads them. Owns what is mapped of other processes.

On a device a buffer stays mapped until its update is over: an update comes in several stage commands, and mapping a
trainer's allocations, or pinning shared memory, takes as long as copying gigabytes. A thread maps, ahead of the copies.
Pinned memory stays for later updates too: it is the front's own. Memory of a device may be a trainer's, and is let go
of after the update, in slices, since for each allocation the driver waits for the steps in flight.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate

import torch

from headrace.ipc import SharedBuffer
from headrace.parallel.device_sharing import BytesAt, MappedMemory, same_context
from headrace.types.errors import RequestError, UnavailableError
from headrace.types.weights import BufferRef, DeviceArea, DeviceRef
from headrace.weights.memory import StageBuffer


class DeviceBuffers:
    """The buffers of updates of weights on `device`. `settle` waits for what was enqueued that reads them."""

    def __init__(self, device: torch.device, settle: Callable[[], None]) -> None:
        self._device = device
        self._settle = settle
        self._mapper: ThreadPoolExecutor | None = None
        self._mapped: dict[DeviceArea, Future[MappedMemory]] = {}
        self._pinned: dict[tuple[int, int], PinnedMemory] = {}  # by file
        self._used = set[tuple[int, int]]()  # of those, in this update
        self._left: deque[MappedMemory] = deque()

    def open(self, ref: BufferRef | DeviceRef) -> StageBuffer:
        """A buffer. Raises `RequestError` or `UnavailableError`."""
        if isinstance(ref, BufferRef):
            return Opened(self._pin(ref), self._settle)
        self._map(ref.areas)
        return Opened(AreaBytes(ref.areas, [self._mapped.get(area) for area in ref.areas], self._device), self._settle)

    def close(self) -> None:
        """The update is over: nothing reads what it brought."""
        self._settle()
        self._left.extend(each.result() for each in self._mapped.values() if not each.cancel() and not each.exception())
        self._mapped = {}
        for file in self._pinned.keys() - self._used:
            self._pinned.pop(file).close()
        self._used.clear()

    def let_go(self, budget_s: float) -> bool:
        """Unmap what updates that are over have left, for about so long, and at least one allocation. False when
        nothing is left."""
        stop_at = time.perf_counter() + budget_s
        while self._left:
            self._left.popleft().close()
            if time.perf_counter() >= stop_at:
                break
        return bool(self._left)

    def end(self) -> None:
        """Let go of everything, and of the thread."""
        self.close()
        self.let_go(math.inf)
        self.close()  # unpins what this very update has not used
        if self._mapper is not None:
            self._mapper.shutdown()

    def _map(self, areas: Sequence[DeviceArea]) -> None:
        """Begin to map what is not: all but memory of this process."""
        fresh = {area: Future[MappedMemory]() for area in areas if area.handle and area not in self._mapped}
        if fresh:
            if self._mapper is None:
                self._mapper = ThreadPoolExecutor(1, "headrace-map", initializer=same_context())
            self._mapped |= fresh
            self._mapper.submit(_map_all, fresh)

    def _pin(self, ref: BufferRef) -> PinnedMemory:
        shared = SharedBuffer.open(ref, writable=True)  # what is mapped to be read alone cannot be pinned
        if shared.file in self._pinned:
            shared.close()
        else:
            self._pinned[shared.file] = PinnedMemory(shared)
        self._used.add(shared.file)
        return self._pinned[shared.file]


def _map_all(areas: dict[DeviceArea, Future[MappedMemory]]) -> None:
    """One after the other, in one go: between two of them nobody else needs the interpreter."""
    for area, mapped in areas.items():
        if mapped.set_running_or_notify_cancel():
            try:
                mapped.set_result(MappedMemory(area))
            except BaseException as error:  # whatever it is, who asks for the area gets it
                mapped.set_exception(error)


class Opened:
    """A buffer, or several that count as one, for one job; a `StageBuffer`. `memory` stays mapped after that."""

    def __init__(self, memory: AreaBytes | PinnedMemory, settle: Callable[[], None]) -> None:
        self.part = memory.part
        self._settle = settle

    def close(self) -> None:
        """Its job is over, and who filled it may fill it again."""
        self._settle()  # a job that was done leaves nothing to wait for


class AreaBytes:
    """Areas of devices' memory, as `device` reads them: of another process, which are being mapped, and of this one."""

    def __init__(
        self, areas: Sequence[DeviceArea], mapped: Sequence[Future[MappedMemory] | None], device: torch.device
    ) -> None:
        self._areas = areas
        self._mapped = mapped
        self._device = device
        self._ends = list(accumulate(area.size for area in areas))

    def part(self, offset: int, size: int) -> BytesAt:
        """These bytes. Raises `RequestError` if they are not in one area."""
        number = min(bisect_right(self._ends, offset), len(self._areas) - 1)
        area, end = self._areas[number], self._ends[number]
        if offset + size > end:
            raise RequestError(f"bytes {offset} to {offset + size} of a buffer are not in one area", field="buffer")
        start, mapped = offset - (end - area.size), self._mapped[number]
        return BytesAt(mapped, start + (area.offset if mapped is None else 0), size, self._device)


class PinnedMemory:
    """Shared memory of the host, pinned: the device reads it by itself, while the host goes on."""

    def __init__(self, memory: SharedBuffer) -> None:
        self._memory = memory
        self._bytes = torch.frombuffer(memory.view, dtype=torch.uint8)
        self._address, size = self._bytes.data_ptr(), memory.ref.size
        error = int(torch.cuda.cudart().cudaHostRegister(self._address, size, 0))  # type: ignore[no-untyped-call]
        if error:
            self._release()
            raise UnavailableError(f"{size} bytes of shared memory cannot be pinned: error {error}", field="buffer")

    def part(self, offset: int, size: int) -> torch.Tensor:
        """These bytes."""
        return self._bytes[offset : offset + size]

    def close(self) -> None:
        """Give it back."""
        torch.cuda.cudart().cudaHostUnregister(self._address)  # type: ignore[no-untyped-call]
        self._release()

    def _release(self) -> None:
        self._bytes = self._bytes.new_empty(0)
        self._memory.close()
