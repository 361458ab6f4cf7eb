"""How tensors come to a core that are on devices whose memory it reads: as they lie, or through buffers there.

Owns those buffers, two for each device, and whether this road is open: once the core could not map what was named,
everything goes through the host. Must not know how the core is told.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from typing import Any

from headrace.engine.client import CoreClient
from headrace.engine.device_export import DeviceExport, ExportPlan
from headrace.engine.held_tensors import HeldTensors
from headrace.engine.tensors import device_of
from headrace.engine.update_session import UpdateSession
from headrace.engine.upload_buffers import BufferPool
from headrace.types.errors import HeadraceError, UnavailableError

BUFFER_BYTES = 512 << 20
"""Larger than the host's, since each is waited for twice and copied in a fraction of a millisecond."""

FIRST_EXPORT_BYTES = 1 << 30

logger = logging.getLogger(__name__)


class DeviceRoad:
    """The road to one core. `shares_process`: it is a thread of this process."""

    def __init__(self, client: CoreClient, *, shares_process: bool) -> None:
        self.is_closed = False
        self._client = client
        self._shares_process = shares_process
        self._pools: dict[str, BufferPool] = {}  # by device
        self._short: dict[str, int] = {}  # by device, the session that found no room for a buffer there
        self._plan: ExportPlan | None = None

    @property
    def device_ids(self) -> tuple[str, ...]:
        """From which devices it leads."""
        return () if self.is_closed else self._client.devices

    def export(self) -> DeviceExport:
        """For tensors that stay where they are."""
        return DeviceExport(self.device_ids, shares_process=self._shares_process)

    def note(self, held: HeldTensors, exports: Sequence[DeviceExport]) -> None:
        """These exports brought tensors of a whole update: if all of them, they may go so `again`."""
        if held.listing is None or sum(len(export.entries) for export in exports) < len(held.manifest):
            self._plan = None
        elif self._plan is None or held.listing is not self._plan.listing:
            self._plan = ExportPlan(held.listing, exports, shares_process=self._shares_process)

    def again(self, held: HeldTensors) -> DeviceExport | None:
        """All of the tensors as they went last; None where they are to be looked at one by one."""
        plan = self._plan  # another thread, which brings other tensors, may note its own meanwhile
        if self.is_closed or plan is None or not plan.fits(held.listing):
            return None
        return DeviceExport.again(plan, held, shares_process=self._shares_process)

    def bytes_ahead(self, number: int) -> float:
        """How much of that goes ahead as export `number`: the core copies it while the rest is looked through. A core
        that is a thread of this process would only wait for this one."""
        return math.inf if self._shares_process else FIRST_EXPORT_BYTES * 4 ** (number - 1)

    def pool_for(self, session: UpdateSession, tensor: Any) -> BufferPool | None:
        """The buffers that carry a tensor; None where it has to go through the host: it is on no such device, or that
        has no room."""
        device_id = device_of(tensor)
        if device_id not in self.device_ids:
            return None
        if device_id not in self._pools and self._short.get(device_id) != session.session_id:
            try:
                self._pools[device_id] = self._made(tensor, min(session.max_part_bytes, BUFFER_BYTES))
            except UnavailableError as error:
                logger.warning("tensors of session %d go through the host: %s", session.session_id, error)
                self._short[device_id] = session.session_id
        return self._pools.get(device_id)

    def refuse(self, error: HeadraceError) -> None:
        """Memory that was named could not be mapped, by one rank at least."""
        if not self.is_closed:
            logger.warning("tensors on devices go through the host from now on: %s", error)
        self.close()

    def close(self) -> None:
        """Give up the buffers that are free. Nothing goes this way any more."""
        self.is_closed = True
        for pool in self._pools.values():
            pool.close()

    def _made(self, tensor: Any, size: int) -> BufferPool:
        """Buffers where `tensor` is, the first of them of `size` bytes. `UnavailableError` if it finds no room."""
        from headrace.parallel.device_sharing import SharedDeviceMemory

        make = functools.partial(SharedDeviceMemory, device=tensor.device, shares_process=self._shares_process)
        pool = BufferPool(make, BUFFER_BYTES)
        pool.fit(size)
        first = pool.take()
        assert first is not None, "the first of a pool is there or an error is"
        pool.give_back(first)
        return pool
