"""What rank 0 tells a rank before any plan: its settings, by which it prepares, and then where all ranks meet. Owns how
long a rank waits for either."""

from __future__ import annotations

import time
from collections import deque
from typing import TypeVar

import msgspec

from headrace.config import ResolvedConfig
from headrace.core.awaited_settings import SETTINGS_SECONDS
from headrace.core.rank_messages import SETTINGS, START, RankStart
from headrace.ipc.codec import DECODE_ERRORS
from headrace.ipc.rank_channel import RankChannel
from headrace.types.errors import DeadlineError, InternalError

_Told = TypeVar("_Told")


class Opening:
    """A rank's side of it: `settings`, then `start`; no two threads at once. Both raise `PeerClosed` where rank 0 is
    gone, `DeadlineError` where it says nothing in time, and `InternalError` where it says something else."""

    def __init__(self, channel: RankChannel) -> None:
        self._channel = channel
        self._frames: deque[tuple[int, memoryview]] = deque()

    def settings(self) -> ResolvedConfig:
        """What holds for this rank, as soon as it is decided."""
        return self._next(SETTINGS, ResolvedConfig, SETTINGS_SECONDS)

    def start(self, seconds: float) -> RankStart:
        """Where the ranks meet, once all have come."""
        return self._next(START, RankStart, seconds)

    def _next(self, kind: int, expected: type[_Told], seconds: float) -> _Told:
        until = time.monotonic() + seconds
        while not self._frames:
            left = until - time.monotonic()
            if left <= 0:
                message = f"rank 0 has sent no {expected.__name__} within {seconds:g} s"
                raise DeadlineError(message, field="start_timeout")
            self._frames.extend(self._channel.receive(left))
        found, payload = self._frames.popleft()
        if found != kind:
            raise InternalError(f"rank 0 has sent a frame of kind {found} where {expected.__name__} was awaited")
        try:
            return msgspec.msgpack.decode(payload, type=expected)
        except DECODE_ERRORS as error:
            raise InternalError(f"rank 0 has sent no {expected.__name__}: {error}") from None
