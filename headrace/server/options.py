"""Settings of an HTTP server. Owns their names, defaults and bounds; every field is a keyword of `serve`."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import stat
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from headrace.types.errors import ConfigError
from headrace.types.plain_values import as_integer, as_path, as_seconds, as_setting, hint

MAX_KEY_BYTES = 4096
logger = logging.getLogger(__name__)


class ServerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How an engine is offered over HTTP.

    api_key                       bearer key of every route but health and pages without data; None: any bearer passes.
                                  Others on this machine can read a command line: prefer `api_key_file`, or
                                  HEADRACE_API_KEY in the environment of `headrace serve`
    admin_api_key                 bearer key of control routes; None: they take `api_key`. Prefer the file, or
                                  HEADRACE_ADMIN_API_KEY
    api_key_file                  file that holds `api_key`
    admin_api_key_file            file that holds `admin_api_key`
    allowed_hosts                 further names by which clients may call a server without a key; "*": any name
    insecure                      allow a non-loopback address without `api_key`
    access_log                    log every answer at info: client, method, path, status, bytes and ms, and why it was
                                  refused if it was
    incremental_streaming_output  `/generate` streams only what is new, instead of everything so far
    weight_roots                  folders that `/update_weights_from_disk` may read besides the model's own
    save_roots                    folders, and URLs of stores, below which clients may save weights; none by default
    max_body_bytes                largest request body; more is answered 413
    body_timeout                  seconds a client may take to send its body
    write_timeout                 seconds a client may leave a stream unread
    drain_timeout                 seconds running requests get to finish on shutdown before they are aborted; control
                                  calls that wait then are answered 503
    """

    api_key: str | None = None
    admin_api_key: str | None = None
    api_key_file: str | None = None
    admin_api_key_file: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    insecure: bool = False
    access_log: bool = False
    incremental_streaming_output: bool = False
    weight_roots: tuple[str, ...] = ()
    save_roots: tuple[str, ...] = ()
    max_body_bytes: int = 64 << 20
    body_timeout: float = 60.0
    write_timeout: float = 300.0
    drain_timeout: float = 30.0

    def __post_init__(self) -> None:
        for name in ("api_key", "admin_api_key"):
            settle_key(self, name)
        for name in ("weight_roots", "save_roots"):
            for root in getattr(self, name):
                as_path(root, name, ConfigError)
        if self.max_body_bytes < 1024:
            raise ConfigError("max_body_bytes must be at least 1024", field="max_body_bytes")
        for name in ("body_timeout", "write_timeout"):
            as_seconds(getattr(self, name), name, ConfigError)
        if not 0 <= self.drain_timeout <= 1e9:
            raise ConfigError("drain_timeout must be in [0, 1e9] seconds", field="drain_timeout")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ServerOptions:
        """Build from keywords; an unknown or ill-typed one raises `ConfigError` naming it."""
        return from_keywords(cls, values, "a server setting")

    def check_address(self, host: str) -> None:
        """Raise `ConfigError` if serving on `host` would expose an engine that anybody may steer."""
        if self.api_key is None and not self.insecure:
            check_local(host)


Options = TypeVar("Options", bound=msgspec.Struct)


def from_keywords(cls: type[Options], values: Mapping[str, Any], what: str) -> Options:
    """The settings `cls` from keywords; an unknown or ill-typed one raises `ConfigError` naming it."""
    kinds = {field.name: field.type for field in msgspec.structs.fields(cls)}
    for name in values:
        if name not in kinds:
            raise ConfigError(f"{name} is not {what}{hint(name, kinds)}", field=name)
    return cls(**{name: as_setting(value, kinds[name], name, ConfigError) for name, value in values.items()})


def check_local(host: str) -> None:
    """Raise `ConfigError` for an address that others reach; of one that is no address it says so."""
    addresses_of(host)
    if not is_loopback(host):
        message = f"host {host} is reachable from outside: set api_key, or insecure to serve everybody"
        raise ConfigError(message, field="host")


def settle_key(options: msgspec.Struct, name: str) -> None:
    """Have the bearer key `name` of settings that are being made: from its file, where one is given."""
    key, file = getattr(options, name), getattr(options, f"{name}_file")
    if key is None and file is not None:
        key = _read_key(file, f"{name}_file")
        msgspec.structs.force_setattr(options, name, key)
        msgspec.structs.force_setattr(options, f"{name}_file", None)
    elif file is not None:
        raise ConfigError(f"give {name} or {name}_file, not both", field=f"{name}_file")
    if key is not None and not (key.strip() == key != "" and key.isascii() and key.isprintable()):
        raise ConfigError(f"{name} must be printable ASCII, not empty, without spaces around it", field=name)


def _read_key(path: str, field: str) -> str:
    """The key in a file, without the spaces and line ends around it."""
    try:
        with open(os.path.expanduser(path), "rb") as file:
            mode, content = os.fstat(file.fileno()).st_mode, file.read(MAX_KEY_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{field} {path} cannot be read: {error.strerror}", field=field) from None
    except ValueError:
        raise ConfigError(f"{field} {path!r} is no path", field=field) from None
    if len(content) > MAX_KEY_BYTES:
        raise ConfigError(f"{field} {path} holds more than {MAX_KEY_BYTES} bytes", field=field)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        logger.warning("%s %s is open to others than its owner: chmod 600", field, path)
    try:
        key = content.decode("ascii").strip()
    except UnicodeDecodeError:
        key = ""
    if not (key and key.isprintable()):
        raise ConfigError(f"{field} {path} must hold one line of printable ASCII", field=field)
    return key


def check_port(port: int) -> int:
    """A port to listen on, 0 for any. `ConfigError` naming `port`."""
    number = as_integer(port, "port", ConfigError)
    if not 0 <= number <= 65535:
        raise ConfigError(f"port must be in [0, 65535], got {number}", field="port")
    return number


def addresses_of(host: str, port: int = 0) -> list[tuple[Any, ...]]:
    """What `socket.getaddrinfo` says of an address to listen on. `ConfigError` naming `host` or `port`."""
    if not isinstance(host, str):
        raise ConfigError(f"host must be a name or an address, not {type(host).__name__}", field="host")
    number = check_port(port)
    try:
        return list(socket.getaddrinfo(host, number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE))
    except (OSError, ValueError) as error:  # a name that nobody knows; text that can be no name
        raise ConfigError(f"host {host} cannot be resolved: {error}", field="host") from None


def is_loopback(host: str) -> bool:
    """True for an address that only this machine reaches."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
