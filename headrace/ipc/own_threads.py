"""The threads that one object has begun, so that its end is theirs. Owns the wait for them; what ends them it does not
know."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any


class OwnThreads:
    """Daemon threads, of which none is waited for before `join`."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []

    def start(self, name: str, run: Callable[..., None], *arguments: Any) -> None:
        """Begin one. Not to be called by two threads at a time."""
        thread = threading.Thread(target=run, args=arguments, name=name, daemon=True)
        thread.start()
        self._threads = [*(each for each in self._threads if each.is_alive()), thread]

    def join(self, seconds: float) -> None:
        """Wait for all of them, so many seconds at most."""
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
