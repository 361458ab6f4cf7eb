"""The other ranks of a replica, as rank 0 sees them: what they are told, what they answer, and the watch over them.
Wherever one runs, it is a `RankPeer`. Must not know plans, weights or devices.

Each is watched by a thread that sees what it shows without being asked. A rank is lost when its process has ended, when
a signal keeps it stopped for STOPPED_SECONDS, when it has not run at all for its `silent_seconds`, or when a step
failed there that goes on elsewhere. Long work is legal: a rank that is at work beats. All are ended then, which breaks
whatever rank 0 waits for them in; it raises `DeviceLost` with the cause wherever it next looks.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

from headrace.core.faults import DeviceLost
from headrace.core.rank_messages import PLAN, READY, RESULT, TELL, RankAnswer, answer_decoder, encode_message
from headrace.core.rank_results import ResultOn, result_decoder
from headrace.ipc import PeerClosed
from headrace.ipc.own_threads import OwnThreads
from headrace.ipc.rank_page import AwakeClock
from headrace.ipc.rank_peer import RankPeer
from headrace.types.errors import HeadraceError

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
STOPPED_SECONDS = 2.0
FAILED_SECONDS = 2.0
ANSWER_SECONDS = 60.0
CLOSE_SECONDS = 5.0
EXIT_SECONDS = 1.0
STUCK_SECONDS = 2.0
WAIT_SECONDS = 0.0002
"""Between two looks for an answer: about what it takes one to come."""

LOST_EXIT_CODE = 4


class Asked:
    """What the other ranks were asked, and have answered so far. `values` are theirs by rank, once it is done."""

    def __init__(self, ranks: OtherRanks, ticket: int, num_ranks: int) -> None:
        self.ticket = ticket
        self._ranks = ranks
        self._num_open = num_ranks
        self._answers: dict[int, RankAnswer] = {}

    @property
    def values(self) -> list[tuple[str, ...]]:
        return [self._answers[rank].values for rank in sorted(self._answers)]

    @property
    def data(self) -> list[bytes]:
        """Of those who send any."""
        return [answer.data for _, answer in sorted(self._answers.items()) if answer.data]

    @property
    def is_over(self) -> bool:
        """Whether all have answered, as far as is known."""
        return not self._num_open

    def is_done(self) -> bool:
        """Whether all have answered; waits for nothing. Raises what the first of them says that could not, once all
        have, and `DeviceLost`."""
        if self._num_open:
            self._ranks.look()
        if self._num_open:
            return False
        error = self.first_error()
        if error is not None:
            raise error
        return True

    def wait(self, seconds: float = ANSWER_SECONDS) -> list[tuple[str, ...]]:
        """Their values. Raises as `is_done`; who does not answer in time is lost."""
        until = time.monotonic() + seconds
        while not self.is_done():
            if time.monotonic() >= until:
                raise self._ranks.lose(f"{self._ranks.names(self._missing())} has not answered for {seconds:g} s")
            time.sleep(WAIT_SECONDS)
        return self.values

    def settle(self) -> None:
        """Wait until all have answered, whatever that is."""
        try:
            self.wait()
        except HeadraceError as error:
            logger.debug("given up: %s", error)

    def first_error(self) -> HeadraceError | None:
        """Of those who have answered."""
        found = [(rank, answer.error) for rank, answer in sorted(self._answers.items()) if answer.error is not None]
        return _on_rank(found[0][1].to_exception(), found[0][0]) if found else None

    def note(self, rank: int, answer: RankAnswer) -> bool:
        """An answer came; whether it was the last."""
        self._answers[rank] = answer
        self._num_open -= 1
        return not self._num_open

    def _missing(self) -> list[int]:
        return [rank for rank in self._ranks.numbers if rank not in self._answers]


def _on_rank(error: HeadraceError, rank: int) -> HeadraceError:
    return type(error)(f"{error.message} (on rank {rank})", field=error.field)


class OtherRanks:
    """All ranks but the first. `watch` begins to watch them; `shares_process`: this process is not ours to end.

    `break_off` is called by the watching thread when a rank is lost, to end what the others wait in. `companions` are
    those that compute with rank 0: no step fails on some of them only."""

    def __init__(self, peers: Sequence[RankPeer], *, shares_process: bool) -> None:
        self.lost = ""
        self.break_off: Callable[[], object] = lambda: None
        self.peers = peers
        self.companions: Collection[int] = [peer.rank for peer in peers]
        self._results: list[ResultOn] = []
        self.shares_process = shares_process
        self._open: dict[int, Asked] = {}
        self._last_ticket = READY
        self.is_closed = False
        self._is_noted = False
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = OwnThreads()
        self._stopped_since: dict[int, float] = {}
        self._beats: dict[int, tuple[int, float]] = {}  # the last one, and when it was seen first
        self._failed_since: dict[int, tuple[int, float]] = {}

    @property
    def numbers(self) -> list[int]:
        """Which ranks they are."""
        return [process.rank for process in self.peers]

    @property
    def has_far(self) -> bool:
        """Whether some do not open what is in shared memory here: to those bytes are sent."""
        return not all(process.shares_memory for process in self.peers)

    def names(self, ranks: Sequence[int]) -> str:
        """As in "rank 1 (process 4242)"."""
        return " and ".join(process.name for process in self.peers if process.rank in ranks)

    def expect(self, ticket: int) -> Asked:
        """What all will answer to `ticket` without being asked."""
        asked = self._open[ticket] = Asked(self, ticket, len(self.peers))
        return asked

    def ask(self, message: Callable[..., Any], *arguments: Any, far: Callable[[int], Any] | None = None) -> Asked:
        """Send the message that is made of a new ticket and these arguments. Raises `DeviceLost`.

        `far` makes another one of that ticket, for those that do not share memory with this process."""
        self._last_ticket += 1
        near = encode_message(message(self._last_ticket, *arguments))
        other = encode_message(far(self._last_ticket)) if far is not None and self.has_far else near
        for process in self.peers:
            self._send_to(process, TELL, near if process.shares_memory else other)
        return self.expect(self._last_ticket)

    def tell_far(self, message: Any) -> None:
        """Send a message to those that do not share memory with this process. Raises `DeviceLost`."""
        payload = encode_message(message)
        for process in self.peers:
            if not process.shares_memory:
                self._send_to(process, TELL, payload)

    def tell(self, message: Any) -> None:
        """Send a message to all of them. Raises `DeviceLost`."""
        self._send(TELL, encode_message(message))

    def tell_each(self, kind: int, payloads: Mapping[int, bytes]) -> None:
        """Send to each rank what is for it, if anything is. Raises `DeviceLost`."""
        for process in self.peers:
            if process.rank in payloads:
                self._send_to(process, kind, payloads[process.rank])

    def send_plan(self, words: bytes) -> None:
        """The words of a plan, which all of them execute next."""
        self._send(PLAN, words)

    def look(self, rank: int = 0, seconds: float = 0.0) -> None:
        """Take in what has come, after waiting up to so many seconds for something of `rank`. Raises `DeviceLost`."""
        self.check()
        for process in self.peers:
            try:
                self._take_in(process, seconds if process.rank == rank else 0.0)
            except PeerClosed as closed:
                raise self._gone(process, closed) from None

    def take_results(self) -> list[ResultOn]:
        """Those that were sent since."""
        found, self._results = self._results, []
        return found

    def look_at_last_words(self) -> None:
        """Take in what those have sent that are lost."""
        for process in self.peers:
            with suppress(PeerClosed):
                self._take_in(process)

    def check(self) -> None:
        """Raise `DeviceLost` if a rank is."""
        if self.lost:
            self._is_noted = True
            raise DeviceLost(self.lost)

    def lose(self, cause: str) -> DeviceLost:
        """The replica is lost, for this cause unless there was one before. Ends all of them; returns what to raise."""
        self._lose(cause)
        self._is_noted = True
        return DeviceLost(self.lost)

    def cause_of(self, fault: BaseException) -> DeviceLost:
        """What to raise where ranks did not meet: what became of one, or what it looked like from here."""
        for _ in range(int(EXIT_SECONDS / LOOK_SECONDS)):
            found = self.lost or next(filter(None, (self._end_of(process) for process in self.peers)), "")
            if found:
                return self.lose(found)
            time.sleep(LOOK_SECONDS)
        return self.lose(str(fault))

    def failure_until(self, number: int) -> str:
        """What failed on some rank, of the plans up to this one, which did not fail here; "" if nothing did."""
        for process in self.peers:
            failed = process.page.failed
            if failed is not None and failed <= number:
                return f"{process.name} failed in a step, and not all ranks did: {process.page.text}"
        return ""

    def result(self, rank: int, number: int) -> int | None:
        """What came of a plan on a rank, as far as it is known."""
        return self.peers[rank - 1].page.result(number)

    def have_started(self) -> None:
        """All of them execute plans from now on."""
        for process in self.peers:
            process.has_started()

    def watch(self) -> None:
        """Begin to watch them."""
        self._threads.start("headrace-rank-watch", self._watch)

    def close(self) -> None:
        """End them, and wait until they have ended. Idempotent."""
        with self._lock:
            if self.is_closed:
                return
            self.is_closed = True
        self._stop.set()
        if self.lost:
            self.break_off()  # who watches may not have come to it
        for process in self.peers:
            if self.lost:
                process.kill()
            process.channel.close()  # all at once: each then ends by itself
        for process in self.peers:
            process.close(CLOSE_SECONDS)
        self._threads.join(EXIT_SECONDS)
        self._open.clear()

    # Inside.

    def _take_in(self, process: RankPeer, seconds: float = 0.0) -> None:
        for kind, payload in process.channel.receive(seconds):
            if kind == RESULT:
                self._results.append(result_decoder.decode(payload))
                continue
            answer = answer_decoder.decode(payload)
            asked = self._open.get(answer.ticket)
            if asked is not None and asked.note(process.rank, answer):
                del self._open[answer.ticket]

    def _send(self, kind: int, payload: bytes) -> None:
        for process in self.peers:
            self._send_to(process, kind, payload)

    def _send_to(self, process: RankPeer, kind: int, payload: bytes) -> None:
        self.check()
        try:
            process.channel.send(kind, payload)
        except PeerClosed as closed:
            raise self._gone(process, closed) from None

    def _gone(self, process: RankPeer, closed: PeerClosed) -> DeviceLost:
        how = process.describe_exit(EXIT_SECONDS)
        return self.lose(f"{process.name} {how}" if how else f"{process.name} is gone: {closed}")

    def _lose(self, cause: str) -> None:
        with self._lock:
            if self.lost or self.is_closed:
                self.lost = self.lost or cause
                return
            self.lost = cause
            logger.error("a rank is lost: %s", cause)
            for process in self.peers:
                process.kill()

    def _watch(self) -> None:
        """In a thread of its own."""
        clock = AwakeClock()
        while not self._stop.wait(LOOK_SECONDS) and not self.lost:
            now = clock.now()
            for process in self.peers:
                problem = self._problem(process, now)
                if problem:
                    self._lose(f"{process.name} {problem}")
                    break
        if self._stop.is_set():
            return
        self.break_off()
        if not (self.shares_process or self._stop.wait(STUCK_SECONDS) or self._is_noted):
            os._exit(LOST_EXIT_CODE)  # a device may wait for a lost rank for ever, and rank 0 for its device

    def _problem(self, process: RankPeer, now: float) -> str:
        """Why a rank is lost, in words that follow its name; "" while it is not."""
        end = process.describe_exit()
        if end:
            return end
        if not process.is_stopped:
            self._stopped_since.pop(process.rank, None)
        elif now - self._stopped_since.setdefault(process.rank, now) >= STOPPED_SECONDS:
            return "was stopped by a signal and does not go on"
        beat, seen = process.page.last_beat, self._beats.get(process.rank)
        if seen is None or seen[0] != beat:
            seen = self._beats[process.rank] = beat, now
        silent = now - seen[1]
        if beat and silent > process.silent_seconds:
            return f"has not run for {silent:.0f} s"
        return self._lone_failure(process, now)

    def _lone_failure(self, process: RankPeer, now: float) -> str:
        number = process.page.failed if process.rank in self.companions else None
        if number is None:
            self._failed_since.pop(process.rank, None)
            return ""
        known, since = self._failed_since.get(process.rank, (-1, now))
        if known != number:
            self._failed_since[process.rank] = number, now
            return ""
        is_alone = now - since >= FAILED_SECONDS
        return f"failed in a step, and not all ranks did: {process.page.text}" if is_alone else ""

    def _end_of(self, process: RankPeer) -> str:
        how = process.describe_exit()
        return f"{process.name} {how}" if how else ""
