"""What the tensors of an update come from, where every rank has it: buffers, payloads, folders, groups. Owns what is
open of it on the others. Must not know weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headrace.core.rank_group import Asked, OtherRanks
from headrace.core.rank_messages import CloseForeignOn, GiveUpOn, Place
from headrace.ipc import SharedBuffer
from headrace.types.weights import BufferRef, DeviceRef
from headrace.weights.memory import SharedTensors, StageBuffer


@dataclass(eq=False, slots=True)
class Arrived:
    """A tensor that a group brought to a call, on every rank; `data` is what came here."""

    call: int
    data: Any
    asked: Asked | None = None


@dataclass(frozen=True, eq=False, slots=True)
class FileTensorOn:
    """A tensor of a folder that every rank reads; `data` is as this one does."""

    name: str
    data: Any


@dataclass(frozen=True, eq=False, slots=True)
class ForeignTensorOn:
    """A tensor of a payload that every rank has opened."""

    memory: RankForeign
    name: str
    data: Any


@dataclass(frozen=True, eq=False, slots=True)
class BufferPart:
    """Bytes of a buffer that every rank maps."""

    buffer: RankBuffer
    offset: int
    size: int

    def here(self) -> Any:
        """They as this rank has mapped them; on a device that may have to be waited for."""
        return self.buffer.own.part(self.offset, self.size)


class RankBuffer:
    """A buffer that every rank stages from; `own` is it on this one."""

    def __init__(self, ref: BufferRef | DeviceRef, own: StageBuffer, others: OtherRanks) -> None:
        self.ref = ref
        self.own = own
        self.asked: Asked | None = None  # what the others were asked last to stage from it
        self._host = SharedBuffer.open(ref) if others.has_far else None
        self._others = others

    def part(self, offset: int, size: int) -> BufferPart:
        return BufferPart(self, offset, size)

    def parts_to_send(self, places: Sequence[Place]) -> list[memoryview]:
        """For ranks that do not map it."""
        return [] if self._host is None else [self._host.part(place.offset, place.size) for place in places]

    def close(self) -> None:
        """When nobody reads it any more."""
        give_up(self._others, self.asked)
        if self._host is not None:
            self._host.close()
        self.own.close()


class RankForeign:
    """What another engine's client shares, open on every rank."""

    def __init__(self, key: int, own: SharedTensors, others: OtherRanks) -> None:
        self.key = key
        self.asked: Asked | None = None
        self._own = own
        self._others = others
        self.tensors: list[tuple[str, Any]] = [(name, ForeignTensorOn(self, name, data)) for name, data in own.tensors]

    def close(self) -> None:
        self.tensors.clear()
        give_up(self._others, self.asked)
        if not self._others.is_closed:
            self._others.ask(CloseForeignOn, self.key).settle()
        self._own.close()


def give_up(others: OtherRanks, asked: Asked | None) -> None:
    """Have the others do no more of it, and wait until they do not."""
    if asked is not None and not asked.is_over and not others.is_closed:
        others.tell(GiveUpOn(asked.ticket))
        asked.settle()
