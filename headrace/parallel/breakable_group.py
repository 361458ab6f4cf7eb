"""A gloo group whose calls end when a rank is lost that cannot be ended from here: gloo itself waits until connections
break, which those of a process that is stopped, or of a host that is gone, do not.

Owns what is left of a call that was broken off: gloo's own thread may wait for long, and the group must live as long.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from datetime import timedelta
from typing import Any

_LOOK = timedelta(seconds=0.25)


class BreakableGroup:
    """The calls of a process group, until `is_broken`: from then on each raises `RuntimeError`."""

    def __init__(self, group: Any, is_broken: threading.Event) -> None:
        self._group = group
        self._is_broken = is_broken

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._group, name)
        if not callable(found) or name in ("size", "rank", "name"):
            return found

        def call(*arguments: Any) -> _Work | None:
            self._check()
            work = found(*arguments)
            return None if work is None else _Work(work, self)

        return call

    def wait(self, work: Any, limit: timedelta | None) -> None:
        """Wait for what was begun, up to a limit beside its own. Looks now and then whether it was broken off."""
        until = math.inf if limit is None else time.monotonic() + limit.total_seconds()
        while True:
            try:
                work.wait(_LOOK)
                return
            except RuntimeError:
                if work.is_completed():
                    work.wait()  # raises what it failed with, if it has
                    return
                if time.monotonic() >= until:
                    raise
            if self._is_broken.is_set():
                arguments = self._group, work
                threading.Thread(target=_outlive, args=arguments, name="headrace-broken-call", daemon=True).start()
                self._check()

    def _check(self) -> None:
        if self._is_broken.is_set():
            raise RuntimeError("it was broken off")


class _Work:
    def __init__(self, work: Any, group: BreakableGroup) -> None:
        self._work, self._group = work, group

    def wait(self, limit: timedelta | None = None) -> None:
        self._group.wait(self._work, limit)


def _outlive(group: Any, work: Any) -> None:
    """Hold both until the call has ended, whatever it comes to: to let go of a group is to wait for its calls."""
    with contextlib.suppress(RuntimeError):
        work.wait()
    del work, group
