"""How the ranks of one replica find each other: a store on loopback that lives as long as they do, and a process group
made of that store alone. Nothing is registered with `torch.distributed`, whose groups are the caller's own; of a
trainer's only the store is used here, where its ranks say how they are found.

Owns addresses, the secret and backends. Must not know processes.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from datetime import timedelta
from typing import Any

from headrace.parallel.breakable_group import BreakableGroup
from headrace.types.errors import HeadraceError
from headrace.types.plan import RankLost

LOOPBACK = "127.0.0.1"
JOIN_SECONDS = 120.0
_LOOK_SECONDS = 0.002
_NEVER_SECONDS = 24 * 3600.0
_ENDS_PROCESS = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING")
"""What torch's NCCL backend does where a rank is lost; the second is its old name."""


class Rendezvous:
    """The place where ranks meet, at `port`. Whoever does not know `secret` finds nothing in it."""

    def __init__(self, port: int, secret: str, store: Any) -> None:
        self.port = port
        self.secret = secret
        self._store = store

    @classmethod
    def host(cls) -> Rendezvous:
        """A new one, which this process keeps: on loopback only, at a port that was free."""
        store = kept_store(socket.create_server((LOOPBACK, 0)), LOOPBACK, JOIN_SECONDS)
        return cls(store.port, secrets.token_hex(16), store)

    @classmethod
    def reach(cls, port: int, secret: str) -> Rendezvous:
        """That which another process of this machine keeps. Raises `RuntimeError` if nobody does."""
        from torch._C._distributed_c10d import TCPStore

        limit = timedelta(seconds=JOIN_SECONDS)
        return cls(port, secret, TCPStore(LOOPBACK, port, is_master=False, timeout=limit))

    def group(
        self,
        rank: int,
        num_ranks: int,
        name: str = "all",
        *,
        device: str,
        host: str = LOOPBACK,
        is_broken: threading.Event | None = None,
        breaks_calls: bool = True,
    ) -> Any:
        """The process group of that name: gloo's, or NCCL's on "cuda". Waits for all of its ranks; `RuntimeError` where
        one does not come. `host` is the address of this machine by which the others reach it; NCCL finds its own. Once
        `is_broken` is set gloo's wait ends in `RankLost`, and its calls too, if it `breaks_calls`."""
        from torch._C import _distributed_c10d as c10d

        store = c10d.PrefixStore(f"{device}/{name}", c10d.PrefixStore(self.secret, self._store))
        if device == "cuda":
            return _nccl_group(store, rank, num_ranks)
        _await_all(store, rank, num_ranks, is_broken)
        group = gloo_group(store, rank, num_ranks, host, JOIN_SECONDS)
        return BreakableGroup(group, is_broken) if is_broken is not None and breaks_calls else group

    def close(self) -> None:
        """Leave it; who keeps it ends it, once the groups that were formed in it are closed too. Idempotent."""
        self._store = None


def kept_store(listener: socket.socket, host: str, seconds: float) -> Any:
    """A store that this process keeps, at the address where `listener` listens, which it takes over: torch's own would
    listen on every interface. `host` is that address, and `seconds` how long what is asked of it may take."""
    from torch._C._distributed_c10d import TCPStore

    return TCPStore(
        host,
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=seconds),
        master_listen_fd=listener.detach(),
    )


def _await_all(store: Any, rank: int, num_ranks: int, is_broken: threading.Event | None) -> None:
    """Until all are about to join: from there on gloo waits by itself, which nothing here could end."""
    store.set(f"joins/{rank}", "")
    everyone = [f"joins/{each}" for each in range(num_ranks)]
    until = time.monotonic() + JOIN_SECONDS
    while not store.check(everyone):
        if is_broken is not None and is_broken.is_set():
            raise RankLost("another rank was lost before all had joined")
        if time.monotonic() >= until:
            raise RankLost(f"not all of {num_ranks} ranks have joined within {JOIN_SECONDS:g} s")
        time.sleep(_LOOK_SECONDS)


def gloo_group(store: Any, rank: int, num_ranks: int, host: str, seconds: float) -> Any:
    """A group of gloo's, which others reach at the address `host` of this machine. Waits for all of its ranks, and
    raises `RuntimeError` where one does not come within so many seconds."""
    from torch._C import _distributed_c10d as c10d

    kind: Any = c10d.ProcessGroupGloo
    options = kind._Options()
    options._devices = [kind.create_device(hostname=host)]
    options._timeout = timedelta(seconds=seconds)
    return kind(store, rank, num_ranks, options)


def _nccl_group(store: Any, rank: int, num_ranks: int) -> Any:
    """A group of NCCL's. By itself torch would end this process, which may be a trainer's, where a rank is lost or
    late; but it is for those who wait for the device to know that."""
    from torch._C import _distributed_c10d as c10d

    os.environ["NCCL_NVLS_ENABLE"] = "0"  # not every machine lets processes share multicast memory
    kind: Any = c10d.ProcessGroupNCCL
    options = kind.Options()
    options._timeout = timedelta(seconds=_NEVER_SECONDS)
    kept = {name: os.environ.pop(name, None) for name in _ENDS_PROCESS}
    os.environ[_ENDS_PROCESS[0]] = "0"
    try:
        return kind(store, rank, num_ranks, options)  # which looks at it, once
    finally:
        del os.environ[_ENDS_PROCESS[0]]
        os.environ.update({name: value for name, value in kept.items() if value is not None})


def trainer_group(given: Any, field: str, refusal: type[HeadraceError]) -> Any:
    """The `ProcessGroup` that a trainer gives, itself or as a `DeviceMesh` of one dimension, of which this process is a
    rank. Raises a `refusal` naming the field."""
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    group = given
    if isinstance(given, DeviceMesh):
        if given.ndim != 1:
            message = f"{field} has {given.ndim} dimensions, one is needed: mesh['name'] is a part"
            raise refusal(message, field=field)
        group = given.get_group() if given.get_coordinate() is not None else None
    if not isinstance(group, ProcessGroup):
        message = f"a ProcessGroup or DeviceMesh with this process in it is needed, not a {type(given).__name__}"
        raise refusal(f"{field}: {message}", field=field)
    return group


def trainer_store() -> Any:
    """Where the ranks of this process's trainer have found each other."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def listen_beside(store: Any, backlog: int) -> socket.socket:
    """A listener at the address by which this machine reaches the trainer's store: so other ranks reach it."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    master = getattr(store, "host", None) or os.environ.get("MASTER_ADDR", LOOPBACK)
    try:
        family, *_, address = socket.getaddrinfo(master, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            host = probe.getsockname()[0]
    except OSError:
        family, host = socket.AF_INET, LOOPBACK
    return socket.create_server((host, 0), family=family, backlog=backlog)
