"""How the ranks of a trainer that share an engine find each other: over the store of its `torch.distributed`.

Owns where rank 0 waits, who may come, and what the others do until it waits there. How often a rank has tried before is
of no account: who tries at the same time as rank 0 meets it.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import socket
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from headrace.ipc import SharedBuffer
from headrace.ipc.buffers import BorrowedBuffer
from headrace.parallel.rendezvous import listen_beside, trainer_store
from headrace.rl.frames import MAX_HELLO_BYTES, Done, Hello, PeerGone, Welcome, Wire
from headrace.rl.rank_calls import (
    MAX_BEAT_SECONDS,
    MEMORY_BYTES,
    SECRET_BYTES,
    FollowingCalls,
    LeadingCalls,
    Peer,
    not_come,
)
from headrace.types.errors import HeadraceError, RequestError
from headrace.types.weights import BufferRef

_BACKLOG = 1024


class _Address(msgspec.Struct, frozen=True):
    """Where rank 0 is found, and what shows that one is of the same trainer."""

    host: str
    port: int
    secret: bytes


_NOBODY = b"-"
"""In the place of an address: nobody waits there any more."""

_LOOK_SECONDS = 0.05


def meet(ranks: Sequence[int], rank: int, timeout: float) -> LeadingCalls | FollowingCalls:
    """Bring the ranks of one mesh together, by the store of the trainer's `torch.distributed`; the first of `ranks` is
    the one that leads. Raises `DeadlineError` naming who has not come."""
    deadline, leader = time.monotonic() + timeout, ranks[0]
    if len(ranks) == 1:
        return LeadingCalls(rank, [], timeout)
    store, key = trainer_store(), f"headrace/{hashlib.sha256(repr(list(ranks)).encode()).hexdigest()}"
    if rank == leader:
        with listen_beside(store, _BACKLOG) as listener:
            host, port = listener.getsockname()[:2]
            secret = secrets.token_bytes(SECRET_BYTES)
            store.set(key, msgspec.json.encode(_Address(host, port, secret)))
            try:
                peers = _accept(listener, ranks[1:], secret, deadline)
            finally:
                store.set(key, _NOBODY)
        return LeadingCalls(rank, _welcome(peers, ranks[1:], timeout), timeout)
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(PeerGone, OSError):  # it waits no longer: the next one is asked
            address = _address(store, key)
            if address is not None:
                wire = Wire(socket.create_connection((address.host, address.port), left))
                return _greeted(wire, address.secret, rank, leader, timeout)
        time.sleep(_LOOK_SECONDS)
    raise not_come("VerlEngine", [leader], timeout)


def _greeted(wire: Wire, secret: bytes, rank: int, leader: int, timeout: float) -> FollowingCalls:
    following = FollowingCalls(rank, leader, wire, timeout, SharedBuffer.create(MEMORY_BYTES + SECRET_BYTES))
    try:
        following.greet(secret)
    except BaseException:  # whatever it is, rank 0 is not to take it for one that waits
        following.close()
        raise
    return following


def _address(store: Any, key: str) -> _Address | None:
    """Where rank 0 waits now."""
    try:
        found = store.get(key) if store.check([key]) else _NOBODY
    except RuntimeError as error:  # the store's, whose process is gone
        raise PeerGone from error
    return None if found == _NOBODY else msgspec.json.decode(found, type=_Address)


def _accept(listener: socket.socket, expected: Sequence[int], secret: bytes, deadline: float) -> list[Peer]:
    """Connections of these ranks, as many as come by the deadline."""
    found: dict[int, Peer] = {}
    while (left := deadline - time.monotonic()) > 0:
        for gone in [peer for peer in found.values() if peer.wire.has_ended()]:
            found.pop(gone.rank).close()  # it has given up, and may try again
        if len(found) == len(expected):
            break
        listener.settimeout(left)
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            break
        wire = Wire(connection)
        try:
            hello = wire.receive(min(deadline, time.monotonic() + MAX_BEAT_SECONDS), MAX_HELLO_BYTES)
            is_ours = isinstance(hello, Hello) and hmac.compare_digest(hello.secret, secret)
            if not isinstance(hello, Hello) or not is_ours or hello.rank not in expected or hello.rank in found:
                raise PeerGone
        except (PeerGone, TimeoutError):
            wire.close()
            continue
        found[hello.rank] = Peer(hello.rank, wire, _borrowed(hello.memory, secret))
    return list(found.values())


def _welcome(peers: Sequence[Peer], expected: Sequence[int], timeout: float) -> list[Peer]:
    """Answer all: that they are complete, or who is missing. Raises the latter. In the order of `expected`."""
    missing = sorted({*expected} - {peer.rank for peer in peers})
    error = not_come("VerlEngine", missing, timeout) if missing else None
    for peer in peers:
        with contextlib.suppress(PeerGone, TimeoutError):  # the first call names it
            answer = Done(0, error.info()) if error else Welcome(peer.memory is not None)
            peer.wire.send(answer, time.monotonic() + timeout)
    if error:
        for peer in peers:
            peer.close()
        raise error
    return sorted(peers, key=lambda peer: expected.index(peer.rank))


def _borrowed(ref: BufferRef, secret: bytes) -> SharedBuffer | None:
    """A rank's memory, if it is on this machine and may be read."""
    try:
        borrowed = BorrowedBuffer(ref, secret)
    except RequestError:
        return None
    try:
        return SharedBuffer.open(borrowed.ref)
    except HeadraceError:
        return None
    finally:
        borrowed.close()
