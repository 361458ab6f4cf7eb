"""Starts another rank in a process of its own. Owns the child and the descriptors shared with it.

As a core with its front, a rank shares with rank 0 nothing but a channel, a lifeline pipe, a page of memory and the
standard error stream.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from headrace.ipc.buffers import SharedBuffer
from headrace.ipc.descriptors import keep_standard_numbers
from headrace.ipc.rank_channel import RankChannel
from headrace.ipc.rank_page import RANK_PAGE_BYTES, RankPage
from headrace.ipc.spawn import open_channel, open_lifeline, python_path, standard_error
from headrace.telemetry import logging_words

RANK_MODULE = "headrace.core.rank_process"
SILENT_SECONDS = 60.0


class RankProcess:
    """A rank that is a child of this process; see `RankPeer`."""

    shares_memory = True
    silent_seconds = SILENT_SECONDS

    def __init__(
        self, rank: int, process: subprocess.Popen[bytes], lifeline: int, channel: RankChannel, page: RankPage
    ) -> None:
        self.rank = rank
        self.channel = channel
        self.page = page
        self._process = process
        self._lifeline = lifeline

    @property
    def name(self) -> str:
        return f"rank {self.rank} (process {self._process.pid})"

    @property
    def pid(self) -> int:
        return self._process.pid

    def has_started(self) -> None:
        pass

    def describe_exit(self, seconds: float = 0.0) -> str:
        until = time.monotonic() + seconds
        while (code := self._process.poll()) is None:
            if time.monotonic() >= until:
                return ""
            time.sleep(0.01)
        if code < 0:
            return f"was killed by signal {-code} ({signal.strsignal(-code)})"
        return f"ended with exit code {code}" + (f": {self.page.text}" if self.page.text else "")

    @property
    def is_stopped(self) -> bool:
        return is_stopped(self._process.pid)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def close(self, seconds: float) -> None:
        if self._lifeline < 0:
            return
        self.channel.close()
        os.close(self._lifeline)
        self._lifeline = -1
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()
        self.page.close()


def is_stopped(pid: int) -> bool:
    """Whether a signal, or a debugger, keeps a process of this machine from running."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return state.rpartition(")")[2].split()[:1] in (["T"], ["t"])


def start_rank(rank: int, *, shares_process: bool) -> RankProcess:
    """Start `python -m headrace.core.rank_process`. What it needs to know is sent over its channel.

    `shares_process`: this process is a caller's, whose terminal must not reach the rank. Raises `OSError` when the
    process cannot be started.
    """
    keep_standard_numbers()
    with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
        near, far = open_channel(ours, theirs)
        lifeline_read, lifeline_write = open_lifeline(ours, theirs)
        with SharedBuffer.create(RANK_PAGE_BYTES) as memory:
            page = RankPage.map(memory.descriptor)
            ours.callback(page.close)
            process = _start(rank, (far.fileno(), lifeline_read, memory.descriptor), shares_process)
        ours.pop_all()  # they stay open
    return RankProcess(rank, process, lifeline_write, RankChannel(near), page)


def keep_rank(rank: int, channel: socket.socket, page: socket.socket) -> KeptRank:
    """Start the process of a rank that belongs to a rank 0 elsewhere, and has these connections to it, which it takes.
    Raises `OSError`."""
    keep_standard_numbers()
    with channel, page, contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
        for connection in (channel, page):
            connection.setblocking(True)
        lifeline_read, lifeline_write = open_lifeline(ours, theirs)
        process = _start(rank, (channel.fileno(), lifeline_read, page.fileno()), shares_process=False)
        ours.pop_all()
    return KeptRank(process, lifeline_write)


class KeptRank:
    """The process of a rank that belongs to a rank 0 elsewhere: a child to be ended, and nothing else."""

    def __init__(self, process: subprocess.Popen[bytes], lifeline: int) -> None:
        self._process, self._lifeline = process, lifeline

    def close(self, seconds: float) -> None:
        """Wait up to `seconds` for its end, and kill it then. Idempotent."""
        if self._lifeline < 0:
            return
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._lifeline)
        self._lifeline = -1


def _start(rank: int, descriptors: tuple[int, int, int], shares_process: bool) -> subprocess.Popen[bytes]:
    channel, lifeline, page = map(str, descriptors)
    arguments = ["--channel", channel, "--lifeline", lifeline, "--page", page]
    arguments += ["--rank", str(rank), "--parent", str(os.getpid())]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", RANK_MODULE, *arguments, *logging_words()],
        pass_fds=descriptors,
        close_fds=True,
        start_new_session=shares_process,
        stdin=subprocess.DEVNULL,
        stdout=standard_error(),
        stderr=standard_error(),
        env={**os.environ, "PYTHONPATH": python_path()},
    )
