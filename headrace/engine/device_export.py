"""Tensors on devices that the core reads, copied from where they are: their memory is named, and the core maps it.

Owns which memory that is, for one `stage` call. Must not know buffers, sessions or how the core is told. What lies in
memory that cannot be named so is for others to carry.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from headrace.engine.held_tensors import HeldTensors, Listing
from headrace.engine.tensors import device_of, num_writes, storage_bytes
from headrace.types.errors import UnavailableError, WeightUpdateError
from headrace.types.weights import BufferEntry, DeviceArea, DeviceRef

if TYPE_CHECKING:
    import torch


class ExportPlan:
    """How all tensors of a listing went, which go so again while the driver's allocations that they are in are there.

    Nothing of them is held: what has been freed is not the same when it is asked for again.
    """

    def __init__(self, listing: Listing, exports: Sequence[DeviceExport], *, shares_process: bool) -> None:
        self.listing = listing
        self.areas = tuple(area for export in exports for area in export.ref.areas)
        self.contexts = {device: context for export in exports for device, context in export.contexts.items()}
        self.num_bytes = sum(export.num_bytes for export in exports)
        starts = accumulate((export.ref.size for export in exports), initial=0)
        self.entries = [
            msgspec.structs.replace(entry, offset=start + entry.offset, replaces=False)
            for start, export in zip(starts, exports, strict=False)
            for entry in export.entries
        ]
        bases = () if shares_process else dict.fromkeys(base for export in exports for base in export.bases)
        self._allocations = [(base, _allocation_id(base)) for base in bases]

    def fits(self, listing: Listing | None) -> bool:
        """Whether these are the tensors, and their memory is what it was."""
        return listing is self.listing and all(
            number and _allocation_id(base) == number for base, number in self._allocations
        )


class DeviceExport:
    """Tensors of one call on the devices of these UUIDs, held until it is over. `shares_process`: the core is a thread
    of this process."""

    def __init__(self, device_ids: Collection[str], *, shares_process: bool) -> None:
        self.entries: list[BufferEntry] = []
        self._device_ids = device_ids
        self._shares_process = shares_process
        self.contexts: dict[torch.device, AbstractContextManager[Any] | None] = {}
        """In which the driver is asked about the memory of each device that was seen; None: it is not read."""
        self._is_refused = False
        self._held: list[tuple[str, torch.Tensor, int, int]] = []
        self._areas: list[DeviceArea] = []
        self._starts: dict[tuple[int, int], int] = {}  # of areas among all, by address, which no two devices share
        self._size = 0
        self._last = 0, 0  # the allocation of the last tensor: the next one is often in it
        self.num_bytes = 0  # of all tensors

    @classmethod
    def again(cls, plan: ExportPlan, held: HeldTensors, *, shares_process: bool) -> DeviceExport:
        """All tensors of a plan that fits them."""
        found = cls((), shares_process=shares_process)
        found.entries, found.contexts, found.num_bytes = plan.entries, plan.contexts, plan.num_bytes
        found._areas = list(plan.areas)
        sizes = plan.listing.sights.storage_bytes
        found._held = [(*each, size) for each, size in zip(held.counted, sizes, strict=True)]
        return found

    @property
    def bases(self) -> list[int]:
        """Where the allocations begin that all areas are."""
        return [base for base, _ in self._starts]

    @property
    def ref(self) -> DeviceRef:
        """All areas that the entries are in."""
        return DeviceRef(tuple(self._areas))

    def add(self, index: int, name: str, tensor: Any, *, replaces: bool) -> bool:
        """Take a tensor for manifest entry `index`. False where it is on no such device, or its elements do not lie one
        after the other in memory that may be shared: nothing has changed then."""
        if self._is_refused or isinstance(tensor, np.ndarray) or not self._lies_well(tensor):
            return False
        try:
            offset = self._offset_of(tensor)
        except UnavailableError:
            self._is_refused = True  # an allocator of that kind makes all of its memory so
            return False
        num_bytes = tensor.nbytes
        self._held.append((name, tensor, num_writes(tensor), storage_bytes(tensor)))
        self.entries.append(BufferEntry(index, offset, 0, num_bytes, replaces))
        self.num_bytes += num_bytes
        return True

    def settle(self) -> DeviceExport:
        """Wait for what the caller has enqueued, on his current streams, that writes to the tensors; returns itself."""
        for device, context in self.contexts.items():
            if context is not None:
                import torch

                torch.cuda.current_stream(device).synchronize()
        return self

    def check(self) -> None:
        """The core has copied all: `WeightUpdateError` if a tensor was freed or written to meanwhile."""
        for name, tensor, writes, size in self._held:
            if num_writes(tensor) != writes or storage_bytes(tensor) != size:
                raise WeightUpdateError(f"{name} was written to while it was sent", field=name)

    def _lies_well(self, tensor: torch.Tensor) -> bool:
        device = tensor.device
        if device not in self.contexts:
            self.contexts[device] = self._context_of(tensor)
        is_plain = tensor.is_contiguous() and not tensor.is_neg() and not tensor.is_conj()
        return is_plain and self.contexts[device] is not None and tensor.numel() > 0

    def _context_of(self, tensor: torch.Tensor) -> AbstractContextManager[Any] | None:
        """In which the driver is asked about its memory; None: the core does not read its device."""
        if device_of(tensor) not in self._device_ids:
            return None
        import torch

        with torch.cuda.device(tensor.device):
            torch.cuda.current_stream().query()  # a thread that has used no device has no context yet
        is_current = tensor.get_device() == torch.cuda.current_device()
        return nullcontext() if is_current else torch.cuda.device(tensor.device)

    def _offset_of(self, tensor: torch.Tensor) -> int:
        """Where it begins, counted through all areas."""
        address = tensor.data_ptr()
        base, size = self._last
        if not base <= address < base + size:
            base, size = self._last = self._allocation_of(tensor, address)
        start = self._starts.get((base, size))
        if start is None:
            self._areas.append(self._area_of(tensor, base, size))
            start = self._starts[base, size] = self._size
            self._size += size
        return start + address - base

    def _allocation_of(self, tensor: torch.Tensor, address: int) -> tuple[int, int]:
        if self._shares_process:
            storage = tensor.untyped_storage()
            return storage.data_ptr(), storage.nbytes()
        from headrace.parallel.device_sharing import allocation_of

        with self.contexts[tensor.device] or nullcontext():
            return allocation_of(address)

    def _area_of(self, tensor: torch.Tensor, base: int, size: int) -> DeviceArea:
        if self._shares_process:
            return DeviceArea(b"", base, size)
        from headrace.parallel.device_sharing import handle_of

        with self.contexts[tensor.device] or nullcontext():
            return DeviceArea(handle_of(base), 0, size)


def _allocation_id(address: int) -> int:
    from headrace.parallel.device_sharing import allocation_id

    return allocation_id(address)
