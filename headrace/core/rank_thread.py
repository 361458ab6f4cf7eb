"""A rank in a thread of a process that is somebody else's, who goes on with his own work: a trainer's.

Owns the connections to rank 0 and what is freed when that lets go. Never ends the process, and no other.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable

from headrace.config import ResolvedConfig
from headrace.core.rank_member import Leave, serve_rank
from headrace.core.rank_opening import Opening
from headrace.core.rank_terms import GuestPlace, terms_of
from headrace.ipc import PeerClosed, SharedBuffer
from headrace.ipc.own_threads import OwnThreads
from headrace.ipc.rank_channel import RankChannel
from headrace.ipc.rank_guest import GuestLink, Over, Seated, SentPage, Started, Word
from headrace.ipc.rank_meeting import (
    ROLES,
    Address,
    GuestHello,
    Hello,
    RankHello,
    StoreTunnel,
    WrongSecret,
    reach,
    shared_nonce,
)
from headrace.types.errors import DeadlineError, EngineDeadError, HeadraceError, InternalError, UnavailableError
from headrace.types.weights import BufferRef

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
END_SECONDS = 5.0


class RankThread:
    """Rank `number`, from its constructor, which returns once all ranks have started, until rank 0 lets go."""

    def __init__(self, address: Address, secret: bytes, number: int, resolved: ResolvedConfig) -> None:
        """Raises what keeps this rank or rank 0 from starting, `UnavailableError` where rank 0 is gone, and
        `DeadlineError` after `start_timeout`."""
        self.number = number
        self._address, self._secret = address, secret
        self._error: HeadraceError | None = None
        self._connections: list[socket.socket] = []
        self._threads = OwnThreads()
        self._has_ended = threading.Event()
        self._is_left = Leave()
        self._seconds = resolved.engine.control_timeout
        seconds = resolved.engine.start_timeout
        until = time.monotonic() + seconds
        self._tunnel = StoreTunnel(address, secret)
        with contextlib.ExitStack() as undo:
            undo.callback(self._end)
            self._link = undo.enter_context(contextlib.closing(self._come(resolved, until)))
            self._await_start(until, seconds)
            undo.pop_all()
        self._threads.start("headrace-rank-link", self._listen)

    def close(self) -> None:
        """Wait for rank 0 to let go, `control_timeout` at most; then leave it, which ends the engine. Idempotent."""
        if not self._has_ended.wait(self._seconds):
            logger.warning("rank 0 has not shut the engine down within %g s: this rank leaves it", self._seconds)
        self._end()

    # Inside.

    def _come(self, resolved: ResolvedConfig, until: float) -> GuestLink:
        """Wait for all others, and begin to be the rank that rank 0 says."""
        memory: list[SharedBuffer] = []

        def hello(drawn: bytes) -> GuestHello:
            memory.append(shared_nonce(drawn))
            place = GuestPlace.of(resolved, self._tunnel.port).encode()
            return GuestHello(self.number, _name(), os.getpid(), terms_of(resolved), memory[0].ref, place)

        with contextlib.ExitStack() as undo:
            try:
                link = undo.enter_context(contextlib.closing(GuestLink(_reached(self._address, self._secret, hello))))
                word = _hear(link, until)
            finally:
                for buffer in memory:
                    buffer.close()
            if not isinstance(word, Seated):
                raise _reason(word, resolved.engine.start_timeout)
            (rank,) = word.ranks
            for role in ROLES:
                self._connections.append(self._connect(RankHello(rank, role)))
            self._threads.start(f"headrace-rank-{rank}", self._serve)
            undo.pop_all()
        return link

    def _connect(self, hello: RankHello) -> socket.socket:
        return _reached(self._address, self._secret, lambda _: hello)

    def _await_start(self, until: float, seconds: float) -> None:
        word = _hear(self._link, until)
        if not isinstance(word, Started):
            self._has_ended.wait(LOOK_SECONDS)  # what has gone wrong here says more
            raise self._error or _reason(word, seconds)

    def _serve(self) -> None:
        """The thread of the rank."""
        channel, page = RankChannel(self._connections[0]), SentPage(self._connections[1])
        page.beat_in_thread()
        try:
            opening = Opening(channel)
            resolved = opening.settings()
            start = opening.start(resolved.engine.start_timeout)
            serve_rank(resolved, start, channel, page, is_left=self._is_left)
        except PeerClosed:
            pass
        except HeadraceError as error:
            self._error = error.info().to_exception()  # without what its traceback would keep
            error.__traceback__ = None
        except Exception as error:  # the rank's whole life: rank 0 says it in the name of all
            logger.exception("the rank ends")
            self._error = InternalError(f"rank {self.number} failed: {type(error).__name__}: {error}")
            page.write_text(f"{type(error).__name__}: {error}")
        finally:
            channel.close()
            page.close()
            self._has_ended.set()

    def _listen(self) -> None:
        """The thread that hears of the end, whatever the rank waits for."""
        while not (self._has_ended.is_set() or self._is_left.is_set()):
            word = self._link.hear(LOOK_SECONDS)
            if isinstance(word, Over):
                if not word.is_lost:
                    self._has_ended.wait(END_SECONDS)  # it ends behind all that was sent to it
                break
        self._leave()
        self._link.close()

    def _end(self) -> None:
        """Leave, and wait until nothing of it is left, unless something stands still."""
        self._leave()
        self._threads.join(END_SECONDS)
        self._tunnel.join(LOOK_SECONDS)

    def _leave(self) -> None:
        """End whatever the rank waits for. Idempotent."""
        self._is_left.set()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._tunnel.close()


def tell_refusal(address: Address, secret: bytes, number: int, error: HeadraceError) -> None:
    """Tell rank 0 what keeps this rank from coming, if it can be told."""
    hello = GuestHello(number, _name(), 0, {}, BufferRef("", 0), b"", error.info())
    with contextlib.suppress(HeadraceError):
        _reached(address, secret, lambda _: hello).close()


def _name() -> str:
    return f"process {os.getpid()} of the trainer"


def _reached(address: Address, secret: bytes, hello: Callable[[bytes], Hello]) -> socket.socket:
    """As `reach`. Raises `UnavailableError` where rank 0 does not let this process in."""
    try:
        return reach(address, secret, hello)
    except (OSError, PeerClosed, WrongSecret) as error:
        raise UnavailableError(f"rank 0 is gone: {error}", field="rank_group") from None


def _hear(link: GuestLink, until: float) -> Word | None:
    return link.hear(max(0.0, until - time.monotonic()))


def _reason(word: Word | None, seconds: float) -> HeadraceError:
    """Why there is no engine, as rank 0 has said."""
    if word is None:
        return DeadlineError(f"rank 0 has not started the engine within {seconds:g} s", field="start_timeout")
    if isinstance(word, Over) and word.error is not None:
        return word.error.to_exception()
    return EngineDeadError("the engine has ended before all of its ranks had started")
