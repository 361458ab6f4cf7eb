"""What the core sends. Owns the order of its messages: a reply never overtakes the deltas that came before it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from headrace.ipc import CoreLink
from headrace.types.errors import ErrorInfo
from headrace.types.messages import Deltas, Reply
from headrace.types.request import Delta


class Outbox:
    """Collects deltas and sends them in one message per step or command batch; sends replies at once."""

    def __init__(self, link: CoreLink) -> None:
        self._link = link
        self._deltas: list[Delta] = []
        self._encoder = msgspec.msgpack.Encoder()

    def add(self, deltas: Iterable[Delta]) -> None:
        """Queue deltas for the next `flush`."""
        self._deltas += deltas

    def reply(self, call_id: int, payload: Any = None) -> None:
        """Answer a command with the value its docstring names."""
        self.flush()
        self._link.send(Reply(call_id, payload=self._encoder.encode(payload)))

    def refuse(self, call_id: int, error: ErrorInfo) -> None:
        """Answer a command with an error."""
        self.flush()
        self._link.send(Reply(call_id, error=error))

    def flush(self) -> None:
        """Send what is queued. Raises `PeerClosed`, as all sending does."""
        if self._deltas:
            deltas, self._deltas = self._deltas, []
            self._link.send(Deltas(tuple(deltas)))
