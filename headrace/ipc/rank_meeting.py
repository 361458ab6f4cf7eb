"""Where ranks that are no children of rank 0's process come to it: one address, and a secret that all of them know.

Owns who may come: before anything else is read, each side shows that it knows the secret, by an HMAC of what the other
drew. Then a guest says what it is and waits until all have come; each of its ranks opens two connections more
(`headrace.ipc.rank_guest`); and the store in which a process group is formed, which itself listens on loopback only, is
reached through further ones. Frames of strangers are never read. Must not know what ranks do.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Literal

import msgspec

from headrace.ipc.buffers import SharedBuffer
from headrace.ipc.codec import DECODE_ERRORS
from headrace.ipc.links import PeerClosed
from headrace.ipc.own_threads import OwnThreads
from headrace.ipc.rank_guest import Guest, GuestRank, Over, Seated
from headrace.types.errors import ConfigError, DeadlineError, ErrorInfo, HeadraceError
from headrace.types.weights import BufferRef

logger = logging.getLogger(__name__)

Address = tuple[str, int]
Role = Literal["channel", "page"]
ROLES: tuple[Role, Role] = ("channel", "page")
"""What each rank has a connection for."""

NONCE_BYTES = 32
MAX_HELLO_BYTES = 1 << 16
HELLO_SECONDS = 10.0
MAX_STRANGERS = 64
"""Connections that have not said yet who they are."""

_IDLE_SECONDS, _PROBE_SECONDS, _NUM_PROBES = 5, 2, 3
_LOOK_SECONDS = 0.1
_END_SECONDS = 1.0
_SPLICE_BYTES = 1 << 16


class GuestHello(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A process that brings ranks. `terms` have to be those of rank 0; `memory` begins with what this end drew, for
    rank 0 to see whether it can read it. `place` is for rank 0; `error` is what keeps this guest from coming."""

    number: int
    name: str
    pid: int
    terms: dict[str, str]
    memory: BufferRef
    place: bytes
    error: ErrorInfo | None = None


