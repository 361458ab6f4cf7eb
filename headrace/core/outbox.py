"""What the core sends. Owns the order of its messages: a reply never overtakes the deltas that came before it.

A front that reads more slowly than the core steps gets fewer, larger deltas: while the link is behind they stay here
and are joined, so that a reply waits for little more than one delta a sequence, and not for every token since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from headrace.ipc import CoreLink
from headrace.types.errors import ErrorInfo
from headrace.types.messages import Deltas, Reply
from headrace.types.request import Delta, RoutedPart, TokenExtras


class Outbox:
    """Collects deltas and sends them in one message per step or command batch; sends replies at once."""

    def __init__(self, link: CoreLink) -> None:
        self._link = link
        self._deltas: list[Delta] = []
        self._encoder = msgspec.msgpack.Encoder()
        self._statuses: dict[int, Callable[[], Any]] = {}  # by call

    def add(self, deltas: Iterable[Delta]) -> None:
        """Queue deltas for the next `flush`."""
        self._deltas += deltas

    def add_status(self, call_id: int, status: Callable[[], Any]) -> None:
        """The answer to a call is to bring what this is then."""
        self._statuses[call_id] = status

    def reply(self, call_id: int, payload: Any = None) -> None:
        """Answer a command with the value its docstring names."""
        self.flush(force=True)
        self._link.send(Reply(call_id, self._encoder.encode(payload), status=self._status(call_id)))

    def refuse(self, call_id: int, error: ErrorInfo) -> None:
        """Answer a command with an error."""
        self.flush(force=True)
        self._link.send(Reply(call_id, error=error, status=self._status(call_id)))

    def _status(self, call_id: int) -> bytes:
        status = self._statuses.pop(call_id, None)
        return b"" if status is None else self._encoder.encode(status())

    def flush(self, *, force: bool = False) -> None:
        """Send what is queued, unless the link is behind. Raises `PeerClosed`, as all sending does."""
        if not self._deltas:
            return
        if self._link.is_behind and not force:
            self._deltas = joined(self._deltas)
            return
        deltas, self._deltas = self._deltas, []
        self._link.send(Deltas(tuple(deltas)))


def joined(deltas: Iterable[Delta]) -> list[Delta]:
    """One delta per sequence that brings the same."""
    found: dict[int, Delta] = {}
    for delta in deltas:
        earlier = found.get(delta.handle)
        found[delta.handle] = delta if earlier is None else _join(earlier, delta)
    return list(found.values())


def _join(first: Delta, second: Delta) -> Delta:
    """By kind of field, so that one that is added later is not forgotten."""
    pairs = ((name, getattr(first, name), getattr(second, name)) for name in Delta.__struct_fields__)
    return Delta(**{name: _join_values(name, *values) for name, *values in pairs})


def _join_values(name: str, first: Any, second: Any) -> Any:
    """What is said of the prompt is said once; counts stand for all so far; the rest has entries per token or span."""
    if name in ("handle", "finish"):
        return second
    if name == "times":
        return second or first
    if name.startswith("prompt_"):
        return first if first and first != TokenExtras() else second
    if isinstance(first, TokenExtras):
        return _join_extras(first, second)
    if isinstance(first, RoutedPart):
        return first.joined(second)
    return max(first, second) if isinstance(first, int) else first + second


def _join_extras(first: TokenExtras, second: TokenExtras) -> TokenExtras:
    return TokenExtras(*(getattr(first, name) + getattr(second, name) for name in TokenExtras.__struct_fields__))
