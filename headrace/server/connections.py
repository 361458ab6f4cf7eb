"""One client's connection: how long it may take over what uvicorn waits for without a bound. Knows no route.

Owns when a connection is idle, late or stuck. Whoever runs the server looks at that now and then, which costs less than
a timer each.
"""

from __future__ import annotations

import logging
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

FIRST_BYTE_SECONDS = 30.0
HEADER_SECONDS = 10.0

LINGERS = "headrace.lingers"
"""Key of a request's state: its answer is sent, and what is left of its body is read and forgotten."""
CROWDED = "headrace.crowded"
"""Key of a request's state: the server has more connections than it wants; only a short answer is due."""


class Connection(H11Protocol):
    """A connection that can say since when its client keeps the server waiting. Times are the loop's."""

    def __init__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any], is_crowded: bool = False
    ) -> None:
        super().__init__(config, server_state, {**app_state, CROWDED: True} if is_crowded else app_state)
        self.logger = _ClientFaults(__name__)
        self.used_at = self.loop.time()
        self._headers_since: float | None = self.used_at
        self._has_begun = False
        self._num_unsent = 0
        self._unsent_since = 0.0

    @property
    def is_idle(self) -> bool:
        """True when closing it takes nothing from the client: no request is whole, or its answer is sent."""
        return self._is_between_requests or LINGERS in self.cycle.scope["state"]

    def is_late(self, now: float) -> bool:
        """True when a request's headers do not come: the first byte within 30 s, the rest within 10 s of the first."""
        limit = HEADER_SECONDS if self._has_begun else FIRST_BYTE_SECONDS
        return self._headers_since is not None and now - self._headers_since > limit

    def is_stuck(self, now: float, limit: float) -> bool:
        """True when the client has taken nothing of what waits for it for `limit` seconds. To be asked regularly."""
        num_unsent = self.transport.get_write_buffer_size()
        if num_unsent == 0 or num_unsent != self._num_unsent:
            self._num_unsent, self._unsent_since = num_unsent, now
        return num_unsent > 0 and now - self._unsent_since > limit

    def data_received(self, data: bytes) -> None:
        """Bytes of the client."""
        self.used_at = self.loop.time()
        super().data_received(data)
        if not self._is_between_requests:
            self._headers_since = None
        elif self._headers_since is None or not self._has_begun:
            self._headers_since = self.used_at
        self._has_begun = True

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP; in the middle of an answer there is nothing left to say."""
        try:
            super().send_400_response(msg)
        except h11.LocalProtocolError:
            self.transport.abort()

    @property
    def _is_between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete


class _ClientFaults(logging.Logger):
    """uvicorn warns of every client that does something wrong: with that, anybody could fill the log."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.parent = logging.getLogger(name)

    def warning(self, msg: object, *args: object, **more: Any) -> None:
        self.debug(msg, *args, **more)
