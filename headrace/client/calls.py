"""Calls to a server, made: which key each bears, and how long it may take. Owns both; sends nothing."""

from __future__ import annotations

from typing import Any

import msgspec

from headrace.client.asks import message_body
from headrace.client.transport import HttpCall, check_key
from headrace.types.http import MESSAGE_TYPE, PREFIX
from headrace.types.plain_values import as_seconds

GRACE_SECONDS = 10.0
"""Beyond the time limit that a call gives the server, for the way there and back."""


class CallMaker:
    """Makes the calls of one client. Those that steer the engine bear the admin key, if there is one."""

    def __init__(self, api_key: str | None, admin_key: str | None, timeout: float) -> None:
        self.timeout = as_seconds(timeout, "timeout")
        self._api_key = check_key(api_key, "api_key")
        self._admin_key = check_key(admin_key, "admin_key")

    def admin(self, name: str, body: bytes, limit: float | None = None, media_type: str = MESSAGE_TYPE) -> HttpCall:
        """One of ours that steers the engine."""
        call = self.to(name, f"{PREFIX}/{name}", body, media_type, limit)
        if self._admin_key is None:
            return call
        return msgspec.structs.replace(call, key=self._admin_key, key_field="admin_key")

    def data(self, name: str, arguments: dict[str, Any], limit: float | None = None) -> HttpCall:
        """One of ours that does not."""
        return self.to(name, f"{PREFIX}/{name}", message_body(arguments), MESSAGE_TYPE, limit)

    def to(self, name: str, path: str, body: bytes, media_type: str, limit: float | None = None) -> HttpCall:
        """One to any path."""
        timeout = limit or self.timeout
        return HttpCall(name=name, path=path, key=self._api_key, timeout=timeout, content=body, media_type=media_type)


def limit_of(seconds: float | None) -> float | None:
    """What a call may take whose time the server limits."""
    return None if seconds is None else seconds + GRACE_SECONDS
