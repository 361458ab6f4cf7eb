"""Starts a core in a process of its own and watches it. Owns the child process and the descriptors shared with it.

The child shares nothing with its parent but the link's socket, a lifeline pipe whose end of file tells it that the
parent is gone, the page of its pulse, and the standard error stream. It is in a session of its own: no terminal signal
reaches it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from headrace.ipc.buffers import SharedBuffer
from headrace.ipc.codec import pack_frame
from headrace.ipc.descriptors import keep_standard_numbers
from headrace.ipc.pulse import PULSE_BYTES, PulsePage
from headrace.ipc.socket_link import SocketFrontLink
from headrace.telemetry import logging_words
from headrace.types.errors import ShutdownError

LINK_BUFFER_BYTES = 1 << 22
_EXIT_NOTICE_SECONDS = 1.0


class CoreProcess:
    """A running core. A thread waits for its exit, so that no zombie is left whatever the owner does."""

    def __init__(self, process: subprocess.Popen[bytes], lifeline: int, pulse: PulsePage) -> None:
        self.pulse = pulse
        self._process = process
        self._lifeline = lifeline
        self._lock = threading.Lock()
        self._exited = threading.Event()
        watcher = threading.Thread(target=self._watch, name=f"headrace-core-watch-{process.pid}", daemon=True)
        watcher.start()

    @property
    def pid(self) -> int:
        """Process id of the core."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """True until the process has ended."""
        return not self._exited.is_set()

    @property
    def exit_code(self) -> int | None:
        """As `subprocess.Popen.returncode`: negative is the signal that killed it. None while it runs."""
        return self._process.returncode if self._exited.is_set() else None

    def wait(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the end. Returns whether it came."""
        return self._exited.wait(timeout)

    def kill(self) -> None:
        """Kill the process and everything it started, now."""
        if self.is_alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def close(self, timeout: float) -> None:
        """Let the core end within `timeout` seconds, kill it then, and wait until it is gone. Idempotent.

        The link must be closed, or `Shutdown` sent, before.
        """
        if not self.wait(timeout):
            self.kill()
            self.wait(10.0)
        with self._lock:
            if self._lifeline >= 0:
                os.close(self._lifeline)
                self._lifeline = -1
                self.pulse.close()

    async def describe_exit(self) -> str:
        """How the process ended, in words; waits a moment for the end if it has not been seen yet."""
        steps = 100
        for _ in range(steps):
            if not self.is_alive:
                break
            await asyncio.sleep(_EXIT_NOTICE_SECONDS / steps)
        code = self.exit_code
        if code is None:
            return f"core process {self.pid} closed its link"
        if code < 0:
            return f"core process {self.pid} was killed by signal {-code} ({signal.strsignal(-code)})"
        return f"core process {self.pid} ended with exit code {code}"

    def _watch(self) -> None:
        self._process.wait()
        self._exited.set()


class BegunCore:
    """A core's process that waits for its configuration: `configure` it once, or `close` it."""

    def __init__(self, process: CoreProcess, front: socket.socket) -> None:
        self._process = process
        self._front = front
        self._lock = threading.RLock()  # a signal handler or the garbage collector may close what is being configured
        self._is_over = False

    def configure(self, config: bytes) -> tuple[CoreProcess, SocketFrontLink]:
        """Give it `config`, the msgpack of a `ResolvedConfig`. The first output on the link is `CoreReady`. Raises
        `ShutdownError` where it was closed."""
        with self._lock:
            if self._is_over:
                raise ShutdownError("the core was ended before it had its configuration")
            self._is_over = True
        with contextlib.suppress(OSError):  # a child that is dead already is reported through the link
            self._front.sendall(pack_frame(config))
        return self._process, SocketFrontLink(self._front, describe_exit=self._process.describe_exit)

    def close(self) -> None:
        """End it, unless it was configured: then whoever did that has it. Idempotent."""
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
        self._front.close()
        self._process.kill()
        self._process.close(_EXIT_NOTICE_SECONDS)


def start_process(config: bytes, *, executor: str = "local") -> tuple[CoreProcess, SocketFrontLink]:
    """`begin_process`, configured at once."""
    return begin_process(executor=executor).configure(config)


def begin_process(*, executor: str = "local", num_ranks: int = 0) -> BegunCore:
    """Start `python -m headrace.core.process`, which waits for its configuration.

    `executor` is "local", or "free" for one that computes nothing (benchmarks and tests). `num_ranks` is how many ranks
    of this host load torch while it waits: itself, and those it starts; 0: none does. Raises `OSError` when the process
    cannot be started, and `RuntimeError` when the thread cannot that watches it.
    """
    keep_standard_numbers()
    with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
        front, core = open_channel(ours, theirs)
        lifeline_read, lifeline_write = open_lifeline(ours, theirs)
        with SharedBuffer.create(PULSE_BYTES) as page:
            pulse = PulsePage.map(page.descriptor)
            ours.callback(pulse.close)
            words = ["--executor", executor, "--ranks", str(num_ranks)]
            process = _start(core.fileno(), lifeline_read, page.descriptor, words)
        ours.callback(_bury, process)
        begun = BegunCore(CoreProcess(process, lifeline_write, pulse), front)
        ours.pop_all()  # they stay open
    return begun


def open_channel(ours: contextlib.ExitStack, theirs: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
    """The ends of a channel to a child: this process's, which `ours` closes, and the child's, which `theirs` does."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.enter_context(near)
    theirs.enter_context(far)
    for end in (near, far):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LINK_BUFFER_BYTES)
    return near, far


def open_lifeline(ours: contextlib.ExitStack, theirs: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe of which nothing is read but its end, and that by the child, when this process is gone: the child's end,
    which `theirs` closes, and this process's, which `ours` does."""
    read_end, write_end = os.pipe()
    ours.callback(os.close, write_end)
    theirs.callback(os.close, read_end)
    return read_end, write_end


def _start(link: int, lifeline: int, pulse: int, words: list[str]) -> subprocess.Popen[bytes]:
    arguments = ["--link", str(link), "--lifeline", str(lifeline), "--pulse", str(pulse)]
    arguments += ["--parent", str(os.getpid()), *words, *logging_words()]
    return subprocess.Popen(
        # -P: a file in the working directory must not shadow a module of the child.
        [sys.executable, "-P", "-m", "headrace.core.process", *arguments],
        pass_fds=(link, lifeline, pulse),
        close_fds=True,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=standard_error(),
        stderr=standard_error(),
        env={**os.environ, "PYTHONPATH": python_path()},
    )


def _bury(process: subprocess.Popen[bytes]) -> None:
    """End a child that nobody watches."""
    process.kill()
    process.wait()


def standard_error() -> int:
    """The child's output goes to our error stream: our output may be somebody's data. Nowhere, if we began without one:
    its number may be any other file's by now."""
    try:
        os.fstat(2)
    except OSError:
        return subprocess.DEVNULL
    return 2 if sys.__stderr__ is not None else subprocess.DEVNULL


def python_path() -> str:
    """A search path on which the child finds the very package that runs here."""
    package_root = str(Path(__file__).resolve().parents[2])
    inherited = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join(part for part in (package_root, inherited) if part)
