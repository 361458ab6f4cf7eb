"""A server process of one's own, and a client of it. Owns the process, its key, and its end.

The process is `headrace serve`. It gets its settings, the key among them, through a socket that it inherits, and says
there at which address it serves, or why it does not. When the socket ends, because it was closed or its owner was
killed, the server ends; its core ends with it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from headrace.client.async_client import DEFAULT_TIMEOUT
from headrace.client.client import Client
from headrace.config import EngineConfig
from headrace.ipc.receiving import receive_framed
from headrace.ipc.spawn import python_path, standard_error
from headrace.types.errors import ConfigError, DeadlineError, EngineDeadError
from headrace.types.http import OwnerOrder, OwnerReport, framed
from headrace.types.plain_values import as_choice, as_seconds

CLOSE_SECONDS = 30.0
START_SECONDS = 60.0
"""For all of a start but the core's own `start_timeout`."""
_DRAIN_SECONDS = 2.0
_KEY_NAMES = ("HEADRACE_API_KEY", "HEADRACE_ADMIN_API_KEY")
_LEVELS = ("debug", "info", "warning", "error")
_START_TIMEOUT = {field.name: field.default for field in msgspec.structs.fields(EngineConfig)}["start_timeout"]


class Runtime(Client):
    """`model` served by a process of its own, on a free port of this machine, with a key that nobody else has. What it
    can be asked is what `Client` can; `url` and `api_key` are for others that are to ask it. A context manager.

    `config` are the fields of `EngineConfig` and `ServerOptions`; `timeout` and `shares_memory` are the client's.

    Raises what `Engine` raises: `ConfigError` and `CheckpointError` naming the field, `DeadlineError` after
    `start_timeout`, `EngineDeadError` if the process dies while it starts. Nothing is left then.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        shares_memory: bool = True,
        log_level: str = "warning",
        **config: Any,
    ) -> None:
        for name in {"api_key_file", "admin_api_key_file"} & config.keys():
            raise ConfigError(f"{name}: give the key itself, which goes to the server through a socket", field=name)
        if not isinstance(model, (str, Path)) or "\0" in str(model):
            raise ConfigError(f"model {model!r} is no folder or hub id", field="model")
        level = as_choice(log_level, _LEVELS, "log_level", ConfigError)
        as_seconds(timeout, "timeout")  # before the wait for a start
        config = {"api_key": secrets.token_urlsafe(32), "drain_timeout": _DRAIN_SECONDS, **config}
        limit = as_seconds(config.get("start_timeout", _START_TIMEOUT), "start_timeout", ConfigError)
        self._server = ServerProcess(model, config, ("--log-level", level))
        try:
            url = self._server.wait_started(limit + START_SECONDS)
            self.api_key: str = config["api_key"]
            super().__init__(url, self.api_key, config.get("admin_api_key"), timeout, shares_memory=shares_memory)
        except BaseException:  # whatever it is: nobody has this runtime, to close it
            self._server.close()
            raise

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._server.pid

    def close(self) -> None:
        """End the server and its core, and wait for that. Idempotent."""
        super().close()
        self._server.close()

    def __enter__(self) -> Runtime:
        return self


class ServerProcess:
    """A running `headrace serve` that this process owns. It ends with this object, whatever becomes of its owner.

    `config` goes to it through a socket, `words` on its command line; `environment` is added to this process's.
    """

    def __init__(
        self,
        model: str | Path,
        config: Mapping[str, Any],
        words: Sequence[str] = (),
        *,
        port: int = 0,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._order = _packed(OwnerOrder(dict(config)))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            try:
                self._process = _start(model, theirs.fileno(), ("--port", str(port), *words), environment)
            except BaseException:  # whatever it is: the socket is nobody's
                ours.close()
                raise
        self._finalizer = weakref.finalize(self, _end, ours, self._process, os.getpid())
        self._link = ours

    @property
    def exit_code(self) -> int | None:
        """As `subprocess.Popen.poll`: None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """End it now, as one that does not answer; its core ends with it."""
        self._process.kill()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_started(self, timeout: float) -> str:
        """The server's address. Raises what kept it from serving; `DeadlineError` after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        try:
            self._link.settimeout(timeout)
            self._link.sendall(framed(self._order))
            report = msgspec.msgpack.decode(receive_framed(self._link, deadline), type=OwnerReport)
        except TimeoutError:
            message = f"the server was not ready within {timeout:g} s"
            raise DeadlineError(message, field="start_timeout") from None
        except ConnectionError:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(CLOSE_SECONDS)
            message = f"the server ended with exit code {self._process.returncode} before it served"
            raise EngineDeadError(message) from None
        if report.error is not None:
            raise report.error.to_exception()
        return report.url

    def close(self) -> None:
        """End it, and wait until it is gone. Idempotent."""
        self._finalizer()


def _packed(order: OwnerOrder) -> bytes:
    try:
        return msgspec.msgpack.encode(order, enc_hook=_setting)
    except (OverflowError, RecursionError, TypeError, UnicodeEncodeError) as error:
        raise ConfigError(f"a setting cannot be handed to the server: {error}", field="config") from None


def _setting(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"a {type(value).__name__} is no plain value")


def _start(
    model: str | Path, link: int, words: Sequence[str], environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    words = ["serve", *words, "--owner", str(link), "--", os.fspath(model)]
    return subprocess.Popen(
        # -P: a file in the working directory must not shadow a module of the child.
        [sys.executable, "-P", "-m", "headrace", *words],
        pass_fds=(link,),
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=standard_error(),
        stderr=standard_error(),
        env={**_inherited(), **environment, "PYTHONPATH": python_path()},
    )


def _inherited() -> dict[str, str]:
    """The environment without the keys of a server that this process may be."""
    return {name: value for name, value in os.environ.items() if name not in _KEY_NAMES}


def _end(link: socket.socket, process: subprocess.Popen[bytes], owner: int) -> None:
    """Let the server end by itself, kill it if it does not. In a fork of the owner it is not ours to end."""
    if os.getpid() != owner:
        with contextlib.suppress(OSError):  # a fork that becomes another program has closed all that it has
            link.close()
        return
    with contextlib.suppress(OSError):
        link.shutdown(socket.SHUT_RDWR)  # also of the copy that a fork has
    link.close()
    try:
        process.wait(CLOSE_SECONDS)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(CLOSE_SECONDS)
