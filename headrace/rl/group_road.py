"""Tensors on their way to a server that cannot read this process's memory: broadcast in buckets over a group of gloo,
of which this process is rank 0 and the engine's ranks are the others.

Owns the store in which they meet, the connection, and the memory of a bucket. Each group has a store of its own, at the
address that the server is told, and nothing is registered with `torch.distributed`. Must not know sources or digests.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

from headrace.client import Client
from headrace.engine.tensors import TensorBytes, describe, named_pairs
from headrace.engine.update_session import UpdateSession
from headrace.types.errors import (
    DeadlineError,
    HeadraceError,
    InternalError,
    UnavailableError,
    UnreachableError,
    WeightUpdateError,
)
from headrace.types.messages import JoinGroup

BUCKET_BYTES = 64 << 20
JOIN_SECONDS = 5.0
"""For ranks to meet where there is another road."""

_OF_GROUPS = ("group_name", "address")
"""Fields of errors that say why there is no group."""

logger = logging.getLogger(__name__)


class ClientRoad:
    """The best way to a client's server, found for each update: memory that both read; a group, where the server is
    reached without anybody between and its ranks reach this process; else the bodies of calls. A group that could not
    be made is not tried again."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._has_failed = False

    def stage(self, session: UpdateSession, pairs: Iterable[tuple[str, Any]]) -> None:
        """As `Client.stage`."""
        address = "" if self._has_failed else self._client.group_address(session)
        if address:
            road = GroupRoad(self._client, address)
            try:
                group = road.join(session, min(JOIN_SECONDS, session.timeout_s))
            except HeadraceError as error:
                if error.field not in _OF_GROUPS:
                    raise  # nor would it do anything else
                self._has_failed = True
                logger.warning("tensors are sent in calls: no process group with %s: %s", self._client.url, error)
            else:
                road.send(session, group, pairs)
                return
        self._client.stage(session, pairs)


class GroupRoad:
    """The way to one server. Each `stage` makes a group and leaves it, so that a server which was started again is met
    as any other."""

    def __init__(self, client: Client, address: str) -> None:
        """`address`: of this process, as the server reaches it."""
        self._client = client
        self._address = address
        self._name = f"headrace-{secrets.token_hex(8)}"  # that a group which was lost gives to the next
        self._bucket: Any = None

    def stage(self, session: UpdateSession, pairs: Iterable[tuple[str, Any]]) -> None:
        """As `Client.stage`, by broadcasts. A tensor has been copied when the next one is asked for."""
        self.send(session, self.join(session, session.timeout_s), pairs)

    def send(self, session: UpdateSession, group: Any, pairs: Iterable[tuple[str, Any]]) -> None:
        """As `stage`, over a group that is joined, and left then."""
        with self._left_if_it_fails():
            for names, num_bytes in self._filled(session, pairs):
                self._send(session, group, names, num_bytes)
        self._leave()

    @contextlib.contextmanager
    def _left_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except (DeadlineError, UnreachableError):
            raise  # nobody answers there
        except BaseException:  # whatever it is, the group is of no use: who knows what the others wait for
            self._leave()
            raise

    def _leave(self) -> None:
        with contextlib.suppress(HeadraceError):  # it was never joined, or is over
            self._client.destroy_weights_update_group(self._name)

    def join(self, session: UpdateSession, seconds: float) -> Any:
        """A group with the engine's ranks. Raises `HeadraceError` where they do not meet within so many seconds."""
        from headrace.parallel.rendezvous import gloo_group, kept_store
        from headrace.weights.group import store_of

        size = 1 + session.num_ranks
        store = kept_store(self._listener(), self._address, seconds)
        port: int = store.port
        terms = JoinGroup(0, self._name, self._address, port, 0, size, "gloo")
        meeting = _begin(lambda: gloo_group(store_of(store, terms), 0, size, self._address, seconds))
        with self._left_if_it_fails():
            self._client.init_weights_update_group(self._address, port, 1, size, self._name, "gloo", timeout=seconds)
            return _result(meeting, "the engine's ranks were not met")

    def _listener(self) -> socket.socket:
        try:
            family, *_, place = socket.getaddrinfo(self._address, 0, type=socket.SOCK_STREAM)[0]
            return socket.create_server(place[:2], family=family)
        except (OSError, ValueError) as error:
            message = f"address {self._address} is none of this host: {error}"
            raise WeightUpdateError(message, field="address") from None

    def _filled(self, session: UpdateSession, pairs: Iterable[tuple[str, Any]]) -> Iterator[tuple[list[str], int]]:
        """Buckets: the names of what lies in the memory of one, and its bytes."""
        names: list[str] = []
        num_bytes = 0
        for name, tensor in named_pairs(pairs):
            session.index_of(describe(name, tensor))
            data = TensorBytes(name, tensor)
            if names and num_bytes + len(data) > BUCKET_BYTES:
                yield names, num_bytes
                names, num_bytes = [], 0
            data.copy_into(self._room(num_bytes + len(data))[num_bytes : num_bytes + len(data)].numpy())
            names.append(name)
            num_bytes += len(data)
        if names:
            yield names, num_bytes

    def _room(self, num_bytes: int) -> Any:
        """The memory of a bucket; of a tensor that is larger, which is alone then, new one."""
        import torch

        if self._bucket is None or len(self._bucket) < num_bytes:
            self._bucket = torch.empty(max(num_bytes, BUCKET_BYTES), dtype=torch.uint8, device="cpu")
        return self._bucket

    def _send(self, session: UpdateSession, group: Any, names: list[str], num_bytes: int) -> None:
        broadcast = _begin(lambda: _broadcast(group, self._bucket[:num_bytes], session.timeout_s))
        self._client.stage_from_group(session, names, self._name, "flattened_bucket")
        _result(broadcast, f"the broadcast of {names[0]} failed")


def _broadcast(group: Any, data: Any, seconds: float) -> None:
    from torch._C._distributed_c10d import BroadcastOptions

    options = BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    options.timeout = timedelta(seconds=seconds)
    group.broadcast([data], options).wait()


def _begin(work: Callable[[], Any]) -> Future[Any]:
    """Beside the call by which the others do their part; where that fails nobody waits for it."""
    begun: Future[Any] = Future()

    def run() -> None:
        try:
            begun.set_result(work())
        except (OSError, RuntimeError, ValueError) as error:  # those of torch
            begun.set_exception(error)
        finally:
            if not begun.done():
                begun.set_exception(InternalError("what was done over a process group failed"))

    threading.Thread(target=run, name="headrace-group-road", daemon=True).start()
    return begun


def _result(begun: Future[Any], problem: str) -> Any:
    try:
        return begun.result()
    except (OSError, RuntimeError, ValueError) as error:  # a rank is gone, or has stood still too long
        reason = str(error).split("\n", maxsplit=1)[0]
        raise UnavailableError(f"{problem}: {reason}", field="address") from None
