"""Who may call what. Owns the comparison of bearer keys; which route needs which key is data given to it. Where none is
needed, `browsers` says what keeps web pages out.

It stands in front of the whole application, so that a route nobody thought of needs the data key.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Any, Literal

from starlette.types import ASGIApp, Receive, Scope, Send

from headrace.server.browsers import Hosts, fault_of
from headrace.server.errors import error_body, respond

Access = Literal["open", "data", "admin"]
Keys = Mapping[Access, tuple[bytes, ...]]
"""The keys that open routes of each kind; none: they are open to everybody."""
_SCHEME = b"bearer "


class Auth:
    """ASGI middleware. `access` says for a path what it needs; a path it does not hold needs the data key.

    The admin key opens data routes too. Without an admin key, control routes take the data key; without any key, every
    caller passes, whatever it sends, but for web pages of others: a request has to name one of `hosts`.
    """

    def __init__(self, app: ASGIApp, access: Mapping[str, Access], keys: Keys, hosts: Hosts) -> None:
        self._app = app
        self._access = access
        self._keys = keys
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no other protocol is served
        body = refusal_of(scope, self._access.get(scope["path"], "data"), self._keys, self._hosts)
        if body is not None:
            response = respond(body)
            if body["code"] == 401:
                response.headers["connection"] = "close"  # it need not stay for somebody without a key
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)


def refusal_of(scope: Scope, needed: Access, keys: Keys, hosts: Hosts) -> dict[str, Any] | None:
    """The error body for a request whose headers do not open what needs `needed`; None for one that may pass."""
    wanted = keys[needed]
    reason = "" if wanted or needed == "open" else fault_of(scope, hosts)
    if reason:
        return error_body(403, f"{reason}; a server without an API key refuses this", kind="Forbidden")
    if wanted and not _is_one_of(_bearer(scope), wanted):
        return error_body(401, "a valid bearer key is needed", kind="Unauthorized")
    return None


def keys_of(api_key: str | None, admin_api_key: str | None) -> Keys:
    return {
        "open": (),
        "data": () if api_key is None else _encoded(api_key, admin_api_key),
        "admin": _encoded(api_key) if admin_api_key is None else _encoded(admin_api_key),
    }


def _encoded(*keys: str | None) -> tuple[bytes, ...]:
    return tuple(key.encode() for key in keys if key is not None)


def _bearer(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"authorization" and value[: len(_SCHEME)].lower() == _SCHEME:
            return bytes(value[len(_SCHEME) :]).strip()
    return b""


def _is_one_of(given: bytes, keys: tuple[bytes, ...]) -> bool:
    """Takes the same time whichever key matches, and however much of it."""
    return any([hmac.compare_digest(given, key) for key in keys])
