"""Something that comes between two lines of chosen code, as a signal does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any


class BeforeLine:
    """Calls `action` once: before the line of that `number` that is run of the `watched` code, in the thread that is
    within `tracing`."""

    def __init__(self, number: int, watched: Collection[CodeType], action: Callable[[], None]) -> None:
        self.has_come = False
        self._num_left = number
        self._watched = watched
        self._action = action

    @contextmanager
    def tracing(self) -> Iterator[None]:
        former = sys.gettrace()
        sys.settrace(self._trace)
        try:
            yield
        finally:
            sys.settrace(former)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code not in self._watched:
            return None
        if event == "line":
            self._num_left -= 1
            if self._num_left < 0 and not self.has_come:
                self.has_come = True
                self._action()
        return self._trace