class RankHello(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A connection of one rank."""

    rank: int
    role: Role


class StoreHello(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A connection to the store."""


Hello = GuestHello | RankHello | StoreHello
_HELLOS: msgspec.msgpack.Decoder[Hello] = msgspec.msgpack.Decoder(Hello)


class WrongSecret(Exception):
    """The other end does not know the secret, or says that this one does not."""


def reach(address: Address, secret: bytes, hello: Callable[[bytes], Hello]) -> socket.socket:
    """A connection to a meeting, which is told the `hello` made of what this end drew. Raises `OSError` where nobody
    listens, `PeerClosed` where who listens breaks off, and `WrongSecret`."""
    connection = socket.create_connection(address, HELLO_SECONDS)
    try:
        _set_up(connection)
        until = time.monotonic() + HELLO_SECONDS
        theirs, ours = _read(connection, NONCE_BYTES, until), secrets.token_bytes(NONCE_BYTES)
        connection.sendall(ours + _proof(secret, b"guest", theirs, ours))
        if not hmac.compare_digest(_read(connection, NONCE_BYTES, until), _proof(secret, b"host", ours, theirs)):
            raise WrongSecret("the secrets differ")
        body = msgspec.msgpack.encode(hello(ours))
        connection.sendall(len(body).to_bytes(4, "little") + body)
    except BaseException:
        connection.close()
        raise
    return connection


class _Arrived(msgspec.Struct):
    guest: Guest
    hello: GuestHello


class Meeting:
    """Rank 0's end. Listens from the beginning, in a thread, until `close`. `kind` is what guests are called, as in
    "node 1"."""

    def __init__(self, listener: socket.socket, secret: bytes, *, num_guests: int, kind: str, missing: str) -> None:
        """`missing` follows the names of guests that have not come."""
        self.address: Address = listener.getsockname()[:2]
        self._listener = listener
        self._secret = secret
        self.num_guests = num_guests
        self._kind, self._missing = kind, missing
        self._store: Address | None = None
        self._lock = threading.Lock()
        self._strangers = threading.Semaphore(MAX_STRANGERS)
        self._arrived: dict[int, _Arrived] = {}
        self._connections: dict[tuple[int, str], socket.socket] = {}
        self._ranks: set[int] = set()  # that are awaited
        self._tunnels: set[socket.socket] = set()
        self._is_closed = False
        self._threads = OwnThreads()
        self._listening = OwnThreads()
        self._listening.start("headrace-rank-meeting", self._accept)

    def gather(self, terms: Mapping[str, str], until: float) -> None:
        """Wait until all guests have come. Raises `DeadlineError` naming who has not, `ConfigError` naming the term
        that is another one there, and what a guest says that cannot come."""
        self._wait(lambda: self._check(terms), until)
        here = {number for number, arrived in self._arrived.items() if not arrived.guest.is_gone}
        missing = sorted({*range(1, self.num_guests + 1)} - here)
        if missing:
            names = " and ".join(f"{self._kind} {number}" for number in missing)
            raise DeadlineError(
                f"{names} {'has' if len(missing) == 1 else 'have'} {self._missing}", field="start_timeout"
            )

    def seat(self, store_port: int, num_ranks: int, until: float) -> list[GuestRank]:
        """Give the guests that have come their ranks, an equal number each after those of rank 0's own process or host,
        and let them reach the store. Raises `DeadlineError` naming the rank that does not connect."""
        each = num_ranks // (self.num_guests + 1)
        owners = {rank: self._arrived[rank // each].guest for rank in range(each, num_ranks)}
        self._store, self._ranks = ("127.0.0.1", store_port), {*owners}
        for number, arrived in self._arrived.items():
            arrived.guest.tell(Seated(tuple(range(number * each, (number + 1) * each))))
        self._wait(lambda: len(self._connections) == 2 * len(owners), until)
        for rank, guest in owners.items():
            if not {(rank, "channel"), (rank, "page")} <= {*self._connections}:
                raise DeadlineError(f"rank {rank} of {guest.name} has not connected", field="start_timeout")
        taken = self._connections
        self._connections = {}
        return [
            GuestRank(rank, rank % each, owners[rank], taken[rank, "channel"], taken[rank, "page"]) for rank in owners
        ]

    def refuse(self, error: HeadraceError) -> None:
        """Tell all guests why there is no rank 0 for them."""
        for arrived in list(self._arrived.values()):
            arrived.guest.tell(Over(error.info()))

    def close(self) -> None:
        """Let nobody in any more. Guests that have no ranks are told that it is over. Idempotent."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # which ends a wait in it
        self._listener.close()
        for tunnel in list(self._tunnels):
            with contextlib.suppress(OSError):
                tunnel.shutdown(socket.SHUT_RDWR)
        for arrived in self._arrived.values():
            arrived.guest.tell(Over())
        for connection in self._connections.values():
            connection.close()
        self._listening.join(_END_SECONDS)
        self._threads.join(_END_SECONDS)

    # Inside.

    def _wait(self, is_done: Callable[[], bool], until: float) -> None:
        while not is_done() and time.monotonic() < until:
            time.sleep(_LOOK_SECONDS)

    def _check(self, terms: Mapping[str, str]) -> bool:
        """Whether all have come who are to."""
        for _, arrived in sorted(self._arrived.items(), key=lambda each: each[0]):
            hello, name = arrived.hello, arrived.guest.name
            if hello.error is not None:
                error = hello.error.to_exception()
                raise type(error)(f"{name}: {error.message}", field=error.field)
            for term, ours in terms.items():
                theirs = hello.terms.get(term, "")
                if theirs != ours:
                    message = f"{term} is {theirs or 'unknown'} of {name}, and {ours} of rank 0"
                    raise ConfigError(message, field=term)
        return sum(not arrived.guest.is_gone for arrived in list(self._arrived.values())) == self.num_guests

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if self._is_closed:
                    return
                logger.warning("a connection could not be accepted: %s", error)
                time.sleep(_LOOK_SECONDS)
                continue
            if not self._strangers.acquire(blocking=False):
                connection.close()
                continue
            self._threads.start("headrace-rank-hello", self._greet, connection)

    def _greet(self, connection: socket.socket) -> None:
        """Let one in, or close the connection."""
        try:
            connection.settimeout(HELLO_SECONDS)
            _set_up(connection)
            hello, drawn = self._hello(connection)
        except (OSError, PeerClosed, WrongSecret, *DECODE_ERRORS) as error:
            logger.warning(
                "somebody who is no rank of this replica has tried to reach it: %s", str(error) or "no secret"
            )
            connection.close()
            return
        finally:
            self._strangers.release()
        match hello:
            case GuestHello():
                self._let_in(hello, drawn, connection)
            case RankHello():
                with self._lock:
                    key = hello.rank, hello.role
                    if hello.rank in self._ranks and key not in self._connections and not self._is_closed:
                        self._connections[key] = connection
                        return
                connection.close()
            case StoreHello():
                self._tunnel(connection)

    def _tunnel(self, connection: socket.socket) -> None:
        with self._lock:
            store = None if self._is_closed else self._store
            if store is not None:
                self._tunnels.add(connection)
        if store is not None:
            with contextlib.suppress(OSError):
                splice(connection, socket.create_connection(store, HELLO_SECONDS))
            self._tunnels.discard(connection)
        connection.close()

    def _hello(self, connection: socket.socket) -> tuple[Hello, bytes]:
        """What it says, and what it drew."""
        ours, until = secrets.token_bytes(NONCE_BYTES), time.monotonic() + HELLO_SECONDS
        connection.sendall(ours)
        theirs, proof = (_read(connection, NONCE_BYTES, until) for _ in range(2))
        if not hmac.compare_digest(proof, _proof(self._secret, b"guest", ours, theirs)):
            connection.sendall(bytes(NONCE_BYTES))
            raise WrongSecret("the secrets differ")
        connection.sendall(_proof(self._secret, b"host", theirs, ours))
        num_bytes = int.from_bytes(_read(connection, 4, until), "little")
        if num_bytes > MAX_HELLO_BYTES:
            raise PeerClosed(f"it claims {num_bytes} bytes")
        return _HELLOS.decode(_read(connection, num_bytes, until)), theirs

    def _let_in(self, hello: GuestHello, drawn: bytes, connection: socket.socket) -> None:
        shares_memory = _can_read(hello.memory, drawn)
        guest = Guest(hello.name, connection, hello.place, hello.pid if shares_memory else 0, shares_memory)
        with self._lock:
            former = self._arrived.get(hello.number)
            is_free = 1 <= hello.number <= self.num_guests and (former is None or former.guest.is_gone)
            is_over = self._is_closed or bool(self._ranks)  # all have their ranks
            if is_free and not is_over:
                if former is not None:
                    former.guest.tell(Over())
                self._arrived[hello.number] = _Arrived(guest, hello)
                return
        message = f"there is no place for {hello.name}: each {self._kind} from 1 to {self.num_guests} comes once"
        guest.tell(Over(is_lost=True) if is_free else Over(ConfigError(message, field="node_rank").info()))


class StoreTunnel:
    """A guest's way to the store: what connects to `port` on this host's loopback reaches it through the meeting."""

    def __init__(self, address: Address, secret: bytes) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._address, self._secret = address, secret
        self._listening, self._connected = OwnThreads(), OwnThreads()
        self._listening.start("headrace-rank-store", self._accept)

    def close(self) -> None:
        """What is connected stays connected. Idempotent."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def join(self, seconds: float) -> None:
        """Once it is closed: wait until what is connected has ended, so many seconds at most for either."""
        self._listening.join(seconds)
        self._connected.join(seconds)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self._connected.start("headrace-rank-store", self._connect, near)

    def _connect(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError, PeerClosed, WrongSecret):  # whoever has connected sees an end
            splice(near, reach(self._address, self._secret, lambda _: StoreHello()))


def splice(one: socket.socket, other: socket.socket) -> None:
    """Hand on what comes from either to the other, until one of them ends."""

    def hand_on(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(_SPLICE_BYTES):
                target.sendall(chunk)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    for each in (one, other):
        each.settimeout(None)
    back = threading.Thread(target=hand_on, args=(other, one), name="headrace-rank-store", daemon=True)
    back.start()
    hand_on(one, other)
    back.join()
    one.close()
    other.close()


def shared_nonce(drawn: bytes) -> SharedBuffer:
    """Memory that shows to whoever can read it what this end drew."""
    buffer = SharedBuffer.create(NONCE_BYTES)
    buffer.view[:] = drawn
    return buffer


def _can_read(ref: BufferRef, drawn: bytes) -> bool:
    if not ref.path:
        return False
    try:
        buffer = SharedBuffer.open(ref)
    except HeadraceError:
        return False
    found = bytes(buffer.view[:NONCE_BYTES])
    buffer.close()
    return hmac.compare_digest(found, drawn)


def _proof(secret: bytes, role: bytes, first: bytes, second: bytes) -> bytes:
    return hmac.digest(secret, b"headrace rank " + role + first + second, "sha256")


def _read(connection: socket.socket, num_bytes: int, until: float) -> bytes:
    found = bytearray()
    while len(found) < num_bytes:
        connection.settimeout(max(0.001, until - time.monotonic()))
        chunk = connection.recv(num_bytes - len(found))
        if not chunk:
            raise PeerClosed("it has closed the connection")
        found += chunk
    connection.settimeout(HELLO_SECONDS)
    return bytes(found)


def _set_up(connection: socket.socket) -> None:
    """Send at once, and notice an end that does not say so."""
    options = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    if hasattr(socket, "TCP_KEEPIDLE"):
        options += [
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_SECONDS),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_SECONDS),
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _NUM_PROBES),
        ]
    for option in options:
        connection.setsockopt(*option)
