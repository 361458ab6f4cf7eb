"""A log handler that never waits. Owns the lines on their way to a descriptor, and drops those that find no room.

A pipe that nobody reads takes 64 KiB and then stops whoever writes to it; a server must not be stopped by its log.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import deque

MAX_WAITING_BYTES = 1 << 22
FLUSH_SECONDS = 1.0
ERROR_SECONDS = 0.2
_RETRY_SECONDS = 0.05


class QueuedHandler(logging.Handler):
    """Writes to `descriptor` in a thread of its own; says how many records found no room while nobody read."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._begin()
        begin = weakref.WeakMethod(self._begin)
        os.register_at_fork(after_in_child=lambda: (again := begin()) and again())

    def _begin(self) -> None:
        """Also in a process that is forked off: it has no thread but the one that forked, and its parent writes what
        waited."""
        self._changed = threading.Condition()
        self._lines: deque[bytes] = deque()
        self._num_bytes = 0  # that are not written yet
        self._num_dropped = 0
        self._is_slow = False
        self._thread: threading.Thread | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record, or count it. An error is written before this returns, unless the reader is known to be slow:
        what comes after an error may be the end of the process."""
        line = (self.format(record) + "\n").encode("utf-8", "backslashreplace")
        with self._changed:
            if self._num_bytes + len(line) > MAX_WAITING_BYTES:
                self._num_dropped += 1
                return
            self._lines.append(line)
            self._num_bytes += len(line)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="headrace-log", daemon=True)
                self._thread.start()
            if record.levelno >= logging.ERROR and not self._is_slow:
                self._is_slow = not self._changed.wait_for(lambda: not self._num_bytes, ERROR_SECONDS)

    def flush(self) -> None:
        """Wait until all is written, but not for long."""
        with self._changed:
            self._changed.wait_for(lambda: not self._num_bytes, FLUSH_SECONDS)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines)
                line = self._lines.popleft()
            self._write(line)
            with self._changed:
                self._num_bytes -= len(line)
                self._is_slow = False
                num_dropped, self._num_dropped = self._num_dropped, 0
                self._changed.notify_all()
            if num_dropped:
                self._write(f"{num_dropped} log records were dropped: nobody read them in time\n".encode())

    def _write(self, line: bytes) -> None:
        """Not through `sys.stderr`: its lock, held by a thread that waits, would keep the process from ending."""
        while line:
            try:
                line = line[os.write(self._descriptor, line) :]
            except BlockingIOError:
                time.sleep(_RETRY_SECONDS)
            except OSError:
                return  # the reader is gone; there is nobody to tell
