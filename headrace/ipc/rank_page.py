"""The page of shared memory in which a rank shows that it lives, what came of each step, and what it suffers from.

The rank writes, one store a word; rank 0 reads without asking it. Times are nanoseconds of CLOCK_MONOTONIC. Knows
neither plans nor results: they are numbers here.
"""

from __future__ import annotations

import mmap
import threading
from time import monotonic, monotonic_ns

from headrace.ipc.own_threads import OwnThreads

RANK_PAGE_BYTES = 4096
BEAT_SECONDS = 0.25
NUM_RESULTS = 64
END_SECONDS = 1.0

MAX_GAP_SECONDS = 0.75
"""Of time between two looks, what counts: as much as a busy machine makes of half a second."""

_BEAT, _FAILED, _FIRST_RESULT = 0, 1, 2
_DIGEST_BITS = 32
_NUM_MARKS = (1 << 31) - 1
_TEXT_START = 8 * (_FIRST_RESULT + NUM_RESULTS)
_TEXT_BYTES = 1024


class AwakeClock:
    """Seconds in which a watcher could look. While it could not, those it watches may have been stopped with it, as
    where a container is paused: that they were silent meanwhile means nothing."""

    def __init__(self) -> None:
        self._last, self._now = monotonic(), 0.0

    def now(self) -> float:
        """To be asked at every look."""
        last, self._last = self._last, monotonic()
        self._now += min(self._last - last, MAX_GAP_SECONDS)
        return self._now


class RankPage:
    """Both sides of one page."""

    def __init__(self, memory: mmap.mmap | bytearray) -> None:
        self._bytes = memoryview(memory)
        self._words = self._bytes[:_TEXT_START].cast("q")
        self._closed = threading.Event()
        self._threads = OwnThreads()

    @classmethod
    def map(cls, descriptor: int) -> RankPage:
        """The page behind a file of RANK_PAGE_BYTES. It keeps a descriptor of its own until `close`."""
        return cls(mmap.mmap(descriptor, RANK_PAGE_BYTES))

    def close(self) -> None:
        """Let go of the memory; the last state stays. Whoever reads at this moment holds it until he is done."""
        self._closed.set()
        self._threads.join(END_SECONDS)
        copy = memoryview(bytearray(self._bytes))
        self._words, self._bytes = copy[:_TEXT_START].cast("q"), copy

    # The rank's side.

    def beat(self) -> None:
        """Its process runs."""
        self.store(_BEAT, 0)

    def beat_in_thread(self) -> None:
        """Beat until the page is closed."""
        self.beat()
        self._threads.start("headrace-rank-pulse", self._beat_on)

    def write_result(self, number: int, digest: int) -> None:
        """What came of plan `number` of those that were sent: 32 bits of it."""
        self.store(_FIRST_RESULT + number % NUM_RESULTS, _mark(number) << _DIGEST_BITS | digest)

    def write_failure(self, number: int, text: str) -> None:
        """That plan failed here."""
        self.write_text(text)
        self.store(_FAILED, number + 1)

    def clear_failure(self) -> None:
        """Rank 0 knows, and it is so everywhere."""
        self.store(_FAILED, 0)

    def write_text(self, text: str) -> None:
        """What it suffers from, in words."""
        self.store_text(text.encode("utf-8", "backslashreplace")[: _TEXT_BYTES - 1])

    def store(self, word: int, value: int) -> None:
        """Everything above ends in this, or the next. A beat is the time at which it is stored."""
        self._words[word] = monotonic_ns() if word == _BEAT else value

    def store_text(self, raw: bytes) -> None:
        """As UTF-8."""
        self._bytes[_TEXT_START : _TEXT_START + _TEXT_BYTES] = raw[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")

    def _beat_on(self) -> None:
        while not self._closed.wait(BEAT_SECONDS):
            self.beat()

    # The side of rank 0.

    @property
    def last_beat(self) -> int:
        """When the rank's process last ran at all."""
        return self._words[_BEAT]

    @property
    def failed(self) -> int | None:
        """The number of a plan that failed there, and of which rank 0 has not said that it failed."""
        failed = self._words[_FAILED]
        return failed - 1 if failed else None

    @property
    def text(self) -> str:
        """As it was written."""
        raw = bytes(self._bytes[_TEXT_START : _TEXT_START + _TEXT_BYTES])
        return raw.rstrip(b"\0").decode("utf-8", "replace")

    def result(self, number: int) -> int | None:
        """What came of that plan there; None: nothing yet. It is kept until NUM_RESULTS later ones are written."""
        word = self._words[_FIRST_RESULT + number % NUM_RESULTS]
        return word & (1 << _DIGEST_BITS) - 1 if word >> _DIGEST_BITS == _mark(number) else None


def _mark(number: int) -> int:
    """A plan's number in 31 bits, which is not that of a word never written."""
    return number % _NUM_MARKS + 1
