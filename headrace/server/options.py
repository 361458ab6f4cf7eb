"""Settings of an HTTP server. Owns their names, defaults and bounds; every field is a keyword of `serve`."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any

import msgspec

from headrace.types.errors import ConfigError


class ServerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How an engine is offered over HTTP.

    api_key                       bearer key of every route but health; None: any bearer passes
    admin_api_key                 bearer key of control routes; None: they take `api_key`
    insecure                      allow a non-loopback address without `api_key`
    incremental_streaming_output  `/generate` streams only what is new, instead of everything so far
    weight_roots                  folders that `/update_weights_from_disk` may read besides the model's own
    max_body_bytes                largest request body; more is answered 413
    body_timeout                  seconds a client may take to send its body
    write_timeout                 seconds a client may leave a stream unread
    drain_timeout                 seconds running requests get to finish on shutdown before they are aborted
    """

    api_key: str | None = None
    admin_api_key: str | None = None
    insecure: bool = False
    incremental_streaming_output: bool = False
    weight_roots: tuple[str, ...] = ()
    max_body_bytes: int = 64 << 20
    body_timeout: float = 60.0
    write_timeout: float = 300.0
    drain_timeout: float = 30.0

    def __post_init__(self) -> None:
        for name in ("api_key", "admin_api_key"):
            key = getattr(self, name)
            if key is not None and not (key and key.isascii() and key.isprintable()):
                raise ConfigError(f"{name} must be printable ASCII and not empty", field=name)
        if self.max_body_bytes < 1024:
            raise ConfigError("max_body_bytes must be at least 1024", field="max_body_bytes")
        for name in ("body_timeout", "write_timeout", "drain_timeout"):
            if not 0 <= getattr(self, name) <= 1e9:
                raise ConfigError(f"{name} must be in [0, 1e9] seconds", field=name)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ServerOptions:
        """Build from keywords; an unknown or ill-typed one raises `ConfigError` naming it."""
        for name in values:
            if name not in cls.__struct_fields__:
                raise ConfigError(f"{name} is not a server setting", field=name)
        try:
            return msgspec.convert(dict(values), cls)
        except msgspec.ValidationError as error:
            if isinstance(error.__cause__, ConfigError):
                raise error.__cause__ from None
            raise ConfigError(str(error), field=str(error).partition("`$.")[2].rstrip("`")) from None

    def check_address(self, host: str) -> None:
        """Raise `ConfigError` if serving on `host` would expose an engine that anybody may steer."""
        if self.api_key is None and not self.insecure and not is_loopback(host):
            message = f"host {host} is reachable from outside: set api_key, or insecure to serve everybody"
            raise ConfigError(message, field="host")


def is_loopback(host: str) -> bool:
    """True for an address that only this machine reaches."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
