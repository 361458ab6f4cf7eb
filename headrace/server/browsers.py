"""What keeps web pages out of a server without a key. Owns the rule for Host, Origin and Sec-Fetch-Site.

A page of anybody's, open in a browser on this machine, can send requests to it. A key stops them, since no page knows
it. Without one, a request must name this server as a page of strangers cannot: by an address or name that is ours, and
from no other site.
"""

from __future__ import annotations

import functools
import ipaddress
import socket
from collections.abc import Collection

from starlette.types import Scope

from headrace.server.options import is_loopback

_NUM_REMEMBERED = 64  # values of Host headers: clients of one server write few


def fault_of(scope: Scope, hosts: Hosts) -> str:
    """Why a request may come from a stranger's page; "" if it cannot: it is to a host that `hosts` knows, and from no
    page of another site."""
    values = dict(scope["headers"])
    host = values.get(b"host", b"").decode("latin-1").lower()
    if host and not hosts.know(host):
        return f"host {ascii(host[:100])} is not known here (--allowed-host adds it)"
    if b"origin" in values:
        origin = values[b"origin"].decode("latin-1").lower()
        if origin.partition("://")[2] != host:
            return f"origin {ascii(origin[:100])} is another site"
    if values.get(b"sec-fetch-site", b"none").lower() not in (b"none", b"same-origin"):
        return "the request comes from another site"
    return ""


class Hosts:
    """The names under which a server is meant: those `allowed` ("*" is any), its own, and addresses.

    On a loopback address only loopback ones are its own; elsewhere any address is, since the name of a page that was
    made to point here is never an address.
    """

    def __init__(self, bound: str, allowed: Collection[str]) -> None:
        self._is_local = is_loopback(bound)
        names = ["localhost", bound, *allowed]
        if not self._is_local:
            names += [socket.gethostname(), socket.gethostname().partition(".")[0]]
        self._names = {name.lower().strip("[]").rstrip(".") for name in names}
        self.know = functools.lru_cache(_NUM_REMEMBERED)(self._know)
        """Whether the value of a Host header, in lower case, is one of them; the port does not matter."""

    def _know(self, host: str) -> bool:
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        try:
            is_loopback_address = ipaddress.ip_address(name).is_loopback
        except ValueError:
            name = name.rstrip(".")
            return bool(self._names & {name, "*"}) or name.endswith(".localhost")
        return is_loopback_address or not self._is_local or name in self._names
