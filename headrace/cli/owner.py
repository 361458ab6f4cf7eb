"""A `headrace serve` that another process owns (`headrace.client.Runtime`). Owns the socket to it: settings come in,
what came of them goes out, and its end is the end of this process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time

import msgspec

from headrace.ipc.receiving import receive_framed
from headrace.types.errors import HeadraceError, UnavailableError
from headrace.types.http import OwnerOrder, OwnerReport, framed

_LOOK_SECONDS = 1.0
_ORDER_SECONDS = 60.0


class Owner:
    """The process that started this one, at the other end of a socket."""

    def __init__(self, descriptor: int) -> None:
        self._link = socket.socket(fileno=descriptor)
        self._parent = os.getppid()
        self._has_told = False

    def read_order(self) -> OwnerOrder:
        """What is to be served, and how. From here on this process ends with its owner."""
        try:
            raw = receive_framed(self._link, time.monotonic() + _ORDER_SECONDS)
        except OSError as error:
            raise UnavailableError(f"the owner of this server says nothing: {error}") from None
        order = msgspec.msgpack.decode(raw, type=OwnerOrder)
        threading.Thread(target=self._watch, name="headrace-owner", daemon=True).start()
        return order

    def tell(self, url: str = "", error: HeadraceError | None = None) -> None:
        """Say what came of it, once; later errors are the clients'."""
        if self._has_told:
            return
        self._has_told = True
        report = msgspec.msgpack.encode(OwnerReport(url, None if error is None else error.info()))
        with contextlib.suppress(OSError):  # nobody is there to hear it
            self._link.sendall(framed(report))

    def _watch(self) -> None:
        """End as by a signal when the owner has gone. Where a fork of it still holds the socket, the parent's id says
        so."""
        self._link.settimeout(_LOOK_SECONDS)
        while os.getppid() == self._parent:
            try:
                if not self._link.recv(1):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        os.kill(os.getpid(), signal.SIGTERM)
