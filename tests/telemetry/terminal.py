"""A terminal in the place of this process's standard error, and somebody who reads it."""

from __future__ import annotations

import contextlib
import os
import pty
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from headrace.telemetry import progress_bar


class Screen:
    """All that was written so far."""

    def __init__(self, descriptor: int) -> None:
        self.text = ""
        self._descriptor = descriptor
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def lines(self) -> list[str]:
        """What was drawn, without what moves the cursor."""
        return [line for line in self.text.replace("\x1b[K", "").split("\r") if line]

    def wait_for(self, wanted: str) -> str:
        """Until this is there; returns all that is."""
        deadline = time.monotonic() + 30
        while wanted not in self.text:
            assert time.monotonic() < deadline, self.text
            time.sleep(0.002)
        return self.text

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while data := os.read(self._descriptor, 4096):
                self.text += data.decode()


@contextlib.contextmanager
def terminal() -> Iterator[Screen]:
    """To be entered in a test's own body: pytest sets `sys.stderr` anew after fixtures are made. Bars come at once."""
    near, far = pty.openpty()
    with pytest.MonkeyPatch.context() as patch, os.fdopen(far, "w") as stream:
        patch.setenv("TERM", "xterm")
        patch.delenv("LOCAL_RANK", raising=False)
        patch.setattr(progress_bar, "DELAY_SECONDS", 0.0)
        patch.setattr(progress_bar, "_REDRAW_SECONDS", 0.001)
        patch.setattr(sys, "stderr", stream)
        yield Screen(near)
