"""Ranks that are no children of rank 0's process: on other hosts, or in processes of somebody else. Owns, for rank 0,
the connections to such a process, a guest, and what its ranks show; for a rank, the page that it sends.

A guest has one connection by which rank 0 tells it that all have started, and that it is over. Each of its ranks has a
channel, and a connection over which its page's stores come, without being asked for. A rank has ended when that is
closed. Nobody's process is killed from here.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time

import msgspec

from headrace.ipc.codec import DECODE_ERRORS, FrameError, FrameReader, pack_frame
from headrace.ipc.own_threads import OwnThreads
from headrace.ipc.rank_channel import RankChannel
from headrace.ipc.rank_page import RANK_PAGE_BYTES, RankPage
from headrace.ipc.rank_spawn import is_stopped
from headrace.types.errors import ErrorInfo

START_SILENT_SECONDS = 60.0
"""While a rank loads libraries and weights, none of its threads may run for long."""

SILENT_SECONDS = 3.0
"""Of a rank that serves, and cannot be looked at."""

SEND_SECONDS = 10.0
END_SECONDS = 1.0
MAX_WORD_BYTES = 1 << 16
_STORE = struct.Struct("<Iq")
_TEXT = (1 << 32) - 1
_MAX_STORE_BYTES = 4096


class Seated(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """All guests have come. Which ranks this one has."""

    ranks: tuple[int, ...]


class Started(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """All ranks execute plans."""


class Over(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Rank 0 lets go. `error` is what kept it from starting; `is_lost`: a rank was, and another rank 0 may come."""

    error: ErrorInfo | None = None
    is_lost: bool = False


Word = Seated | Started | Over
_WORDS: msgspec.msgpack.Decoder[Word] = msgspec.msgpack.Decoder(Word)


class Guest:
    """A process that brings ranks, as rank 0 sees it."""

    def __init__(self, name: str, connection: socket.socket, place: bytes, pid: int, shares_memory: bool) -> None:
        """`place` is what it says of itself; `pid` is 0 unless it is a process that can be looked at from here."""
        self.place = place
        self.pid = pid
        self.shares_memory = shares_memory
        self.address: str = connection.getpeername()[0]
        self.name = f"{name} at {self.address}"
        self.own_address: str = connection.getsockname()[0]
        connection.settimeout(SEND_SECONDS)
        self._connection = connection
        self._lock = threading.Lock()
        self._is_over = False

    @property
    def is_gone(self) -> bool:
        """Whether it has closed the connection."""
        news = select.poll()
        try:
            news.register(self._connection, select.POLLIN)
            return bool(news.poll(0))  # it sends nothing: all that can come is the end
        except (OSError, ValueError):
            return True

    def tell(self, word: Word) -> None:
        """Nothing once it was told that it is over, or is gone."""
        with self._lock:
            if self._is_over:
                return
            self._is_over = isinstance(word, Over)
            with contextlib.suppress(OSError):
                self._connection.sendall(pack_frame(msgspec.msgpack.encode(word)))
            if self._is_over:
                self._connection.close()


class GuestRank:
    """A rank of a guest, the `number`-th of its; see `RankPeer`."""

    def __init__(self, rank: int, number: int, guest: Guest, channel: socket.socket, page: socket.socket) -> None:
        self.rank, self.number = rank, number
        self.guest = guest
        self.channel = RankChannel(channel)
        self.page = RankPage(bytearray(RANK_PAGE_BYTES))
        self.shares_memory = guest.shares_memory
        self.silent_seconds = START_SILENT_SECONDS
        self._channel = channel
        self._connection = page
        self._end = ""
        self._has_ended = threading.Event()
        self._is_killed = self._is_closed = False
        page.settimeout(None)
        self._threads = OwnThreads()
        self._threads.start(f"headrace-rank-{rank}-page", self._follow)

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({self.guest.name})"

    @property
    def is_stopped(self) -> bool:
        return self.guest.pid != 0 and is_stopped(self.guest.pid)

    def has_started(self) -> None:
        if not self.guest.pid:
            self.silent_seconds = SILENT_SECONDS
        self.guest.tell(Started())

    def describe_exit(self, seconds: float = 0.0) -> str:
        self._has_ended.wait(seconds)
        return self._end

    def kill(self) -> None:
        self._is_killed = True
        self.guest.tell(Over(is_lost=True))
        self._shut()

    def close(self, seconds: float) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self.guest.tell(Over())
        self.channel.close()
        if not self._is_killed:
            self._has_ended.wait(seconds)
        self._shut()
        self._threads.join(END_SECONDS)
        self._connection.close()
        self.page.close()

    def _shut(self) -> None:
        """End what other threads wait for in these connections, which stay theirs."""
        for each in (self._channel, self._connection):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _follow(self) -> None:
        """In a thread of its own: store what comes until nothing can."""
        reader = FrameReader(_MAX_STORE_BYTES)
        how = "its connection was closed"
        try:
            while chunk := self._connection.recv(_MAX_STORE_BYTES):
                for frame in reader.feed(chunk):
                    self._store(frame)
        except (OSError, FrameError, struct.error, IndexError) as error:
            how = f"its connection broke: {error}"
        self._end = f"is gone: {self.page.text or how}"
        self._has_ended.set()

    def _store(self, frame: bytes) -> None:
        word, value = _STORE.unpack_from(frame)
        if word == _TEXT:
            self.page.store_text(frame[_STORE.size :])
        else:
            self.page.store(word, value)  # `IndexError` where a page has no such word


class SentPage(RankPage):
    """A rank's page, whose stores go to rank 0 over a connection."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(bytearray(RANK_PAGE_BYTES))
        connection.settimeout(SEND_SECONDS)
        self._connection = connection
        self._lock = threading.Lock()

    def store(self, word: int, value: int) -> None:
        super().store(word, value)
        self._send(_STORE.pack(word, value))

    def store_text(self, raw: bytes) -> None:
        super().store_text(raw)
        self._send(_STORE.pack(_TEXT, 0) + raw)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)  # a beat may wait in it
        super().close()
        self._connection.close()

    def _send(self, frame: bytes) -> None:
        with self._lock, contextlib.suppress(OSError):  # that rank 0 is gone shows in the channel
            self._connection.sendall(pack_frame(frame))


class GuestLink:
    """A guest's end of the connection by which rank 0 speaks to it. Used by one thread."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.address: str = connection.getsockname()[0]
        self._connection = connection
        self._reader = FrameReader(MAX_WORD_BYTES)
        self._words: list[Word] = []
        self._incoming = select.poll()
        self._incoming.register(connection, select.POLLIN)

    def hear(self, seconds: float) -> Word | None:
        """The next word, if one comes within so many seconds. `Over(is_lost=True)` where rank 0 is gone."""
        until = time.monotonic() + seconds
        while not self._words:
            left = until - time.monotonic()
            if left <= 0 or not self._incoming.poll(left * 1000.0):
                return None
            try:
                chunk = self._connection.recv(MAX_WORD_BYTES)
                self._words += [_WORDS.decode(frame) for frame in self._reader.feed(chunk)]
            except (OSError, FrameError, *DECODE_ERRORS):
                chunk = b""
            if not chunk:
                self._words.append(Over(is_lost=True))
        return self._words.pop(0)

    def close(self) -> None:
        """Idempotent."""
        self._connection.close()
