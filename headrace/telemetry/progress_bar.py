"""How far something is, as one line on a terminal. Owns when it is drawn and by whom: a thread that reads what others
note, so that nobody who works ever waits for a terminal. Nothing is drawn where standard error is none.

The cursor rests at the beginning of the line: a log line, or a caller's own, is written over the bar and not behind it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

DELAY_SECONDS = 0.5
"""What is over sooner is not drawn at all."""

_REDRAW_SECONDS = 0.1
_CLOSE_SECONDS = 1.0
_BAR_WIDTH = 24
_DEFAULT_COLUMNS = 80
_CLEAR = "\r\x1b[K"


class Progress(NamedTuple):
    """So many of `total` are done; 0: nobody can tell of how many."""

    what: str
    done: int = 0
    total: int = 0


def can_draw() -> bool:
    """Standard error is a terminal that moves its cursor, and, of processes that `torchrun` starts on it, this is the
    first: several bars would draw over each other."""
    if os.environ.get("LOCAL_RANK", "0") != "0" or os.environ.get("TERM", "dumb") == "dumb":
        return False
    try:  # both: a notebook's stream has the descriptor of the terminal that its server was started on
        return sys.stderr.isatty() and os.isatty(sys.stderr.fileno())
    except (AttributeError, OSError, ValueError):  # it is None, closed, or somebody's object
        return False


class ProgressBar:
    """Shows what `read` says, which is called in another thread, until it is closed."""

    def __init__(self, read: Callable[[], Progress], *, is_wanted: bool = True) -> None:
        self._read = read
        self._since = time.monotonic()
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None
        if is_wanted and can_draw():
            self._descriptor = sys.stderr.fileno()
            self._thread = threading.Thread(target=self._run, name="headrace-progress", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Take it away. A terminal that is stopped is not waited for."""
        self._is_over.set()
        if self._thread is not None:
            self._thread.join(_CLOSE_SECONDS)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        if self._is_over.wait(DELAY_SECONDS):
            return
        with contextlib.suppress(OSError):  # the terminal is gone
            while not self._is_over.is_set():
                self._write(f"{_CLEAR}{self._line()}\r")
                self._is_over.wait(_REDRAW_SECONDS)
            self._write(_CLEAR)

    def _line(self) -> str:
        what, done, total = self._read()
        seconds = f"{time.monotonic() - self._since:.0f} s"
        try:
            columns = os.get_terminal_size(self._descriptor).columns or _DEFAULT_COLUMNS
        except OSError:
            columns = _DEFAULT_COLUMNS
        if not total:
            return f"{what}  {seconds}"[: columns - 1]
        num_full = _BAR_WIDTH * min(done, total) // total
        return f"{what} [{'#' * num_full:<{_BAR_WIDTH}}] {done}/{total}  {seconds}"[: columns - 1]

    def _write(self, text: str) -> None:
        """Not through `sys.stderr`: its lock, held by a thread that waits, would keep the process from ending."""
        data = text.encode("ascii", "replace")
        while data:
            data = data[os.write(self._descriptor, data) :]
