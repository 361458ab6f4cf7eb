"""The memory in which tensors of a weight group arrive. Owns how much of it there is at once: MAX_AHEAD_BYTES, more of
a device, or one buffer where a single broadcast is larger. Knows neither groups nor tensors.

A receiver is not told how many bytes came: gloo takes fewer than it waits for without a word, and ends the process
where they are more. So the last bytes are marked before a broadcast, and where nobody is passed on to, a broadcast may
run on into memory that is only an address, whose first bytes are marked too. What no weight is, NaN, is the mark of
bytes of floating dtypes; of integers every byte may be a value, so they are marked by chance.
"""

from __future__ import annotations

import mmap
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from headrace.types.weights import TensorInfo

MAX_AHEAD_BYTES = 128 << 20
MAX_DEVICE_BYTES = 1 << 30
GUARD_BYTES = 16 << 30
"""Addresses behind a buffer. Nothing is had for them before something is written there."""

_SMALLEST = 1 << 20
_NAN = b"\xff"  # each byte of an element of any floating dtype
_NUM_BEHIND = 8
_NUM_OF_NAN = 2  # the last of an element of any floating dtype that make it NaN; as many that are missing are missed
_NUM_BY_CHANCE = 4  # as many bytes will not be equal by accident
_NO_RESERVE = 0x4000  # MAP_NORESERVE


class Buffer(Protocol):
    """Memory for one broadcast at a time; see `ArrivalBuffer`."""

    capacity: int

    def armed(self, size: int, num_integer: int) -> torch.Tensor: ...

    def mismatch(self, size: int) -> str: ...

    def part(self, info: TensorInfo, start: int) -> Any: ...


class ArrivalBuffer:
    """Memory for one broadcast at a time, of up to `capacity` bytes; `guard` bytes of addresses are behind it."""

    def __init__(self, capacity: int, guard: int) -> None:
        self.capacity = capacity
        self._guard = guard
        self._chance, self._tail = secrets.token_bytes(_NUM_BY_CHANCE), b""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_NO_RESERVE if guard else 0)
        memory = mmap.mmap(-1, capacity + max(guard, _NUM_BEHIND), flags=flags)
        self.view = memoryview(memory)
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)

    def armed(self, size: int, num_integer: int = 0) -> torch.Tensor:
        """What a broadcast of `size` bytes may write to, marked so that `mismatch` can tell. Its last `num_integer` are
        of integers."""
        num_chance = min(size, num_integer, _NUM_BY_CHANCE)
        num_marked = min(size, _NUM_BY_CHANCE if num_chance else _NUM_OF_NAN)
        self._tail = _NAN * (num_marked - num_chance) + self._chance[:num_chance]
        self.view[size - num_marked : size + _NUM_BEHIND] = self._tail + _NAN * _NUM_BEHIND
        if num_chance == size < _NUM_BY_CHANCE:
            self._tail = b""
        return self._bytes[: size + self._guard]

    def part(self, info: TensorInfo, start: int) -> memoryview:
        """The bytes of a tensor that begin at `start`."""
        return self.view[start : start + info.num_bytes]

    def mismatch(self, size: int) -> str:
        """What came instead of `size` bytes, as in "fewer"; "" if as many came. Bytes that end in NaN are taken for
        fewer; one that is missing is not missed, nor are three of integers."""
        if self.view[size : size + _NUM_BEHIND] != _NAN * _NUM_BEHIND:
            return "more"
        return "fewer" if self._tail and self.view[size - len(self._tail) : size] == self._tail else ""


class ArrivalMemory:
    """Buffers that are used again and again. `put` is for any thread. `make` makes one of a device's, of a capacity;
    None: they are of the host's memory, in powers of two, and guarded while `is_guarded`."""

    def __init__(self, make: Callable[[int], Buffer] | None = None) -> None:
        self.is_guarded = True
        self._make = make
        self.most_bytes = MAX_AHEAD_BYTES if make is None else MAX_DEVICE_BYTES
        self.lock = threading.Lock()
        self._returned = threading.Condition(self.lock)
        self._free: list[Buffer] = []
        self._num_bytes = 0  # of all buffers, free or not

    def take(self, size: int, until: float) -> Buffer:
        """A buffer for `size` bytes. Waits until enough was put back, or raises `TimeoutError` at `until` (of the
        monotonic clock); `OSError`, or a device's `torch.OutOfMemoryError`, where there is no memory even for it
        alone."""
        with self._returned:
            while (found := self._found(size)) is None:
                if not self._returned.wait(until - time.monotonic()):
                    raise TimeoutError("what had arrived before was not staged by then")
            return found

    def take_now(self, size: int) -> Buffer | None:
        """As `take`, or None where it would wait."""
        with self._returned:
            return self._found(size)

    def _found(self, size: int) -> Buffer | None:
        if self._make is None:
            capacity = max(_SMALLEST, 1 << max(0, size - 1).bit_length())
        else:  # tensors of a model have few sizes, which are no powers of two
            capacity = max(1, -(-size // _SMALLEST)) * _SMALLEST
        fitting = [buffer for buffer in self._free if capacity <= buffer.capacity <= 2 * capacity]
        if fitting:
            smallest = min(fitting, key=lambda buffer: buffer.capacity)
            self._free.remove(smallest)
            return smallest
        while self._free and self._num_bytes + capacity > self.most_bytes:
            self._num_bytes -= self._free.pop(0).capacity
        if self._num_bytes and self._num_bytes + capacity > self.most_bytes:
            return None
        found = self._made(capacity)
        if found is not None:
            self._num_bytes += capacity
        return found

    def _made(self, capacity: int) -> Buffer | None:
        """A new one. None where there is no more memory before what is in use is put back."""
        while True:
            try:
                return self._new(capacity)
            except (OSError, torch.OutOfMemoryError):
                if not self._num_bytes:
                    raise
            if not self._free:
                return None
            self._num_bytes -= self._free.pop(0).capacity

    def _new(self, capacity: int) -> Buffer:
        if self._make is not None:
            return self._make(capacity)
        if self.is_guarded:
            try:
                return ArrivalBuffer(capacity, GUARD_BYTES)
            except OSError:  # addresses are bounded here, as under `ulimit -v`
                self.is_guarded = False
        return ArrivalBuffer(capacity, 0)

    def put(self, buffer: Buffer) -> None:
        """It is not read any more, and may be filled again."""
        with self._returned:
            if buffer.capacity > self.most_bytes:
                self._num_bytes -= buffer.capacity
            else:
                self._free.append(buffer)
            self._returned.notify()
