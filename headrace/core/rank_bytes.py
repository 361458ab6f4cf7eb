"""Bytes for ranks that open nothing of this host's memory or files: they are sent with the messages, some at a time.

Owns how much is sent at once, on rank 0, and where it waits to be complete, on the other. Must not know weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headrace.core.rank_group import Asked, OtherRanks
from headrace.core.rank_messages import FillOn, Place, StageBufferOn
from headrace.ipc import SharedBuffer
from headrace.types.errors import WeightUpdateError
from headrace.types.weights import BufferRef, TensorInfo
from headrace.weights.staging import TORCH_DTYPES, TensorData, bytes_of

FILL_BYTES = 1 << 20
"""Sent in one message, between two steps."""


class Feed:
    """What is sent for one ticket: `parts`, one after the other."""

    def __init__(self, others: OtherRanks, asked: Asked, parts: Sequence[memoryview]) -> None:
        self._others, self._ticket = others, asked.ticket
        self._parts = [part[at : at + FILL_BYTES] for part in parts for at in range(0, len(part), FILL_BYTES)]
        self._parts.reverse()
        self._start = 0

    def advance(self) -> bool:
        """Send some; whether that was the last."""
        num_bytes = 0
        while self._parts and num_bytes < FILL_BYTES:
            part = self._parts.pop()
            self._others.tell_far(FillOn(self._ticket, self._start, bytes(part)))
            num_bytes += len(part)
            self._start += len(part)
        return not self._parts


class SentBytes:
    """What has come of a feed."""

    def __init__(self, size: int) -> None:
        self.buffer = SharedBuffer.create(max(1, size))
        self._size = size
        self._num_filled = 0

    @property
    def is_complete(self) -> bool:
        return self._num_filled == self._size

    def fill(self, message: FillOn) -> None:
        """Raises `WeightUpdateError` for what is not the next."""
        end = message.start + len(message.data)
        if message.start != self._num_filled or end > self._size:
            raise WeightUpdateError(f"bytes {message.start} to {end} of {self._size} came after {self._num_filled}")
        self.buffer.view[message.start : end] = message.data
        self._num_filled = end


def sent_whole(index: int, num_bytes: int, ticket: int) -> StageBufferOn:
    """Asks to stage a tensor whose bytes are sent."""
    return sent_pieces((Place(index, 0, num_bytes, None, True),), ticket)


def sent_pieces(places: tuple[Place, ...], ticket: int) -> StageBufferOn:
    """Asks to stage pieces whose bytes are sent."""
    return StageBufferOn(ticket, BufferRef("", sum(place.size for place in places)), places)


def whole_bytes(data: TensorData, info: TensorInfo) -> memoryview:
    """All bytes of a tensor as the manifest has it, on the host."""
    if not isinstance(data, torch.Tensor):
        found = torch.empty(data.num_elements, dtype=TORCH_DTYPES[info.dtype], device="cpu")
        data.copy(slice(0, data.num_elements), found)
        data = found
    return bytes_of(data).data


def one_after_the_other(places: Sequence[Place]) -> tuple[Place, ...]:
    """The same pieces where they lie once they were sent."""
    found, start = [], 0
    for place in places:
        found.append(Place(place.index, start, place.size, place.start, place.is_last))
        start += place.size
    return tuple(found)
