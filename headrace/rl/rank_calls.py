"""Calls that every rank of a trainer makes and rank 0 carries out: all come to it, all get the same answer or error.

Owns who waits for whom and how long. Knows no engine and no tensors. Rank 0 is in the middle: every other rank has one
connection, to it. A rank that is gone is named at once, one that does not come by the deadline, and while rank 0 is at
a call it says so, so that others may wait for as long as that takes.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from headrace.ipc import SharedBuffer
from headrace.rl.frames import (
    MAX_HELLO_BYTES,
    Done,
    Enter,
    Failed,
    Frame,
    Hello,
    PeerGone,
    Proceed,
    ShardParts,
    Welcome,
    Wire,
    info_of,
)
from headrace.types.errors import DeadlineError, HeadraceError, RequestError, ShutdownError, UnavailableError

MEMORY_BYTES = 64 << 20
"""Of a rank other than 0, for its tensors on their way. Taken when the first are."""

SECRET_BYTES = 32
MAX_BEAT_SECONDS = 5.0

Lead = Callable[[], bytes]
Follow = Callable[[], None]
Failure = type[HeadraceError]


class RankCalls(Protocol):
    """One rank's end. `call` returns on every rank what `lead` returned on rank 0, or raises what it raised there.

    `follow` is the share of all other ranks. Beside the errors of both: `DeadlineError` (field "rank_timeout") naming
    ranks that did not come, `UnavailableError` (field "rank") naming ranks that are gone, `RequestError` (field "rank")
    where ranks make different calls, or one makes a call within another. An error that is none of ours is a `failure`
    elsewhere.
    """

    def call(self, name: str, lead: Lead, follow: Follow | None = None, failure: Failure = UnavailableError) -> bytes:
        """Make call `name` together with all other ranks."""

    def close(self) -> None:
        """Leave the others. Waits for nobody. Idempotent."""


class Peer:
    """Rank 0's end of the connection to another rank."""

    def __init__(self, rank: int, wire: Wire, memory: SharedBuffer | None) -> None:
        self.rank = rank
        self.wire = wire
        self.memory = memory
        """The rank's own, where it can be read here."""

    def receive(self, number: int, deadline: float) -> Frame:
        """Its next frame of call `number` or a later one."""
        while True:
            frame = self.wire.receive(deadline)
            if isinstance(frame, Enter | ShardParts | Failed):
                if frame.number >= number:
                    return frame
                if isinstance(frame, Enter):
                    message = f"rank {self.rank} has come to {frame.name} after the others had gone on"
                    late = DeadlineError(message, field="rank_timeout").info()
                    self.wire.send(Done(frame.number, late), deadline)

    def close(self) -> None:
        """Leave it. Idempotent."""
        self.wire.close()
        if self.memory is not None:
            self.memory.close()


