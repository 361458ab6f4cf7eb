"""The slow imports of a process of the core."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected(*, shares_process: bool = False) -> Iterator[None]:
    """What the block imports stays as long as the process, and its garbage collector never walks it.

    While torch is imported it would walk a growing pile a dozen times, a fifth of the time that the import takes.
    Where others share the process nothing is done: the collector belongs to all of it.
    """
    if shares_process:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
