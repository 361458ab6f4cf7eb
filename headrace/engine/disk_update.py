"""Weights that the core reads from a checkpoint folder itself: a method of `AsyncEngine`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.engine import saving
from headrace.engine.control import DEFAULT_UPDATE_TIMEOUT, folder_of, terms_of
from headrace.engine.update_log import note_update
from headrace.types.messages import UpdateFromDisk
from headrace.types.plain_values import as_flag
from headrace.types.weights import InFlight, UpdateMode, UpdateReport

if TYPE_CHECKING:
    from headrace.engine.async_engine import AsyncEngine


async def update_weights_from_disk(
    self: AsyncEngine,
    path: str | Path,
    version: str | int,
    *,
    mode: UpdateMode = "auto",
    in_flight: InFlight = "drain",
    timeout: float = DEFAULT_UPDATE_TIMEOUT,
    verify: bool = False,
    root: str | Path | None = None,
) -> UpdateReport:
    """A whole update that the core reads from a checkpoint folder itself. `CheckpointError` if a file changes while
    it is read. `verify`: of a folder that was saved, the files are held against the digests in it first. With
    `root` nothing outside that folder is read, wherever links lead: for paths of others. One that is not live
    within `timeout` seconds, or is cancelled before, is aborted."""
    since = time.monotonic()
    terms, folder = terms_of(version, mode, in_flight, timeout), folder_of(path)
    below = "" if root is None else folder_of(root)
    if as_flag(verify, "verify"):
        await saving.verify(folder, below, terms.timeout_s)
    await self.runtime.joined.make_way(f"weights come from {folder}")
    report = await self.runtime.client.change_for_good(
        lambda call_id: UpdateFromDisk(call_id, folder, terms.version, terms.mode, terms.in_flight, root=below),
        UpdateReport,
        terms.timeout_s,
    )
    note_update(report, ["a folder"], time.monotonic() - since, self.runtime.lookback)
    return report