class LeadingCalls:
    """Rank 0's end."""

    def __init__(self, rank: int, peers: Sequence[Peer], timeout: float) -> None:
        self.rank = rank
        self.peers = peers
        self.timeout = timeout
        self.number = 0
        self._turns = _Turns(timeout)
        self._is_inside = threading.Event()
        stop = threading.Event()
        self._finalizer = weakref.finalize(self, _leave, peers, stop)
        if peers:
            arguments = peers, self._is_inside, stop, min(timeout / 4, MAX_BEAT_SECONDS)
            threading.Thread(target=_beat, args=arguments, name="headrace-ranks", daemon=True).start()

    def call(self, name: str, lead: Lead, follow: Follow | None = None, failure: Failure = UnavailableError) -> bytes:
        """See `RankCalls`."""
        with self._turns.take(name):
            if not self._finalizer.alive:
                raise ShutdownError(f"{name}: this engine was shut down")
            self.number += 1
            self._is_inside.set()
            present: list[Peer] = []
            try:
                self._gather(name, present)
                answer = lead()
            except BaseException as error:  # whatever it is, the others wait for it
                self._tell(Done(self.number, info_of(error, self.rank, name, failure)), present)
                raise
            finally:
                self._is_inside.clear()
            self._tell(Done(self.number, answer=answer), present)
            return answer

    def receive(self, peer: Peer, name: str) -> ShardParts:
        """What a rank says within call `name`. Raises what it failed with."""
        try:
            frame = peer.receive(self.number, time.monotonic() + self.timeout)
        except PeerGone:
            raise _gone(name, [peer.rank]) from None
        except TimeoutError:
            raise not_come(name, [peer.rank], self.timeout) from None
        if isinstance(frame, Failed):
            raise frame.error.to_exception()
        if isinstance(frame, ShardParts) and frame.number == self.number:
            return frame
        peer.wire.put_back(frame)
        raise DeadlineError(f"{name}: rank {peer.rank} has given it up, and gone on", field="rank_timeout")

    def send(self, peer: Peer, frame: Frame, name: str) -> None:
        """Tell one rank something within call `name`."""
        try:
            peer.wire.send(frame, time.monotonic() + self.timeout)
        except (PeerGone, TimeoutError):
            raise _gone(name, [peer.rank]) from None

    def close(self) -> None:
        """See `RankCalls`."""
        self._finalizer()

    def _gather(self, name: str, present: list[Peer]) -> None:
        """Wait until all ranks have come to this call."""
        deadline = time.monotonic() + self.timeout
        gone, missing, others = list[int](), list[int](), list[str]()
        for peer in self.peers:
            try:
                frame = peer.receive(self.number, deadline)
            except PeerGone:
                gone.append(peer.rank)
            except TimeoutError:
                missing.append(peer.rank)
            else:
                if not isinstance(frame, Enter) or frame.number != self.number:
                    peer.wire.put_back(frame)
                    missing.append(peer.rank)
                    continue
                present.append(peer)
                if frame.name != name:
                    others.append(f"rank {peer.rank} calls {frame.name}")
        if gone:
            raise _gone(name, gone)
        if missing:
            raise not_come(name, missing, self.timeout)
        if others:
            raise RequestError(f"rank {self.rank} calls {name}, {', '.join(others)}", field="rank")

    def _tell(self, done: Done, present: Sequence[Peer]) -> None:
        for peer in present:
            with contextlib.suppress(PeerGone, TimeoutError):  # the next call names it
                peer.wire.send(done, time.monotonic() + self.timeout)


class FollowingCalls:
    """The end of every other rank. `memory` holds its tensors on their way."""

    def __init__(self, rank: int, leader: int, wire: Wire, timeout: float, memory: SharedBuffer) -> None:
        self.rank = rank
        self.timeout = timeout
        self.number = 0
        self.memory = memory
        self.shares_memory = False
        """Rank 0 reads it itself."""
        self._leader = leader
        self._wire = wire
        self._turns = _Turns(timeout)
        self._finalizer = weakref.finalize(self, _leave, [wire, memory], threading.Event())

    def call(self, name: str, lead: Lead, follow: Follow | None = None, failure: Failure = UnavailableError) -> bytes:
        """See `RankCalls`."""
        with self._turns.take(name):
            if not self._finalizer.alive:
                raise ShutdownError(f"{name}: this engine was shut down")
            self.number += 1
            try:
                return self._call(name, follow, failure)
            except _Lost as lost:  # rank 0 cannot be told
                raise lost.error from None

    def _call(self, name: str, follow: Follow | None, failure: Failure) -> bytes:
        self.send(Enter(self.number, name), name)
        try:
            if follow is not None:
                follow()
        except _Ended as end:
            return _result(end.done)
        except _Lost:
            raise
        except BaseException as error:  # whatever it is, the call is over for all
            self.send(Failed(self.number, info_of(error, self.rank, name, failure)), name)
            self._done(name)
            raise
        return _result(self._done(name))

    def send(self, frame: Frame, name: str) -> None:
        """Tell rank 0 something within call `name`."""
        try:
            self._wire.send(frame, time.monotonic() + self.timeout)
        except (PeerGone, TimeoutError):
            raise _Lost(_gone(name, [self._leader])) from None

    def wait(self, name: str) -> None:
        """Wait for `Proceed`. Where rank 0 has ended the call instead, this ends it here."""
        frame = self._receive(name)
        if isinstance(frame, Done):
            raise _Ended(frame)

    def close(self) -> None:
        """See `RankCalls`."""
        self._finalizer()

    def greet(self, secret: bytes) -> None:
        """Say who this is, and lend the memory. Rank 0 answers when all are there, or it waits for them no longer."""
        deadline = time.monotonic() + self.timeout + MAX_BEAT_SECONDS
        self.memory.view[-SECRET_BYTES:] = secret
        self._wire.send(Hello(self.rank, secret, self.memory.ref), deadline)
        frame = self._wire.receive(deadline, MAX_HELLO_BYTES)
        if isinstance(frame, Done):
            _result(frame)
        self.shares_memory = isinstance(frame, Welcome) and frame.shares_memory

    def _done(self, name: str) -> Done:
        while True:
            frame = self._receive(name)
            if isinstance(frame, Done):
                return frame

    def _receive(self, name: str) -> Done | Proceed:
        """The next frame of this call; each that comes shows that rank 0 is still there."""
        while True:
            try:
                frame = self._wire.receive(time.monotonic() + self.timeout)
            except PeerGone:
                raise _Lost(_gone(name, [self._leader])) from None
            except TimeoutError:
                raise _Lost(not_come(name, [self._leader], self.timeout)) from None
            if isinstance(frame, Done | Proceed) and frame.number == self.number:
                return frame


class _Turns:
    """One call of a rank after the other, also of several threads."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._free = threading.Lock()
        self._holder: int | None = None
        self._name = ""

    @contextlib.contextmanager
    def take(self, name: str) -> Iterator[None]:
        """Be the one that makes a call. Not from within another one, as from an iterator that this reads."""
        if self._holder == threading.get_ident():
            raise RequestError(f"{name} is called within {self._name}, which waits for it", field="rank")
        if not self._free.acquire(timeout=self._timeout):
            message = f"{name}: {self._name} of this rank has not ended within {self._timeout:g} s"
            raise DeadlineError(message, field="rank_timeout")
        self._holder, self._name = threading.get_ident(), name
        try:
            yield
        finally:
            self._holder = None
            self._free.release()


class _Ended(Exception):
    """Rank 0 has ended the call."""

    def __init__(self, done: Done) -> None:
        super().__init__()
        self.done = done


class _Lost(Exception):
    """Rank 0 is gone, or has not come."""

    def __init__(self, error: HeadraceError) -> None:
        super().__init__()
        self.error = error


def _beat(peers: Sequence[Peer], is_inside: threading.Event, stop: threading.Event, seconds: float) -> None:
    while not stop.wait(seconds):
        if is_inside.is_set():
            for peer in peers:
                peer.wire.beat()


def _leave(things: Sequence[Any], stop: threading.Event) -> None:
    stop.set()
    for each in things:
        each.close()


def _result(done: Done) -> bytes:
    if done.error is not None:
        raise done.error.to_exception()
    return done.answer


def _gone(name: str, ranks: Sequence[int]) -> UnavailableError:
    return UnavailableError(f"{name}: {_listed(ranks)} gone", field="rank")


def not_come(name: str, ranks: Sequence[int], timeout: float) -> DeadlineError:
    verb = "has" if len(ranks) == 1 else "have"
    message = f"{name}: {_named(ranks)} {verb} not come to it within {timeout:g} s; every rank makes every call"
    return DeadlineError(message, field="rank_timeout")


def _listed(ranks: Sequence[int]) -> str:
    return f"{_named(ranks)} {'is' if len(ranks) == 1 else 'are'}"


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
